"""All commands in one Typer app. Nothing here imports torch: `--help` comes at once."""

import logging
from typing import Annotated

import typer

from tinybert_fast import __version__
from tinybert_fast.cli import bench, demo, distill, evaluate, finetune, info, pretrain, validate

app = typer.Typer(
    name="tinybert-fast",
    help="Train BERT fast, and distil it into a TinyBERT that plain Transformers loads.",
    epilog="Start with [bold]tinybert-fast info[/bold] (what runs on this machine) or "
    "[bold]tinybert-fast demo[/bold] (everything on real data, minutes on two CPU cores). "
    "Each command explains itself: [bold]tinybert-fast distill --help[/bold].\n\n"
    "Exit codes: 0 done, 1 a check failed, 2 bad input (one line on stderr says which).",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tinybert-fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Log every step, and show where an error came from."),
    ] = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("tinybert_fast").setLevel(logging.DEBUG if verbose else logging.WARNING)


for module in (info, validate, pretrain, finetune, distill, evaluate, demo, bench):
    module.register(app)
