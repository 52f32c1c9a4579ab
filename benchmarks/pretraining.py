"""Pre-training end to end: our steps beside Transformers' own Trainer, and curves of runs.

    python benchmarks/pretraining.py step TEXT ... --data DIR [--bf16] [--rounds 2] [--json FILE]
    python benchmarks/pretraining.py curves NAME=RUN ... --png FILE --json FILE

``step`` trains TinyBERT-4L-312 (MLM + NSP, B=32, N=128) on shards of the text, reading included:

    transformers         BertForPreTraining in transformers.Trainer, as both come
    transformers kept    the same in a process that keeps freed memory, as ours does
    ours                 what `tinybert-fast pretrain` runs

All start from the same weights and read the same examples with the same masks; their first losses
must agree at dropout 0. Each run is a process of its own, in turn; its figure is the median time
from step to step after WARM_UP steps. ``curves`` draws held-out losses of runs that have kept their
checkpoints (``--keep-checkpoints``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from tinybert_fast.allocator import keep_freed_memory

BATCH, WIDTH, WARM_UP = 32, 128, 3
STEPS = {"transformers": 10, "transformers kept": 10, "ours": 24}
PROVIDERS = tuple(STEPS)
KEPT = PROVIDERS[1:]
AGREE = 1e-4
TERMS = ("mlm", "mlm_forward", "lm_forward")  # by bidirectional: off, reverse, causal
COMPACT = ("masked_rows", "masked_labels")  # which Transformers' model does not take


def measure(provider: str, given: argparse.Namespace, *, dropout: float, steps: int) -> dict:
    """One run in this process: {"loss": of the first step, "seconds": from step to step, ...}."""
    import torch
    import transformers
    from transformers import BertForPreTraining, TrainerCallback, set_seed

    from tinybert_fast import integrations
    from tinybert_fast.data import Corpus, PreTrainingCollator, RatioSchedule
    from tinybert_fast.data.shards import shards_of, survey
    from tinybert_fast.training.common import RunTrainer, training_arguments
    from tinybert_fast.training.loading import load_tokenizer
    from tinybert_fast.training.pretraining import Objectives, PreTrainingTrainer

    torch.set_num_threads(given.threads)
    corpus = Corpus.of(given.text, documents="files")
    tokenizer = load_tokenizer(next(given.data.glob("tokenizer-*")))
    options: dict[str, Any] = {
        "max_length": WIDTH, "nsp": True, "short": 0.1, "duplicates": 1, "words": "wordpiece",
        "seed": 0,
    }  # fmt: skip
    shards = shards_of(corpus, survey(corpus, nsp=True), tokenizer, given.data, **options)
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    set_seed(0)
    config = integrations.TinyBertConfig.tiny_4l_312(vocab_size=len(tokenizer), **rates)
    model = BertForPreTraining(config)
    collator = PreTrainingCollator(tokenizer, seed=0)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            folder, max_steps=steps, batch_size=BATCH, bf16=given.bf16, evaluate=False,
            log_steps=1, save_strategy="no", dataloader_drop_last=True,
        )  # fmt: skip
        common = {"args": arguments, "train_dataset": shards.examples, "callbacks": [Clock()]}
        trainer: Any
        if provider == "ours":
            integrations.accelerate(model)
            trainer = PreTrainingTrainer(
                model, collator=collator, objectives=Objectives(), ratio=RatioSchedule(),
                processing_class=tokenizer, progress=False, **common,
            )  # fmt: skip
        else:

            class Plain(transformers.Trainer):
                _get_train_sampler = RunTrainer._get_train_sampler  # the same examples in a batch

            def collate(examples):
                batch = collator(examples)
                return {k: batch[k] for k in batch if k not in ("lengths", *COMPACT)}

            trainer = Plain(model=model, data_collator=collate, **common)
            trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        found = {
            "loss": next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry),
            "seconds": [b - a for a, b in zip(times[WARM_UP:], times[WARM_UP + 1 :])],
        }
        if provider == "ours":
            found |= trainer.speed()
    return found


def step(given: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both providers, each run in a process of its own."""
    losses = {p: _apart(p, given, dropout=0.0, steps=1)["loss"] for p in PROVIDERS}
    apart = max(losses.values()) - min(losses.values())
    if not given.bf16 and apart > AGREE:
        raise SystemExit(f"no speed is shown: the first losses differ by {apart:.2g}: {losses}")
    rounds: dict[str, list[dict]] = {provider: [] for provider in PROVIDERS}
    for _ in range(given.rounds):
        for provider in PROVIDERS:
            rounds[provider].append(_apart(provider, given, dropout=0.1, steps=STEPS[provider]))
    medians = {p: [median(one["seconds"]) for one in runs] for p, runs in rounds.items()}
    seconds = {p: median(values) for p, values in medians.items()}
    return {
        "case": "pretraining_step",
        "batch": BATCH,
        "width": WIDTH,
        "dtype": "bf16" if given.bf16 else "fp32",
        "threads": given.threads,
        "first_losses": losses,
        "step_seconds": seconds,
        "rounds": medians,
        "speedup": seconds["transformers"] / seconds["ours"],
        "speedup_kept": seconds["transformers kept"] / seconds["ours"],
        "waiting_for_data": max(one["waiting_for_data"] for one in rounds["ours"]),
        "tokens_per_second": median(one["tokens_per_second"] for one in rounds["ours"]),
    }


def _apart(provider: str, given: argparse.Namespace, **run: Any) -> dict:
    """``keep_freed_memory`` is part of our commands, and of a process as a whole."""
    command = [sys.executable, "-W", "ignore", __file__, "step", *map(str, given.text),
               "--data", str(given.data), "--threads", str(given.threads),
               "--only", provider, "--run", json.dumps(run)]  # fmt: skip
    command += ["--bf16"] if given.bf16 else []
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(answer.stderr)
    return json.loads(answer.stdout.splitlines()[-1])


def curves(given: argparse.Namespace) -> dict[str, Any]:
    """Held-out loss of tokens over the places that a run's encoder has read."""
    from tinybert_fast.data.atomic import atomic_write
    from tinybert_fast.training.run_folder import checkpoints_in

    found: dict[str, Any] = {}
    for name, run in (one.split("=", 1) for one in given.run):
        folder = Path(run)
        state = checkpoints_in(folder / "checkpoints" / "pretrain")[-1] / "trainer_state.json"
        history = json.loads(state.read_text())["log_history"]
        term = next(t for t in TERMS if any(f"eval_{t}_loss" in e for e in history))
        settings = json.loads((folder / "run.json").read_text())["settings"]
        metrics = json.loads((folder / "metrics.json").read_text())
        found[name] = {
            "steps": metrics["steps"],
            "held_out": metrics["held_out"],
            "settings": settings,
            "curve": [
                {"step": e["step"], "mlm_loss": e[f"eval_{term}_loss"],
                 "mlm_accuracy": e[f"eval_{term}_accuracy"]}
                for e in history if f"eval_{term}_loss" in e
            ],
        }  # fmt: skip
    atomic_write(given.png, _picture(found))
    return found


def _picture(found: dict[str, Any]) -> bytes:
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, run in found.items():
        settings = run["settings"]
        passes = 1 if settings["bidirectional"] == "off" else 2
        read = settings["batch_size"] * settings["max_length"] * passes / 1e6
        points = [(point["step"] * read, point["mlm_loss"]) for point in run["curve"]]
        axes.plot(*zip(*points), marker=".", label=name)
    axes.set_xlabel("places read by the encoder, millions (padding included)")
    axes.set_ylabel("held-out loss, left to right if both")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def main() -> None:
    """Print what was measured as JSON, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    timing = commands.add_parser("step")
    timing.add_argument("text", type=Path, nargs="+", help="files, or folders of .txt files")
    timing.add_argument("--data", type=Path, required=True, help="of `tinybert-fast pretrain`")
    timing.add_argument("--rounds", type=int, default=2)
    timing.add_argument("--threads", type=int, default=2)
    timing.add_argument("--bf16", action="store_true")
    timing.add_argument("--only", choices=PROVIDERS, help=argparse.SUPPRESS)
    timing.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    drawing = commands.add_parser("curves")
    drawing.add_argument("run", nargs="+", metavar="NAME=RUN")
    drawing.add_argument("--png", type=Path, required=True)
    for one in (timing, drawing):
        one.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    if given.command == "step" and given.only:
        if given.only in KEPT:
            keep_freed_memory()
        print(json.dumps(measure(given.only, given, **given.run)))
        return
    rows = step(given) if given.command == "step" else curves(given)
    import torch

    from tinybert_fast.benchmarks.hardware import facts
    from tinybert_fast.data.atomic import atomic_write

    result = {"rows": rows, "machine": facts(torch.device("cpu"))}
    print(json.dumps(result, indent=2))
    if given.json is not None:
        atomic_write(given.json, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
