"""tinybert-fast evaluate"""

from pathlib import Path
from typing import Annotated

import typer

from tinybert_fast.cli import options, output
from tinybert_fast.cli.options import DATA

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "tinybert-fast evaluate student test.csv\n\n"
    "tinybert-fast evaluate student test.csv --predictions answers.jsonl --json result.json"
)


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(evaluate)


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of a fine-tuned or distilled model.")],
    file: Annotated[Path, typer.Argument(help="Labelled .csv, .tsv, .jsonl or a datasets folder.")],
    text: options.Text = None,
    text_pair: options.TextPair = None,
    label: options.Label = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write every prediction (.jsonl).",
            rich_help_panel=DATA,
            callback=options.file_to_write,
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(rich_help_panel=options.HOW)] = 64,
    max_length: Annotated[
        int, typer.Option(help="Tokens; longer texts are cut.", rich_help_panel=options.HOW)
    ] = 128,
    bf16: options.Bf16 = False,
    accelerate: options.Accelerate = True,
    impl: options.Impl = "auto",
    json_file: options.Json = None,
) -> None:
    """Score a model on labelled texts: its metrics, and how many texts it reads in a second."""
    from tinybert_fast.training.evaluate import evaluate as run

    metrics = run(
        model,
        file,
        text=text,
        text_pair=text_pair,
        label=label,
        batch_size=batch_size,
        max_length=max_length,
        bf16=bf16,
        accelerate=accelerate,
        impl=impl,
        predictions=predictions,
    )
    if predictions is not None:
        metrics["predictions"] = str(predictions)
    output.report("evaluate", metrics, json_file=json_file)
