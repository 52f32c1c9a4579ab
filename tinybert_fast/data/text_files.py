"""Text files of any size, line by line: which files a corpus is, and their lines in UTF-8."""

import codecs
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

LINE_BYTES = 1 << 20  # a longer line comes in pieces, so that one without an end needs no memory
MARK = "\ufeff"  # that some editors put before UTF-8


def text_files(source: str | Path | Sequence[str | Path]) -> tuple[Path, ...]:
    """The files of a path or several; of a folder all ``*.txt`` in and below it, sorted.

    Raises:
        FileNotFoundError: a path that is not there. ValueError: a folder without such a file, or no
            path at all.
    """
    several = [source] if isinstance(source, str | Path) else list(source)
    if not several:
        raise ValueError("the corpus is empty; expected text files or folders")
    found: dict[Path, None] = {}  # a file named twice is read once
    for path in map(Path, several):
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*.txt") if file.is_file())
            if not inside:
                raise ValueError(f"the folder {path} holds no .txt file; expected plain text")
            found.update(dict.fromkeys(inside))
        elif path.is_file():
            found[path] = None
        else:
            raise FileNotFoundError(f"no text file {path}; expected plain text in UTF-8")
    return tuple(found)


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a file, stripped, blank ones as "".

    Raises:
        FileNotFoundError: the file has gone. ValueError: bytes that are not UTF-8, with their
            offset; a file that changes while it is read.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} has disappeared since this run listed it; put it back and start again"
        ) from None
    with file:
        size, offset = os.fstat(file.fileno()).st_size, 0
        while line := file.readline(LINE_BYTES):
            unfinished = len(line) == LINE_BYTES and not line.endswith(b"\n")
            piece = (unfinished and line[: line.rfind(b" ") + 1]) or line
            try:
                text, used = codecs.utf_8_decode(piece, "strict", not unfinished)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8 (byte {offset + error.start}: {error.reason}); convert it"
                ) from None
            if used < len(line):  # the piece ends at a space or inside a character
                file.seek(used - len(line), os.SEEK_CUR)
            yield (text if offset else text.removeprefix(MARK)).strip()
            offset += used
        if offset != size:
            raise ValueError(
                f"{path} changed while it was read ({size} bytes, then {offset}); start again when "
                "nothing writes to it"
            )
