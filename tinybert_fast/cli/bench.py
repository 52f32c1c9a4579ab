"""tinybert-fast bench"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from tinybert_fast.allocator import keep_freed_memory
from tinybert_fast.cli import options, output

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "tinybert-fast bench\n\n"
    "tinybert-fast bench --suite step --case mlm --dtype both --json step.json\n\n"
    "tinybert-fast bench --suite memory\n\n"
    "tinybert-fast bench --sweeps 8 --rounds 3 --csv rows.csv, and again with --against rows.csv: "
    "whether two runs agree\n\n"
    "tinybert-fast bench --tune --head 32\n\n"
    "Before any speed is shown, all candidates must agree in loss and gradients at dropout 0 "
    "(exit code 1 if they don't). They then take turns; medians are shown."
)


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(bench)


def bench(
    suite: Annotated[
        str,
        typer.Option(
            help="step: one training step; ops: each op by itself; memory: the attention loss "
            "against length; masking: of masked-LM batches; inference: encoders that answer; "
            "scaling: steps against batch, length and padding."
        ),
    ] = "step",
    case: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only cases whose name begins so; may be repeated."),
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Time only this one and the provider that others are compared with; may be "
            "repeated. On a GPU `reference` is timed only if it is named.",
        ),
    ] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option(
            "--pass",
            metavar="NAME",
            help="Of ops, only this pass: forward, backward or both; may be repeated.",
        ),
    ] = None,
    width: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Only cases of so many tokens a sequence; may be repeated."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or both.")] = "fp32",
    rounds: Annotated[
        int | None, typer.Option(help="Timed rounds; default depends on the device.")
    ] = None,
    sweeps: Annotated[
        int,
        typer.Option(
            help="Passes over all cases with newly allocated tensors, which averages out memory "
            "placement."
        ),
    ] = 1,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
    dropout: Annotated[float, typer.Option(help="Dropout rate while timed.")] = 0.1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of weights, lengths and words.")] = 0,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Tiny sizes, seconds: shows that it works.")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile",
            help="Also show where the time of our runs goes; --json gets it too, --csv does not.",
        ),
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option(help="Start no further case after this; with --tune, no further head width."),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Instead: find this GPU's fastest settings of the attention kernels and keep them "
            "in ~/.config/tinybert_fast/settings.json, which later runs read.",
        ),
    ] = False,
    head: Annotated[
        list[int] | None,
        typer.Option(
            metavar="WIDTH",
            help="With --tune: only heads of this width, 32, 64 or 128; may be repeated.",
        ),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Append the rows to FILE.")
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", file_okay=False, help="Draw the rows: bars, memory, roofline, scaling."
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also say how far each ratio is from an earlier run's, whose rows FILE has: what "
            "--csv (it may be the same) or --json wrote.",
        ),
    ] = None,
    json_file: options.Json = None,
) -> None:
    """Time steps, ops and encoders beside what one would use otherwise: Transformers, careful
    PyTorch, others' kernels.
    """
    if tune:
        if any((csv, plots, against, case, provider, passes, width, profile)):
            raise ValueError(
                "--tune writes settings and no rows: leave --csv, --plots, --against, --case, "
                "--provider, --pass, --width, --profile"
            )
        _tune(head or (), minutes, json_file)
        return
    if head:
        raise ValueError("--head chooses what --tune tunes; give --tune too")
    keep_freed_memory()  # as the training commands do, for everybody
    from tinybert_fast.benchmarks.case import Failed
    from tinybert_fast.benchmarks.runner import run_suite

    try:
        run_suite(
            suite,
            cases=case or (),
            providers=provider or (),
            passes=passes or (),
            widths=width or (),
            dtype=dtype,
            rounds=rounds,
            sweeps=sweeps,
            threads=threads,
            dropout=dropout,
            device=device,
            seed=seed,
            smoke=smoke,
            profile=profile,
            minutes=minutes,
            json_path=json_file,
            csv_path=csv,
            plots_path=plots,
            against=against,
        )
    except Failed as error:
        output.say(f"no speed is shown: {error}")
        raise typer.Exit(1) from None


def _tune(heads: Collection[int], minutes: float | None, json_file: Path | None) -> None:
    from rich.console import Console

    from tinybert_fast.ops.dispatch import INTERPRETED, UNAVAILABLE

    if INTERPRETED or UNAVAILABLE["triton"] is not None:
        reason = UNAVAILABLE["triton"] or "TRITON_INTERPRET=1 runs kernels on the CPU"
        raise ValueError(f"--tune times the Triton kernels on an NVIDIA GPU: {reason}")
    from tinybert_fast.benchmarks.tune import Invalid, tune_this_gpu

    try:
        with Console(stderr=True).status("tuning") as status:
            file, rows = tune_this_gpu(heads, minutes, status.update)
    except Invalid as error:
        output.say(f"nothing is written: {error}")
        raise typer.Exit(1) from None
    output.show(tuple(rows[0]), [tuple(row.values()) for row in rows])
    output.say(f"settings in {file}")
    output.write_json("bench --tune", {"settings": str(file), "rows": rows}, json_file)
