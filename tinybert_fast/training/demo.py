"""The whole job on real data: a teacher, general and task distillation, and what they were worth.

Every phase has its own folder under the output folder. A phase that is complete there is not run
again, so an interrupted demo goes on where it stopped.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import BertForSequenceClassification, TrainerCallback, set_seed

from tinybert_fast.data import Task, load_examples
from tinybert_fast.training.demo_data import DemoData, prepare
from tinybert_fast.training.evaluate import evaluate
from tinybert_fast.training.finetune import finetune
from tinybert_fast.training.initialise import initialise_student
from tinybert_fast.training.loading import load_classifier, load_config, load_tokenizer
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.recipes import distill_general, distill_task
from tinybert_fast.training.report import panels_of, plot, table
from tinybert_fast.training.run_folder import atomic_write
from tinybert_fast.training.students import Student

STUDENT = "4l-312"
MATCHES = "0:0,1:2,2:3,3:5,4:6"  # 4 student layers over the teacher's 6
SPEED_BATCH = 32  # sentences, for the figures of speed
console = Console()


@dataclass(frozen=True)
class DemoSettings:
    """How long each phase takes. Sentences of MR are about 27 word pieces."""

    train_sentences: int | None
    teacher_epochs: float
    general_steps: int
    general_batch: int
    intermediate_epochs: float
    prediction_epochs: float
    plain_lrs: tuple[float, ...]  # tried by the student without a teacher; dev chooses
    pca_alone: bool  # also train without a teacher from the PCA start
    teacher_lr: float = 5e-5
    general_lr: float = 5e-4
    intermediate_lr: float = 3e-4
    prediction_lr: float = 1e-4
    batch_size: int = 32
    max_length: int = 64

    @property
    def plain_epochs(self) -> float:
        """The student without a teacher sees the task's data as often as the distilled one."""
        return self.intermediate_epochs + self.prediction_epochs


QUICK = DemoSettings(
    train_sentences=4096, teacher_epochs=1, general_steps=100, general_batch=64,
    intermediate_epochs=1, prediction_epochs=1, plain_lrs=(1e-4,), pca_alone=False,
)  # fmt: skip
FULL = DemoSettings(
    train_sentences=None, teacher_epochs=3, general_steps=1500, general_batch=64,
    intermediate_epochs=4, prediction_epochs=3, plain_lrs=(5e-5, 1e-4, 3e-4), pca_alone=True,
)  # fmt: skip


class _History(TrainerCallback):
    """Keeps what the Trainer logs, for the plot, in a file that outlives the phase."""

    def __init__(self, path: Path) -> None:
        self.path, self.entries = path, []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.entries.append({"step": len(self.entries), **(logs or {}), "at": state.global_step})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        atomic_write(self.path, json.dumps(self.entries, default=float))


def run_demo(
    output: Path, settings: DemoSettings = QUICK, *, seeds: Iterable[int] = (0,)
) -> dict[str, Any]:
    """Run what is missing under ``output`` and return the table: rows, gap won back, seconds.

    Teacher and general student are trained once; task distillation and the students without a
    teacher once per seed. The learning rate of the latter is chosen on the dev sentences with the
    first seed.
    """
    output = Path(output).resolve()
    seeds = list(seeds)
    timer = _Timer(output / "seconds.json")
    data = timer.run(
        "read the data",
        lambda: prepare(
            output / "data",
            train_sentences=settings.train_sentences,
            corpus_sentences=min(settings.general_steps * settings.general_batch, 100_000),
        ),
        always=True,
    )
    task = Task.of(load_examples(data.train))
    common: dict[str, Any] = {"batch_size": settings.batch_size, "max_length": settings.max_length}

    def phase(name: str, run: Callable[..., dict], *inputs: Any, **options: Any) -> Path:
        folder = output / name
        history = _History(output / "logs" / f"{name.replace('/', '-')}.json")
        history.path.parent.mkdir(parents=True, exist_ok=True)
        timer.run(
            name,
            lambda: run(*inputs, folder, callbacks=[history], resume=True, **options),
        )
        return folder

    teacher = phase(
        "teacher", finetune, data.teacher, data.train, data.dev,
        epochs=settings.teacher_epochs, lr=settings.teacher_lr, **common,
    )  # fmt: skip
    general = phase(
        "general-student", distill_general, data.teacher, STUDENT, data.corpus, init="pca",
        matches=MATCHES, steps=settings.general_steps, lr=settings.general_lr,
        batch_size=settings.general_batch, max_length=settings.max_length,
    )  # fmt: skip
    rows: dict[str, list[Path]] = {"teacher": [teacher], "distilled student": []}
    rows["student without a teacher"] = []
    plain_lr = settings.plain_lrs[0]
    for seed in seeds:
        rows["distilled student"].append(
            phase(
                f"distilled-student/seed-{seed}",
                distill_task,
                teacher,
                general,
                data.train,
                data.dev,
                matches=MATCHES,
                seed=seed,
                intermediate_epochs=settings.intermediate_epochs,
                intermediate_lr=settings.intermediate_lr,
                prediction_epochs=settings.prediction_epochs,
                prediction_lr=settings.prediction_lr,
                **common,
            )
        )
        start = _new_student(output / "starts" / f"random-{seed}", teacher, task, seed, "random")
        tried = {
            lr: phase(
                f"student-without-teacher/seed-{seed}-lr-{lr:g}",
                finetune,
                start,
                data.train,
                data.dev,
                epochs=settings.plain_epochs,
                lr=lr,
                seed=seed,
                **common,
            )
            for lr in (settings.plain_lrs if seed == seeds[0] else (plain_lr,))
        }
        if seed == seeds[0]:
            plain_lr = max(tried, key=lambda lr: _dev_accuracy(tried[lr]))
        rows["student without a teacher"].append(tried[plain_lr])
        if settings.pca_alone:
            start = _new_student(output / "starts" / f"pca-{seed}", teacher, task, seed, "pca")
            rows.setdefault("the same from the PCA start", []).append(
                phase(
                    f"pca-without-teacher/seed-{seed}",
                    finetune,
                    start,
                    data.train,
                    data.dev,
                    epochs=settings.plain_epochs,
                    lr=plain_lr,
                    seed=seed,
                    **common,
                )
            )
    result = _result(rows, data, settings, timer, plain_lr, seeds)
    _write(output, result)
    return result


def _new_student(folder: Path, teacher: Path, task: Task, seed: int, how: Any) -> Path:
    """A student that has learnt nothing, saved so that fine-tuning can start from it."""
    if (folder / "config.json").is_file():
        return folder
    set_seed(seed)
    config = Student.of(STUDENT, load_config(teacher)).config
    for name, value in task.config_fields().items():
        setattr(config, name, value)
    model = BertForSequenceClassification(config)
    initialise_student(model, load_classifier(teacher), how, matches=LayerMatches.parse(MATCHES))
    part = folder.with_name(folder.name + ".part")
    model.save_pretrained(part)
    load_tokenizer(teacher).save_pretrained(part)
    part.rename(folder)
    return folder


def _dev_accuracy(folder: Path) -> float:
    return json.loads((folder / "metrics.json").read_text())["dev"]["accuracy"]


class _Timer:
    """Seconds of each phase, kept in a file: a phase that was run before keeps its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        if path.is_file():
            self.seconds = json.loads(path.read_text())

    def run(self, name: str, work: Callable[[], Any], *, always: bool = False) -> Any:
        """``work()``, its time added to what interrupted runs of the phase took."""
        known = name in self.seconds and not always
        console.print(f"[bold]{name}[/bold]" + (" (done before)" if known else ""))
        start = time.perf_counter()
        outcome = work()
        if not known:
            self.seconds[name] = time.perf_counter() - start
            self.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.path, json.dumps(self.seconds, indent=2))
        return outcome


def _result(
    rows: dict[str, list[Path]],
    data: DemoData,
    settings: DemoSettings,
    timer: _Timer,
    plain_lr: float,
    seeds: list[int],
) -> dict[str, Any]:
    models = []
    for name, folders in rows.items():
        scores = [
            evaluate(
                f, data.test, batch_size=SPEED_BATCH, max_length=settings.max_length, progress=False
            )
            for f in folders
        ]
        accuracies = [s["accuracy"] for s in scores]
        weights = load_classifier(folders[0])
        models.append(
            {
                "model": name,
                "parameters": sum(p.numel() for p in weights.parameters()),
                "accuracy": statistics.mean(accuracies),
                "accuracies": accuracies,
                "sentences_per_second": statistics.median(s["examples_per_second"] for s in scores),
                "folders": [str(f) for f in folders],
            }
        )
    by_name = {m["model"]: m["accuracy"] for m in models}
    gap = by_name["teacher"] - by_name["student without a teacher"]
    won = by_name["distilled student"] - by_name["student without a teacher"]
    count = scores[0]["examples"]
    return {
        "models": models,
        "gap_won_back": won / gap if gap > 0 else math.nan,
        "held_out_sentences": count,
        "standard_error": math.sqrt(0.85 * 0.15 / count),
        "learning_rate_without_teacher": plain_lr,
        "seeds": seeds,
        "settings": asdict(settings),
        "seconds": timer.seconds,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def _write(output: Path, result: dict[str, Any]) -> None:
    """demo.json, report.md, losses.png; the table on the terminal."""
    header = ("model", "parameters", "held-out accuracy", "sentences/s")
    rows = [
        (
            m["model"], f"{m['parameters'] / 1e6:.1f} M", _accuracy(m["accuracies"]),
            f"{m['sentences_per_second']:,.0f}",
        )
        for m in result["models"]
    ]  # fmt: skip
    shown = Table(*header, title="MR, film review sentences", title_justify="left")
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    notes = (
        f"Gap between the student without a teacher and the teacher won back: "
        f"{100 * result['gap_won_back']:.0f} % ({result['held_out_sentences']} held-out sentences; "
        f"one standard error is {100 * result['standard_error']:.1f} points)."
    )
    console.print(notes)
    console.print(f"files: {output}", highlight=False)
    panels = {}
    for path in sorted((output / "logs").glob("*.json")):
        losses = panels_of(json.loads(path.read_text())).get("training loss")
        if losses:
            panels[path.stem] = losses
    picture = plot(panels)
    if picture is not None:
        atomic_write(output / "losses.png", picture)
    seconds = table(("phase", "seconds"), [(n, round(s)) for n, s in result["seconds"].items()])
    report = (
        f"# Demo: distilling TinyBERT-4L-312\n\n{table(header, rows)}\n\n{notes}\n\n"
        f"{result['threads']} threads, {result['cpu']}, torch {result['torch']}, seeds "
        f"{result['seeds']}.\n\n## Time\n\n{seconds}\n\n![training losses](losses.png)\n"
    )
    atomic_write(output / "report.md", report)
    atomic_write(output / "demo.json", json.dumps(result, indent=2))


def _accuracy(accuracies: list[float]) -> str:
    mean = f"{100 * statistics.mean(accuracies):.1f} %"
    if len(accuracies) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(accuracies):.1f} ({len(accuracies)} seeds)"
