"""The commands of ``tinybert-fast``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tinybert_fast.cli.main import BAD_INPUT, FAILED_CHECK
from tinybert_fast.cli.options import (
    Bf16,
    JsonFile,
    LabelColumn,
    Output,
    Overwrite,
    PairColumn,
    Plain,
    Resume,
    Seed,
    TextColumn,
    Threads,
    report,
    use_threads,
    write_json,
)

app = typer.Typer(
    help="Train BERT encoders fast and distil TinyBERT students.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Start with `tinybert-fast demo`: a real teacher and student, minutes on 2 CPU cores.",
)


@app.command()
def info(json_file: JsonFile = None) -> None:
    """What runs on this machine and, for what does not, why."""
    from rich.console import Console
    from rich.table import Table

    from tinybert_fast.cli.info import gather

    facts = gather()
    console = Console()
    for name, value in facts["machine"].items():
        console.print(f"{name}: {value}", highlight=False)
    table = Table("op", "auto takes", *facts["implementations"], title_justify="left")
    for op, row in facts["ops"].items():
        table.add_row(op, row["auto"], *(row[i] or "runs" for i in facts["implementations"]))
    console.print(table)
    write_json(facts, json_file)


@app.command(epilog="Example: tinybert-fast finetune bert/ --train train.csv --dev dev.csv -o out/")
def finetune(
    model: Annotated[Path, typer.Argument(help="a BERT folder")],
    output: Output,
    train: Annotated[Path, typer.Option(help="csv, tsv, jsonl or a datasets folder")],
    dev: Annotated[Path | None, typer.Option(help="the best checkpoint on it is kept")] = None,
    text: TextColumn = None,
    text_pair: PairColumn = None,
    label: LabelColumn = None,
    epochs: float = 3.0,
    lr: Annotated[float, typer.Option(help="peak learning rate")] = 5e-5,
    batch_size: int = 32,
    accumulation: Annotated[int, typer.Option(help="batches per optimizer step")] = 1,
    max_length: Annotated[int, typer.Option(help="word pieces; longer texts are cut")] = 128,
    eval_steps: Annotated[int | None, typer.Option(help="default: each epoch")] = None,
    select_by: Annotated[str | None, typer.Option(help="dev metric to select by")] = None,
    seed: Seed = 0,
    bf16: Bf16 = False,
    accelerate: Plain = True,
    resume: Resume = False,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Fine-tune a BERT on classification or regression, single texts or pairs."""
    use_threads(threads)
    from tinybert_fast.training.finetune import finetune as run

    metrics = run(
        model, train, dev, output, text=text, text_pair=text_pair, label=label, epochs=epochs,
        lr=lr, batch_size=batch_size, accumulation=accumulation, max_length=max_length,
        eval_steps=eval_steps, select_by=select_by, seed=seed, bf16=bf16, accelerate=accelerate,
        resume=resume, overwrite=overwrite,
    )  # fmt: skip
    report(metrics, f"fine-tuned model in {output}", json_file)


@app.command(epilog="Example: tinybert-fast evaluate out/ --file test.csv --json metrics.json")
def evaluate(
    model: Annotated[Path, typer.Argument(help="a fine-tuned BERT folder")],
    file: Annotated[Path, typer.Option(help="labelled csv, tsv, jsonl or a datasets folder")],
    text: TextColumn = None,
    text_pair: PairColumn = None,
    label: LabelColumn = None,
    batch_size: int = 64,
    max_length: int = 128,
    predictions: Annotated[Path | None, typer.Option(help="write each row's answer")] = None,
    bf16: Bf16 = False,
    accelerate: Plain = True,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Metrics of a fine-tuned BERT on a labelled file, and its speed."""
    use_threads(threads)
    from tinybert_fast.training.evaluate import evaluate as run

    metrics = run(
        model, file, text=text, text_pair=text_pair, label=label, batch_size=batch_size,
        max_length=max_length, predictions=predictions, bf16=bf16, accelerate=accelerate,
    )  # fmt: skip
    report(metrics, f"{model} on {file}", json_file)


@app.command(
    epilog="General distillation: --corpus sentences.txt. Task distillation: --train train.csv "
    "--dev dev.csv, with the general student as --student."
)
def distill(
    teacher: Annotated[Path, typer.Argument(help="a BERT folder, fine-tuned for a task")],
    output: Output,
    student: Annotated[
        str, typer.Option(help="4l-312, 6l-768, a config.json or a BERT folder to go on with")
    ] = "4l-312",
    corpus: Annotated[
        list[Path] | None, typer.Option(help="text, one sentence per line; may be repeated")
    ] = None,
    train: Annotated[Path | None, typer.Option(help="csv, tsv, jsonl or datasets folder")] = None,
    dev: Annotated[Path | None, typer.Option(help="selects the best student")] = None,
    augmented: Annotated[Path | None, typer.Option(help="augmented train texts")] = None,
    text: TextColumn = None,
    text_pair: PairColumn = None,
    label: LabelColumn = None,
    init: Annotated[str | None, typer.Option(help="random, layers or pca")] = None,
    matches: Annotated[
        str | None, typer.Option(help="student:teacher pairs, e.g. 0:0,1:2,2:3,3:5,4:6")
    ] = None,
    projection: Annotated[str, typer.Option(help="shared or per-layer")] = "shared",
    parity: Annotated[
        str, typer.Option(help="paper, or official: the released code's numbers, padded")
    ] = "paper",
    epochs: Annotated[float, typer.Option(help="of general distillation")] = 3.0,
    steps: Annotated[int | None, typer.Option(help="instead of epochs")] = None,
    lr: Annotated[float, typer.Option(help="of general distillation")] = 5e-5,
    intermediate_epochs: Annotated[float, typer.Option(help="task stage A")] = 20.0,
    intermediate_lr: float = 5e-5,
    prediction_epochs: Annotated[float, typer.Option(help="task stage B")] = 3.0,
    prediction_lr: float = 3e-5,
    temperature: Annotated[float, typer.Option(help="of the prediction loss")] = 1.0,
    batch_size: Annotated[int | None, typer.Option(help="256 general, 32 task")] = None,
    accumulation: int = 1,
    max_length: Annotated[int | None, typer.Option(help="128; 64 for single task texts")] = None,
    eval_steps: Annotated[int, typer.Option(help="of stage B")] = 100,
    seed: Seed = 0,
    bf16: Bf16 = False,
    accelerate: Plain = True,
    resume: Resume = False,
    overwrite: Overwrite = False,
    threads: Threads = None,
    json_file: JsonFile = None,
) -> None:
    """Distil a student: general (from plain text) or task (a fine-tuned teacher and its data)."""
    if (corpus is None) == (train is None):
        raise ValueError(
            "give --corpus for general distillation or --train for task distillation, one of them"
        )
    if projection not in ("shared", "per-layer"):
        raise ValueError(f"--projection is shared or per-layer; got {projection!r}")
    use_threads(threads)
    from tinybert_fast.training import recipes

    common: dict[str, Any] = {
        "init": init, "matches": matches, "shared_projection": projection == "shared",
        "parity": parity, "accumulation": accumulation, "seed": seed, "bf16": bf16,
        "accelerate": accelerate and parity != "official", "resume": resume,
        "overwrite": overwrite,
    }  # fmt: skip
    if batch_size is not None:
        common["batch_size"] = batch_size
    if max_length is not None:
        common["max_length"] = max_length
    if corpus is not None:
        metrics = recipes.distill_general(
            teacher, student, corpus, output, epochs=epochs, steps=steps, lr=lr, **common
        )
    else:
        assert train is not None
        metrics = recipes.distill_task(
            teacher, student, train, dev, output, augmented=augmented, text=text,
            text_pair=text_pair, label=label, intermediate_epochs=intermediate_epochs,
            intermediate_lr=intermediate_lr, prediction_epochs=prediction_epochs,
            prediction_lr=prediction_lr, temperature=temperature, eval_steps=eval_steps, **common,
        )  # fmt: skip
    report(metrics, f"student in {output}", json_file)


@app.command(epilog="Example: tinybert-fast bench --suite step --case mlm --json rows.json")
def bench(
    suite: Annotated[str, typer.Option(help="step or memory")] = "step",
    case: Annotated[list[str] | None, typer.Option(help="only cases whose name begins so")] = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or both")] = "fp32",
    rounds: Annotated[int | None, typer.Option(help="repetitions")] = None,
    threads: Annotated[int, typer.Option(help="PyTorch threads on the CPU")] = 2,
    dropout: Annotated[float, typer.Option(help="while timed")] = 0.1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    seed: Seed = 0,
    smoke: Annotated[bool, typer.Option("--smoke", help="tiny sizes: does it work?")] = False,
    json_file: JsonFile = None,
    csv: Annotated[Path | None, typer.Option(help="append the rows to this file")] = None,
) -> None:
    """Time training steps, ours beside the baselines; wrong results are not timed."""
    from tinybert_fast.benchmarks.runner import Disagreement, run_suite

    try:
        run_suite(
            suite, cases=tuple(case or ()), dtype=dtype, rounds=rounds, threads=threads,
            dropout=dropout, device=device, seed=seed, smoke=smoke, json_path=json_file,
            csv_path=csv,
        )  # fmt: skip
    except Disagreement as error:
        typer.echo(f"tinybert-fast: {error}", err=True)
        raise typer.Exit(FAILED_CHECK) from error


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="folder of all files")] = Path(
        "runs/demo"
    ),
    full: Annotated[
        bool, typer.Option("--full", help="the best honest result; takes long")
    ] = False,
    seeds: Annotated[int, typer.Option(help="repetitions of task distillation and baselines")] = 1,
    threads: Annotated[int, typer.Option(help="PyTorch threads on the CPU")] = 2,
    only: Annotated[
        list[str] | None,
        typer.Option(help="one phase: data, teacher, general, student, alone or score"),
    ] = None,
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
) -> None:
    """Distil TinyBERT-4L-312 from MiniLM-L6 on film reviews, and show what the teacher was worth.

    A phase that is complete in the output folder is not run again, so an interrupted demo goes on.
    """
    from dataclasses import replace

    from rich.console import Console
    from rich.table import Table

    from tinybert_fast.training import demo as library
    from tinybert_fast.training.demo import scores

    console = Console(highlight=False)
    settings = replace(library.FULL if full else library.QUICK, seeds=seeds, threads=threads)
    result = library.run_demo(
        settings, output, only=tuple(only or ()), overwrite=overwrite, say=console.print
    )
    if result is None:
        return
    table = Table(*scores.MODEL_COLUMNS[:-1], title="film review sentences", title_justify="left")
    for row in scores.model_rows(result):
        table.add_row(*row[:-1])
    console.print(table)
    for remark in scores.remarks(result):
        console.print(f"- {remark}")
    console.print(f"{result['total_seconds']:,.0f} s; report, plot and models: {result['folder']}")
    write_json(result, json_file)


__all__ = ["BAD_INPUT", "app"]
