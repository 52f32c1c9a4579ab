"""Plain text, one sentence per line: what is read, encoded, cut and refused."""

import logging

import pytest

from tinybert_fast.data import lines as lines_module
from tinybert_fast.data.lines import Lines, encode_lines
from tinybert_fast.testing.tiny_models import tiny_tokenizer


def write(path, content, encoding="utf-8"):
    path.write_bytes(content.encode(encoding))
    return path


def test_blank_lines_and_marks_do_not_count(tmp_path):
    file = write(tmp_path / "a.txt", "\ufeffthe film \r\n\n   \nwas good")
    lines = Lines.of(file)
    assert list(lines) == ["the film", "was good"]
    assert list(lines) == ["the film", "was good"]  # again
    count, digest = lines.survey()
    assert count == 2
    assert Lines.of(["the film", " ", "was good"]).survey() == (2, digest)
    assert Lines.of(["the film", "was bad"]).survey()[1] != digest


def test_several_files_in_order(tmp_path):
    one, two = write(tmp_path / "1", "a\n"), write(tmp_path / "2", "b\nc\n")
    assert list(Lines.of([two, one])) == ["b", "c", "a"]
    assert list(Lines.of([str(one), str(two)])) == ["a", "b", "c"]


def test_a_long_sentence_is_no_file_name():
    assert list(Lines.of(["word " * 2000])) == [("word " * 2000).strip()]


@pytest.mark.parametrize(
    ("make", "kind", "complaint"),
    [
        (lambda d: d / "absent.txt", FileNotFoundError, "no text file .*absent.txt"),
        (lambda d: [write(d / "a", "x"), d / "b"], FileNotFoundError, "no text file .*b; expected"),
        (lambda d: write(d / "empty", "\n \n"), ValueError, "empty holds no text"),
        (lambda d: [], ValueError, "corpus is empty"),
        (lambda d: ["", " "], ValueError, "list of texts holds no text"),
        (lambda d: write(d / "l1", "good\nna\xefve", "latin-1"), ValueError, "l1 is not UTF-8"),
    ],
)
def test_refusals(tmp_path, make, kind, complaint):
    with pytest.raises(kind, match=complaint):
        Lines.of(make(tmp_path)).survey()


def test_encoding(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(lines_module, "ENCODE_LINES", 2)  # several blocks
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    texts = ["the film was good", "a", "the " * 9, "bad actor", "very " * 20]
    file = tmp_path / "corpus.arrow"
    with caplog.at_level(logging.WARNING):
        encoded = encode_lines(texts, tokenizer, 8, file)
    assert "truncated 2 of 5 texts to 8 tokens" in caplog.text
    assert encoded["length"][:] == [6, 3, 8, 4, 8]
    for row, text in zip(encoded, texts):
        assert row["input_ids"] == tokenizer(text, truncation=True, max_length=8)["input_ids"]
        assert row["attention_mask"] == [1] * row["length"]
        assert row["token_type_ids"] == [0] * row["length"]
    assert [p.name for p in tmp_path.glob("corpus*")] == ["corpus.arrow"]
    again = encode_lines(iter(()), tokenizer, 8, file)  # taken as it is
    assert again["input_ids"][:] == encoded["input_ids"][:]
