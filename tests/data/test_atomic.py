"""Files that are whole or absent, whatever ends a process that writes them."""

import os
import signal
from pathlib import Path

import pytest

from tinybert_fast.data import atomic
from tinybert_fast.data.atomic import atomic_write, partial_of, replacing, replacing_folder


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


def killed_while_writing(folder: Path, *names: str) -> None:
    """A process of its own, killed: a folder of each name is half written."""
    child = os.fork()
    if child == 0:
        for name in names:
            partial_of(folder / name).mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)


def test_what_a_killed_process_left_is_removed(tmp_path):
    killed_while_writing(tmp_path, "lessons", "model")
    left = {path.name for path in tmp_path.iterdir()}
    assert len(left) == 2
    with replacing_folder(tmp_path / "lessons") as partial:
        assert partial.name not in left
        assert list(tmp_path.iterdir()) == [partial]
    killed_while_writing(tmp_path, "more")
    atomic_write(tmp_path / "a.json", "new")
    assert {path.name for path in tmp_path.iterdir()} == {"lessons", "a.json"}


def test_what_may_be_in_use_is_left_alone(tmp_path, monkeypatch):
    """Of another host or container, of a process that lives, and whatever is called alike."""
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(atomic, "_place", lambda: "0123abcd")
        killed_while_writing(tmp_path, "lessons")
    killed_while_writing(tmp_path, "same number")
    (dead,) = tmp_path.glob(".same number*")
    dead.rename(tmp_path / dead.name.replace(".partial", ".parts"))
    mine = partial_of(tmp_path / "mine")
    mine.write_text("half")
    theirs = tmp_path / mine.name.replace(str(os.getpid()), str(os.getppid()))
    theirs.write_text("half")
    there = set(tmp_path.iterdir())
    assert len(there) == 4
    with replacing(tmp_path / "other") as partial:
        partial.write_text("whole")
    assert set(tmp_path.iterdir()) == {*there, tmp_path / "other"}


def test_a_number_that_comes_again(tmp_path):
    """As in containers, where each run has the same: what has our name is of one before us."""
    old = partial_of(tmp_path / "lessons")
    old.mkdir()
    (old / "00000").write_text("half")
    with replacing_folder(tmp_path / "lessons") as partial:
        assert partial == old
        assert not list(partial.iterdir())
