"""tinybert-fast pretrain"""

from pathlib import Path
from typing import Annotated

import typer

from tinybert_fast.allocator import keep_freed_memory
from tinybert_fast.cli import options, output
from tinybert_fast.cli.options import DATA, HOW, TRAINING

LEARNT = "What is learnt"

EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "tinybert-fast pretrain wiki/ -o bert --held-out 0.02 --steps 10000 --bf16\n\n"
    "tinybert-fast pretrain more.txt --model bert -o further --mask word --weights idf "
    "--direction important-less\n\n"
    "tinybert-fast pretrain zh/ -o zh --words jieba --mask word --vocab-size 8000\n\n"
    "Several processes: torchrun --nproc-per-node 2 -m tinybert_fast.cli pretrain wiki/ -o bert. "
    "The first of them makes the shards of a large corpus while the others wait; to keep no GPU "
    "waiting, make them with one process beforehand and name their folder with --data.\n\n"
    "DIR gets the model (plain Transformers), metrics.json, report.md with curves.png, TensorBoard "
    "logs, and data/ with the tokenizer and the shards, which the next run uses again."
)


def register(app: typer.Typer) -> None:
    app.command(epilog=EPILOG)(pretrain)


def pretrain(
    text: Annotated[
        list[Path], typer.Argument(metavar="TEXT", help="UTF-8 files, or folders of .txt files.")
    ],
    output_: options.Output,
    model: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            help="New weights: 4l-312, 6l-768 or a config.json. The folder of a saved BERT: go on "
            "with it.",
        ),
    ] = "4l-312",
    # ---- data
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            help="Text to evaluate on: a file, a folder, or a share of the documents (0.02).",
            rich_help_panel=DATA,
        ),
    ] = None,
    held_out_examples: Annotated[
        int,
        typer.Option(
            help="Most of them that an evaluation during training reads; the last one reads all.",
            rich_help_panel=DATA,
        ),
    ] = 10_000,
    documents: Annotated[
        str,
        typer.Option(
            help="blank-lines: one ends a document; files: each file is one.",
            rich_help_panel=DATA,
        ),
    ] = "blank-lines",
    sentences: Annotated[
        str,
        typer.Option(help="split: found in each line; lines: each is one.", rich_help_panel=DATA),
    ] = "split",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="By default the model's, or one trained on the text.",
            rich_help_panel=DATA,
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(
            help="Vocabulary size of the tokenizer trained here; 30522 by default.",
            rich_help_panel=DATA,
        ),
    ] = None,
    lowercase: Annotated[
        bool | None,
        typer.Option(
            "--lowercase/--cased",
            help="Whether the tokenizer trained here reads lower case alone, as by default.",
            rich_help_panel=DATA,
        ),
    ] = None,
    words: Annotated[
        str,
        typer.Option(
            help="Where words begin: wordpiece, or jieba for Chinese.", rich_help_panel=DATA
        ),
    ] = "wordpiece",
    max_length: Annotated[
        int, typer.Option(help="Tokens of an example.", rich_help_panel=DATA)
    ] = 128,
    short: Annotated[
        float, typer.Option(help="Share of shorter examples.", rich_help_panel=DATA)
    ] = 0.1,
    duplicates: Annotated[
        int,
        typer.Option(
            help="How often the text is turned into new sentence pairs.", rich_help_panel=DATA
        ),
    ] = 1,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for tokenizer and shards; OUTPUT/data by default.",
            rich_help_panel=DATA,
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(help="Processes that write the shards.", rich_help_panel=DATA)
    ] = 1,
    # ---- what is learnt
    mlm: Annotated[
        bool,
        typer.Option("--mlm/--no-mlm", help="Learn masked tokens, or not.", rich_help_panel=LEARNT),
    ] = True,
    nsp: Annotated[
        bool,
        typer.Option(
            "--nsp/--no-nsp", help="Learn next sentences, or not.", rich_help_panel=LEARNT
        ),
    ] = True,
    bidirectional: Annotated[
        str,
        typer.Option(
            help="off; reverse: also the reversed text; causal: left to right and right to left.",
            rich_help_panel=LEARNT,
        ),
    ] = "off",
    ratio: Annotated[
        float, typer.Option(help="Share of masked tokens.", rich_help_panel=LEARNT)
    ] = 0.15,
    ratio_end: Annotated[
        float | None,
        typer.Option(help="Share of masked tokens at the end.", rich_help_panel=LEARNT),
    ] = None,
    ratio_schedule: Annotated[
        str, typer.Option(help="Of the share: constant, linear or cosine.", rich_help_panel=LEARNT)
    ] = "constant",
    mask: Annotated[
        str,
        typer.Option(
            help="What is masked as one: token, word or span of words.", rich_help_panel=LEARNT
        ),
    ] = "token",
    weights: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="Which tokens are masked more often: uniform, count, idf, loss (follows "
            "training), or a file of lines token<TAB>weight.",
            rich_help_panel=LEARNT,
        ),
    ] = "uniform",
    direction: Annotated[
        str | None,
        typer.Option(
            help="For count and idf: whether rare tokens are masked more (important-more) or less "
            "often (important-less).",
            rich_help_panel=LEARNT,
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(help="Exponent of the count weights; 0.5 by default.", rich_help_panel=LEARNT),
    ] = None,
    most: Annotated[
        float | None,
        typer.Option(help="Cap on largest / smallest weight.", rich_help_panel=LEARNT),
    ] = None,
    positions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="How often each place in an example is masked: weights, one a line.",
            rich_help_panel=LEARNT,
        ),
    ] = None,
    # ---- training
    epochs: Annotated[float, typer.Option(rich_help_panel=TRAINING)] = 3.0,
    steps: Annotated[
        int | None, typer.Option(help="Instead of epochs.", rich_help_panel=TRAINING)
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate.", rich_help_panel=TRAINING)] = 1e-4,
    batch_size: options.BatchSize = 32,
    accumulation: options.Accumulation = 1,
    warmup: options.Warmup = 0.1,
    weight_decay: options.WeightDecay = 0.01,
    schedule: options.Schedule = "linear",
    eval_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps between evaluations on --held-out; 500 by default.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    seed: options.Seed = 0,
    checkpoint_steps: options.CheckpointSteps = 500,
    log_steps: options.LogSteps = 10,
    bf16: options.Bf16 = False,
    fsdp: Annotated[
        bool,
        typer.Option("--fsdp", help="Shard the model over torchrun's GPUs.", rich_help_panel=HOW),
    ] = False,
    accelerate: options.Accelerate = True,
    impl: options.Impl = "auto",
    cuda_graphs: options.CudaGraphs = False,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    keep_checkpoints: options.KeepCheckpoints = False,
    json_file: options.Json = None,
) -> None:
    """Pre-train a BERT on plain text: masked tokens and next sentences."""
    keep_freed_memory()
    from tinybert_fast.data import Corpus
    from tinybert_fast.training.masking import Masking
    from tinybert_fast.training.pretrain import pretrain as run

    rules = {"documents": documents, "sentences": sentences}
    metrics = run(
        Corpus.of(text, **rules),
        output_,
        model=model,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        lowercase=lowercase,
        held_out=_held_out(held_out, rules),
        held_out_examples=held_out_examples,
        data=data,
        max_length=max_length,
        short=short,
        duplicates=duplicates,
        words=words,
        processes=processes,
        mlm=mlm,
        nsp=nsp,
        bidirectional=bidirectional,
        masking=Masking(
            ratio, ratio_end, ratio_schedule, mask, weights, direction, alpha, most, positions
        ),
        epochs=epochs,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        accumulation=accumulation,
        warmup=warmup,
        weight_decay=weight_decay,
        schedule=schedule,
        eval_steps=eval_steps,
        checkpoint_steps=checkpoint_steps,
        log_steps=log_steps,
        seed=seed,
        bf16=bf16,
        fsdp=fsdp,
        accelerate=accelerate,
        impl=impl,
        cuda_graphs=cuda_graphs,
        resume=resume,
        overwrite=overwrite,
        keep_checkpoints=keep_checkpoints,
    )
    output.report("pretrain", metrics, json_file=json_file, output=output_)


def _held_out(what: str | None, rules: dict[str, str]):
    """A share, or a corpus with the same rules."""
    if what is None:
        return None
    try:
        return float(what)
    except ValueError:
        from tinybert_fast.data import Corpus

        return Corpus.of(what, **rules)
