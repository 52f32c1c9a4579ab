"""tinybert-fast finetune"""

from pathlib import Path
from typing import Annotated

import typer

from tinybert_fast.allocator import keep_freed_memory
from tinybert_fast.cli import options, output
from tinybert_fast.cli.options import DATA, HOW, TRAINING

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "tinybert-fast finetune bert-folder --train train.csv --dev dev.csv -o teacher\n\n"
    "tinybert-fast finetune bert-folder --train rte.tsv --text sentence1 --text-pair sentence2 "
    "--label label -o rte --epochs 5 --bf16\n\n"
    "Labels like 3.8 make it a regression, anything else names classes. DIR gets the model "
    "(plain Transformers), metrics.json, report.md with curves.png, and TensorBoard logs."
)


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(finetune)


def finetune(
    model: Annotated[str, typer.Argument(help="Folder of a BERT to start from.")],
    train: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help=".csv, .tsv, .jsonl or a datasets folder.", rich_help_panel=DATA
        ),
    ],
    output_: options.Output,
    dev: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Labelled data that chooses the checkpoint.",
            rich_help_panel=DATA,
        ),
    ] = None,
    text: options.Text = None,
    text_pair: options.TextPair = None,
    label: options.Label = None,
    kind: Annotated[
        str,
        typer.Option(help="auto, classification or regression.", rich_help_panel=DATA),
    ] = "auto",
    epochs: Annotated[float, typer.Option(rich_help_panel=TRAINING)] = 3.0,
    lr: Annotated[float, typer.Option(help="Learning rate.", rich_help_panel=TRAINING)] = 5e-5,
    batch_size: options.BatchSize = 32,
    accumulation: options.Accumulation = 1,
    max_length: Annotated[
        int, typer.Option(help="Tokens; longer texts are cut.", rich_help_panel=TRAINING)
    ] = 128,
    warmup: options.Warmup = 0.1,
    weight_decay: options.WeightDecay = 0.01,
    schedule: options.Schedule = "linear",
    eval_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps between evaluations on --dev; each epoch by default.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    select_by: options.SelectBy = None,
    seed: options.Seed = 0,
    checkpoint_steps: Annotated[
        int | None,
        typer.Option(
            help="Without --dev: steps between checkpoints; each epoch by default. With it one "
            "follows each evaluation.",
            rich_help_panel=HOW,
        ),
    ] = None,
    log_steps: options.LogSteps = 10,
    bf16: options.Bf16 = False,
    accelerate: options.Accelerate = True,
    impl: options.Impl = "auto",
    cuda_graphs: options.CudaGraphs = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    keep_checkpoints: options.KeepCheckpoints = False,
    json_file: options.Json = None,
) -> None:
    """Train a classifier or a regression for sentences or sentence pairs (a teacher, say)."""
    keep_freed_memory()
    from tinybert_fast.training.finetune import finetune as run

    metrics = run(
        model,
        train,
        dev,
        output_,
        text=text,
        text_pair=text_pair,
        label=label,
        kind=kind,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        accumulation=accumulation,
        max_length=max_length,
        warmup=warmup,
        weight_decay=weight_decay,
        schedule=schedule,
        eval_steps=eval_steps,
        select_by=select_by,
        checkpoint_steps=checkpoint_steps,
        log_steps=log_steps,
        seed=seed,
        bf16=bf16,
        accelerate=accelerate,
        impl=impl,
        cuda_graphs=cuda_graphs,
        resume=resume,
        overwrite=overwrite,
        keep_checkpoints=keep_checkpoints,
    )
    output.report("finetune", metrics, json_file=json_file, output=output_)
