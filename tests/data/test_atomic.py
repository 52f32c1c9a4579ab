"""Files that are whole or absent."""

import os

import pytest

from tinybert_fast.data.atomic import atomic_write, replacing


def test_the_old_file_stays_when_writing_fails(tmp_path, monkeypatch):
    file = tmp_path / "new" / "a.json"
    atomic_write(file, "old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        atomic_write(file, "new")
    assert file.read_text() == "old"
    assert [path.name for path in file.parent.iterdir()] == ["a.json"]


def test_links_and_devices_stay_what_they_are(tmp_path):
    target, link, pipe = (tmp_path / name for name in ("target", "link", "pipe"))
    link.symlink_to(target)
    atomic_write(link, "through")
    assert link.is_symlink()
    assert target.read_text() == "through"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    atomic_write(pipe, "down")
    assert os.read(reader, 9) == b"down"
    os.close(reader)
    assert pipe.is_fifo()


def test_two_processes_do_not_share_a_half_written_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    with replacing(file) as mine:
        mine.write_text("mi")
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: -1)
            atomic_write(file, b"theirs")
        assert file.read_text() == "theirs"
        mine.write_text("mine")
    assert file.read_text() == "mine"
