"""Options that several commands share, each described once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

TextColumn = Annotated[str | None, typer.Option(help="column of the text; found by name")]
PairColumn = Annotated[
    str | None, typer.Option("--text-pair", help="column of the second text of a pair")
]
LabelColumn = Annotated[str | None, typer.Option(help="column of the label; found by name")]
Output = Annotated[Path, typer.Option("--output", "-o", help="folder to write the model to")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace a model that is there")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with an interrupted run")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast")]
Plain = Annotated[
    bool, typer.Option("--accelerate/--no-accelerate", help="packed encoder, or Transformers' own")
]
Seed = Annotated[int, typer.Option(help="of weights, batches and dropout")]
JsonFile = Annotated[Path | None, typer.Option("--json", help="also write the result to this file")]
Threads = Annotated[int | None, typer.Option(help="PyTorch threads on the CPU")]


def use_threads(threads: int | None) -> None:
    """Limit PyTorch to ``threads`` CPU threads."""
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"--threads must be at least 1; got {threads}")
    import torch

    torch.set_num_threads(threads)


def report(result: dict[str, Any], title: str, json_file: Path | None) -> None:
    """A table of the scalars of ``result``; the whole of it in ``json_file``."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in result.items():
        if isinstance(value, float):
            table.add_row(name, f"{value:,.4f}")
        elif isinstance(value, str | int | bool):
            table.add_row(name, str(value))
    Console().print(table)
    write_json(result, json_file)


def write_json(result: Any, json_file: Path | None) -> None:
    """Whole or not at all: written beside the target, then renamed."""
    if json_file is None:
        return
    json_file.parent.mkdir(parents=True, exist_ok=True)
    part = json_file.with_name(json_file.name + ".part")
    part.write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(part, json_file)
