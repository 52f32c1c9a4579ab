"""Text files by line: what a corpus lists, pieces of long lines, and what is refused where."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinybert_fast.data import text_files as module
from tinybert_fast.data.text_files import read_lines, text_files


def test_folders_give_their_text_files_sorted(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/y.md", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [file.relative_to(tmp_path).as_posix() for file in text_files(tmp_path)]
    assert names == ["a/z.txt", "b.txt", "c.txt"]
    both = text_files([tmp_path / "c.txt", tmp_path, tmp_path / "a" / "y.md"])
    assert [file.name for file in both] == ["c.txt", "z.txt", "b.txt", "y.md"]


def test_paths_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no text file .*absent"):
        text_files(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no \.txt file"):
        text_files(tmp_path)
    with pytest.raises(ValueError, match="corpus is empty"):
        text_files([])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=40)), st.integers(4, 30))
def test_pieces_of_long_lines_lose_nothing(tmp_path_factory, lines, limit):
    """Characters of 1 to 4 bytes, cut anywhere."""
    file = tmp_path_factory.mktemp("lines") / "a.txt"
    text = "\n".join(" ".join(line.split()) for line in lines)
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LINE_BYTES", limit)
        pieces = list(read_lines(file))
    bare = text.removeprefix(module.MARK)
    assert "".join("".join(pieces).split()) == "".join(bare.split())
    assert all(len(piece.encode()) <= limit for piece in pieces)


def test_pieces_end_between_words(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LINE_BYTES", 10)
    (tmp_path / "a.txt").write_text("one two three four\nexactly 9\n\nand so on")
    pieces = ["one two", "three", "four", "exactly 9", "", "and so on"]
    assert list(read_lines(tmp_path / "a.txt")) == pieces


def test_the_offset_of_a_bad_byte_is_named(tmp_path, monkeypatch):
    file = tmp_path / "latin.txt"
    file.write_bytes("schön\n".encode() + b"na\xefve\n")
    for limit in (module.LINE_BYTES, 4):
        monkeypatch.setattr(module, "LINE_BYTES", limit)
        with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 \(byte 9: "):
            list(read_lines(file))
    file.write_bytes(b"cut short \xe4\xb8")
    with pytest.raises(ValueError, match=r"byte 10: unexpected end of data"):
        list(read_lines(file))


def test_files_that_go_or_change(tmp_path):
    file = tmp_path / "a.txt"
    with pytest.raises(FileNotFoundError, match=r"a\.txt has disappeared"):
        list(read_lines(file))
    file.write_text("one\n" * 9)
    lines = read_lines(file)
    next(lines)
    file.open("a").write("more\n")
    with pytest.raises(ValueError, match=r"changed while it was read \(36 bytes, then 41\)"):
        list(lines)
