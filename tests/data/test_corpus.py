"""Documents and sentences of text files."""

import pytest

from tinybert_fast.data import Corpus


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("\n\nOne. Two.\nThree.\n\n \n\nFour.\n")
    (tmp_path / "b.txt").write_text("Five.\n")
    (tmp_path / "c.txt").write_text("\n")
    return tmp_path


def test_documents(folder):
    assert list(Corpus.of(folder).lines()) == [
        "One. Two.", "Three.", None, "Four.", None, "Five.", None,
    ]  # fmt: skip
    assert list(Corpus.of(folder, documents="files").lines()) == [
        "One. Two.", "Three.", "Four.", None, "Five.", None,
    ]  # fmt: skip


def test_sentences(folder):
    assert list(Corpus.of(folder)) == ["One.", "Two.", "Three.", "Four.", "Five."]
    lines = Corpus.of(folder, sentences="lines")
    assert list(lines) == ["One. Two.", "Three.", "Four.", "Five."]
    assert Corpus.of(lines) is lines
    assert str(lines) == f"{folder / 'a.txt'} and 2 more files"


def test_rules_are_known(folder):
    with pytest.raises(
        ValueError, match="documents is 'pages'; expected one of blank-lines, files"
    ):
        Corpus.of(folder, documents="pages")
    with pytest.raises(ValueError, match="sentences is 'words'; expected one of split, lines"):
        Corpus.of(folder, sentences="words")


def test_held_out_documents(folder):
    corpus = Corpus.of(folder)
    assert list(corpus.part(2, held_out=True).lines()) == ["Four.", None]
    rest = corpus.part(2, held_out=False)
    assert list(rest.lines()) == ["One. Two.", "Three.", None, "Five.", None]
    assert list(rest) == ["One.", "Two.", "Three.", "Five."]
    assert str(rest) == f"what is not held out of {corpus}"
    assert str(corpus.part(2, held_out=True)) == f"one document in 2 of {corpus}"
