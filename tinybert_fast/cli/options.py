"""Options that several commands share, written once."""

from pathlib import Path
from typing import Annotated

import typer

HOW = "How it runs"
DATA = "Data"
TRAINING = "Training"

SELECT_BY = (
    "What chooses the checkpoint on dev: a metric (accuracy, f1, macro_f1, matthews; pearson, "
    "spearman, pearson_spearman) or loss."
)
SCHEDULE = "Learning rate over the steps: linear, cosine, constant or constant_with_warmup."


def file_to_write(option: typer.CallbackParam, path: Path | None) -> Path | None:
    if path is not None and path.is_dir():
        raise ValueError(f"{option.opts[0]} {path} is a folder; expected a file to write")
    return path


def _not_negative(seed: int) -> int:
    if seed < 0:
        raise ValueError(f"--seed is {seed}; expected 0 or more")
    return seed


Json = Annotated[
    Path | None,
    typer.Option(
        "--json", metavar="FILE", help="Also write the result to FILE.", callback=file_to_write
    ),
]
Output = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="DIR", help="Folder for the model and its report."),
]

Text = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN",
        help="Column of the text; names that GLUE uses are found.",
        rich_help_panel=DATA,
    ),
]
TextPair = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="Column of the second text.", rich_help_panel=DATA),
]
Label = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="Column of the label.", rich_help_panel=DATA),
]

BatchSize = Annotated[
    int, typer.Option(help="Examples per batch and process.", rich_help_panel=TRAINING)
]
Accumulation = Annotated[
    int, typer.Option(help="Batches per optimizer step.", rich_help_panel=TRAINING)
]
Warmup = Annotated[
    float,
    typer.Option(
        help="Warm-up of the learning rate: below 1 a share of all steps, else their number.",
        rich_help_panel=TRAINING,
    ),
]
Schedule = Annotated[str, typer.Option(help=SCHEDULE, rich_help_panel=TRAINING)]
WeightDecay = Annotated[
    float, typer.Option(help="Weight decay of AdamW.", rich_help_panel=TRAINING)
]
Seed = Annotated[
    int,
    typer.Option(
        help="Seed of new weights, batches and dropout.",
        rich_help_panel=TRAINING,
        callback=_not_negative,
    ),
]
SelectBy = Annotated[
    str | None,
    typer.Option(
        metavar="METRIC",
        help=SELECT_BY,
        rich_help_panel=TRAINING,
    ),
]

CheckpointSteps = Annotated[
    int, typer.Option(help="Steps between checkpoints.", rich_help_panel=HOW)
]
LogSteps = Annotated[int, typer.Option(help="Steps between logged losses.", rich_help_panel=HOW)]
Bf16 = Annotated[
    bool,
    typer.Option(
        "--bf16", help="bfloat16 autocast; for hardware that has it.", rich_help_panel=HOW
    ),
]
Accelerate = Annotated[
    bool,
    typer.Option(
        "--accelerate/--plain",
        help="Run without padding, or leave Transformers' own forward.",
        rich_help_panel=HOW,
    ),
]
Impl = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Implementation of the operators: auto, torch, reference, ... (see info).",
        rich_help_panel=HOW,
    ),
]
CudaGraphs = Annotated[
    bool,
    typer.Option(
        "--cuda-graphs",
        help="On one NVIDIA GPU: replay steps instead of launching them from Python.",
        rich_help_panel=HOW,
    ),
]
Resume = Annotated[
    bool,
    typer.Option("--resume", help="Go on with an interrupted run.", rich_help_panel=HOW),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Replace the model that is in the folder.", rich_help_panel=HOW
    ),
]
KeepCheckpoints = Annotated[
    bool,
    typer.Option("--keep-checkpoints", help="Leave the checkpoints there.", rich_help_panel=HOW),
]
