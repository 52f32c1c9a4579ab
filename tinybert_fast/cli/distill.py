"""tinybert-fast distill: general distillation with --corpus, task distillation with --train."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tinybert_fast.allocator import keep_freed_memory
from tinybert_fast.cli import options, output
from tinybert_fast.cli.options import HOW, TRAINING

GENERAL = "General distillation (with --corpus)"
TASK = "Task distillation (with --train)"
BOTH = "Student"
SPEED = "Teacher"

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "1. General distillation, from a teacher that was not fine-tuned and plain text, one sentence "
    "a line:\n\n"
    "tinybert-fast distill bert-folder --corpus wiki.txt --init pca -o general\n\n"
    "2. Task distillation, from the fine-tuned teacher to the student of step 1:\n\n"
    "tinybert-fast distill teacher --student general --train train.csv --dev dev.csv -o student\n\n"
    "A 6-layer teacher and the 4-layer student: --matches 0:0,1:2,2:3,3:5,4:6\n\n"
    "A teacher with another number of heads than the student: --loss minilm\n\n"
    "Defaults are the paper's. DIR gets the model (plain Transformers), metrics.json, report.md "
    "with curves.png, and TensorBoard logs."
)


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(distill)


def distill(
    context: typer.Context,
    teacher: Annotated[
        str, typer.Argument(help="Folder of a BERT; for a task, one fine-tuned on it.")
    ],
    output_: options.Output,
    student: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="4l-312, 6l-768, a config.json, or the folder of a saved student.",
            rich_help_panel=BOTH,
        ),
    ] = "4l-312",
    init: Annotated[
        str | None,
        typer.Option(
            metavar="HOW",
            help="Start of a new student: random (default), layers (copies the teacher's), or pca "
            "(of the teacher's embeddings).",
            rich_help_panel=BOTH,
        ),
    ] = None,
    loss: Annotated[
        str,
        typer.Option(
            help="tinybert: hidden states and attention scores of matched layers. minilm: "
            "softmaxed relations of one layer; student and teacher may have any number of heads.",
            rich_help_panel=BOTH,
        ),
    ] = "tinybert",
    relations: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="For minilm: qk, qq, kk, vv, joined by commas. qq,kk,vv (MiniLMv2) by default; "
            "MiniLM is qk,vv.",
            rich_help_panel=BOTH,
        ),
    ] = None,
    relation_heads: Annotated[
        int | None,
        typer.Option(
            help="For minilm: heads of both models, which divide both widths. By default the "
            "larger number of attention heads that does.",
            rich_help_panel=BOTH,
        ),
    ] = None,
    teacher_layer: Annotated[
        int | None,
        typer.Option(
            help="For minilm: layer whose relations the student's last layer learns; the last by "
            "default.",
            rich_help_panel=BOTH,
        ),
    ] = None,
    matches: Annotated[
        str | None,
        typer.Option(
            metavar="PAIRS",
            help="Which teacher layer each student layer learns, student:teacher; 0 is the "
            "embedding. Evenly spread by default.",
            rich_help_panel=BOTH,
        ),
    ] = None,
    shared_projection: Annotated[
        bool,
        typer.Option(
            "--shared-projection/--projection-per-layer",
            help="One map from student to teacher width, or one per layer.",
            rich_help_panel=BOTH,
        ),
    ] = True,
    parity: Annotated[
        str,
        typer.Option(
            help="paper; or official: the released code's losses and optimizer, padded and "
            "unaccelerated.",
            rich_help_panel=BOTH,
        ),
    ] = "paper",
    teacher_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="What the teacher computes in: fp32, bf16, int8 on a CPU, or fp8 on an sm_90 or "
            "sm_100; by default as the run. The report says how much it changes the loss.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    cache_teacher: Annotated[
        bool,
        typer.Option(
            "--cache-teacher",
            help="Ask the teacher once, keep what it says on disk, and learn from that in every "
            "epoch; removed at the end. For CPUs: layers take kilobytes a token, which a GPU waits "
            "for longer than for a live teacher. Logits alone (--intermediate-epochs 0) pay "
            "anywhere.",
            rich_help_panel=SPEED,
        ),
    ] = False,
    cache_folder: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="The same, kept in DIR for other runs with this teacher and these texts.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    cache_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="How the numbers are kept: fp32, fp16 or bf16; by default as computed.",
            rich_help_panel=SPEED,
        ),
    ] = None,
    # ---- general
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Plain text, one sentence a line; may be repeated.",
            rich_help_panel=GENERAL,
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(rich_help_panel=GENERAL)] = 3.0,
    steps: Annotated[
        int | None, typer.Option(help="Instead of epochs.", rich_help_panel=GENERAL)
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.", rich_help_panel=GENERAL)] = 5e-5,
    schedule: Annotated[
        str, typer.Option(help=options.SCHEDULE, rich_help_panel=GENERAL)
    ] = "linear",
    # ---- task
    train: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help=".csv, .tsv, .jsonl or a datasets folder; labels are not read.",
            rich_help_panel=TASK,
        ),
    ] = None,
    dev: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Labelled data that chooses the checkpoint.",
            rich_help_panel=TASK,
        ),
    ] = None,
    augmented: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Texts that stand in for --train in the first stage, and should hold its texts "
            "too. This package has no generator of TinyBERT's augmented data; any sentences of the "
            "kind will do.",
            rich_help_panel=TASK,
        ),
    ] = None,
    augmented_prediction: Annotated[
        bool | None,
        typer.Option(
            "--augmented-prediction/--train-prediction",
            help="Texts of the second stage; augmented by default, but for regressions.",
            rich_help_panel=TASK,
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of the text.", rich_help_panel=TASK)
    ] = None,
    text_pair: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Column of the second text.", rich_help_panel=TASK),
    ] = None,
    label: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Column of the label of --dev.", rich_help_panel=TASK),
    ] = None,
    intermediate_epochs: Annotated[
        float,
        typer.Option(
            help="Epochs of the first stage, on layers; 0 leaves it out.", rich_help_panel=TASK
        ),
    ] = 20.0,
    intermediate_lr: Annotated[float, typer.Option(rich_help_panel=TASK)] = 5e-5,
    intermediate_schedule: Annotated[
        str, typer.Option(help=options.SCHEDULE, rich_help_panel=TASK)
    ] = "constant",
    prediction_epochs: Annotated[
        float,
        typer.Option(
            help="Epochs of the second stage, on the teacher's logits.", rich_help_panel=TASK
        ),
    ] = 3.0,
    prediction_lr: Annotated[float, typer.Option(rich_help_panel=TASK)] = 3e-5,
    prediction_schedule: Annotated[
        str, typer.Option(help=options.SCHEDULE, rich_help_panel=TASK)
    ] = "linear",
    temperature: Annotated[
        float, typer.Option(help="Divides the logits of both models.", rich_help_panel=TASK)
    ] = 1.0,
    eval_steps: Annotated[
        int, typer.Option(help="Steps between evaluations on --dev.", rich_help_panel=TASK)
    ] = 100,
    select_by: Annotated[
        str | None,
        typer.Option(metavar="METRIC", help=options.SELECT_BY, rich_help_panel=TASK),
    ] = None,
    # ---- both
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Examples per batch and process: 256 for a corpus, 32 for a task by default.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    accumulation: options.Accumulation = 1,
    max_length: Annotated[
        int | None,
        typer.Option(
            help="Tokens; longer texts are cut. By default 128, single texts of a task 64.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    warmup: options.Warmup = 0.1,
    weight_decay: options.WeightDecay = 0.01,
    seed: options.Seed = 0,
    checkpoint_steps: options.CheckpointSteps = 500,
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
    """Train a small BERT to think like a large one (TinyBERT, MiniLM): from plain text, or for a
    task.
    """
    if bool(corpus) == bool(train):
        raise ValueError(
            "distill needs one of --corpus FILE (general distillation, plain text) and "
            "--train FILE (task distillation); got " + ("both" if corpus else "neither")
        )
    given = _given(context, BOTH, SPEED, TRAINING, HOW, GENERAL if corpus else TASK)
    for name in ("student", "corpus", "train", "dev", "json_file"):
        given.pop(name, None)
    if cache_folder is not None:
        given["cache_teacher"] = given.pop("cache_folder")
    keep_freed_memory()
    from tinybert_fast.training import recipes

    if corpus:
        metrics = recipes.distill_general(teacher, student, corpus, output_, **given)
    else:
        assert train is not None  # one of the two, as checked above
        metrics = recipes.distill_task(teacher, student, train, dev, output_, **given)
    output.report("distill", metrics, json_file=json_file, output=output_)


def _given(context: typer.Context, *panels: str) -> dict[str, Any]:
    """The options on the command line; the recipes know the defaults of the rest. Refuses those of
    the other kind of distillation.
    """
    given = {}
    for parameter in context.command.params:
        panel = getattr(parameter, "rich_help_panel", None)
        name = parameter.name or ""
        source: Any = context.get_parameter_source(name)
        if panel is None or source.name == "DEFAULT":
            continue
        if panel not in panels:
            raise ValueError(
                f"{parameter.opts[0]} belongs to {panel[0].lower()}{panel[1:]}; leave it out"
            )
        given[name] = context.params[name]
    return given
