"""Files that are whole or absent: written under another name, then renamed.

That name, .NAME.PLACE.PID.partial, says who writes: a process that is killed leaves it behind, and
the next one that writes beside it clears it away. PLACE is where PID is a number of: a host and, of
a container, its own numbers. What another place left can't be told from what is written there now.
"""

import hashlib
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, renamed to `path` at the end and removed after an error.
    Of a link the target is replaced.

    Each process has its own, so that two of them never rename each other's half-written file.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: Path, content: str | bytes) -> None:
    """A reader sees the old file or the whole new one. A device (/dev/stdout) is written to."""
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(data)
        return
    with replacing(path) as partial:
        partial.write_bytes(data)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to fill, renamed to `path` at the end and removed after an error.

    FileExistsError, before anything is done, if `path` is there and not an empty folder.
    """
    path = path.resolve()
    if path.exists() and not (path.is_dir() and next(path.iterdir(), None) is None):
        raise FileExistsError(f"{path} is there already; remove it, or name another folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(path)
    try:
        partial.mkdir()
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_of(path: Path) -> Path:
    """The name beside ``path`` that this process writes to. Whatever has it is removed, and so are
    leftovers beside it.
    """
    partial = path.with_name(f".{path.name}.{_place()}.{os.getpid()}.partial")
    _remove(partial)  # of a process that had the same number
    remove_leftovers(path.parent)
    return partial


def remove_leftovers(folder: Path) -> None:
    """What processes of this place began to write in ``folder`` and, being killed, left there."""
    name = re.compile(rf"\..+\.{_place()}\.(\d{{1,9}})\.partial")
    for path in partials(folder):
        found = name.fullmatch(path.name)
        if found and not _lives(int(found[1])):
            _remove(path)


def partials(folder: Path) -> list[Path]:
    """What somebody has begun to write in ``folder``, if there is such a folder."""
    return sorted(folder.glob(".*.partial"))


def _place() -> str:
    try:
        numbers = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        numbers = ""
    return hashlib.sha256(f"{socket.gethostname()} {numbers}".encode()).hexdigest()[:8]


def _lives(pid: int) -> bool:
    if os.name != "posix":  # where the question would end the process
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # it is gone, or somebody else's
            path.unlink()
