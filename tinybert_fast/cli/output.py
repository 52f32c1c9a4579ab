"""What a command leaves behind: a table on stdout, and the same as JSON if asked for."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tinybert_fast import __version__

HIDDEN = ("losses", "labels")  # too long for a table; they are in report.md and the JSON


def report(
    command: str, result: Mapping[str, Any], *, json_file: Path | None, output: Path | None = None
) -> None:
    """The result of a run as a table of names and values, and as JSON. Rank 0 alone speaks."""
    if not speaks():
        return
    show(("", command), list(_flat(result)), bold=1)
    if output is not None:
        say(f"model in {output}, report in {output / 'report.md'}")
        result = {**result, "output": str(output)}
    write_json(command, result, json_file)


def write_json(command: str, result: Mapping[str, Any], file: Path | None) -> None:
    if file is None:
        return
    from tinybert_fast.data.atomic import atomic_write

    whole = {"command": command, "tinybert_fast": __version__, **result}
    atomic_write(file, json.dumps(whole, indent=2) + "\n")


def show(header: Sequence[str], rows: Iterable[Sequence[Any]], *, bold: int = 0) -> None:
    """A table on stdout; numbers to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    rows = [tuple(map(_cell, row)) for row in rows]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for at, name in enumerate(header):
        numbers = bool(rows) and all(row[at][:1].isdigit() or row[at] == "" for row in rows)
        table.add_column(
            name,
            justify="right" if numbers else "left",
            style="bold" if bold and at == bold else "",
            overflow="fold",  # names are there to be read whole
        )
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    _console().print(table)


def say(line: str) -> None:
    _console().print(line, highlight=False, markup=False, soft_wrap=True)


def speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _console() -> Any:
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)  # a file or a pipe needs no wrapping
    return console


def _flat(result: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in result.items():
        words = f"{prefix}{name.replace('_', ' ')}"
        if isinstance(value, Mapping):
            if name not in HIDDEN:
                yield from _flat(value, f"{words}: ")
        elif value is not None and name not in HIDDEN:
            yield words, value


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
