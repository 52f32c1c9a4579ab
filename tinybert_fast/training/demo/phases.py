"""The demo's phases, each in a folder of its own that is skipped once it is complete.

data      train, dev and held-out sentences, unlabelled sentences     data/
teacher   MiniLM fine-tuned on the task                               teacher/
general   PCA start, then general distillation                        general/
student   task distillation, for each seed                            student/seed-N/
          both once more for --loss minilm                            general-minilm/, ...
alone     the same student without a teacher, for each seed           alone/...
score     held-out accuracy and speed of all of them                  demo.json, report.md, plot
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from tinybert_fast.data import load_examples
from tinybert_fast.data.atomic import atomic_write
from tinybert_fast.data.lines import Lines
from tinybert_fast.training.demo import scores, texts
from tinybert_fast.training.demo.settings import DemoSettings, folder_of
from tinybert_fast.training.finetune import finetune
from tinybert_fast.training.initialise import How
from tinybert_fast.training.loading import load_config, load_encoder, load_tokenizer
from tinybert_fast.training.objectives import LOSSES, matches_for
from tinybert_fast.training.recipes import distill_general, distill_task
from tinybert_fast.training.run_folder import (
    METRICS,
    RUN,
    RunFolder,
    examples_digest,
    weights_digest,
)
from tinybert_fast.training.students import Student

log = logging.getLogger(__name__)

PHASES = ("data", "teacher", "general", "student", "alone", "score")
TIMES = "times.json"
MADE_FROM = {  # key of a run's settings -> what it is a hash of
    "corpus": "the unlabelled sentences",
    "train": "the training sentences",
    "augmented": "the unlabelled sentences",
    "teacher_weights": "the teacher",
    "student_weights": "the generally distilled student",
}


def run_demo(
    settings: DemoSettings,
    output: str | Path,
    *,
    only: Sequence[str] = (),
    overwrite: bool = False,
    progress: bool = True,
    say: Callable[[str], None] = log.info,
    machine: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Runs the phases in order (or `only` some) and returns the result, None without `score`.

    What is complete in `output` is kept and what was interrupted goes on, unless `overwrite`; what
    was made from a model or texts that have changed since is made anew. `say` gets one line at the
    start of each phase; `machine` is noted in the result.
    """
    unknown = set(only) - set(PHASES)
    if unknown:
        raise ValueError(
            f"no phase {', '.join(sorted(unknown))}; the phases are {', '.join(PHASES)}"
        )
    for name in ("seeds", "threads"):
        if getattr(settings, name) < 1:
            raise ValueError(f"{name} is {getattr(settings, name)}; expected 1 or more")
    if not settings.losses or not set(settings.losses) <= set(LOSSES):
        raise ValueError(
            f"losses are {', '.join(settings.losses) or 'none'}; expected some of "
            f"{', '.join(LOSSES)}"
        )
    texts.teacher_folder()  # before anything is written
    texts.reviews_file()
    demo = Demo(settings, Path(output).resolve(), overwrite, progress, say, machine or {})
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        result = None
        for name in only or PHASES:
            result = getattr(demo, name)()
    finally:
        torch.set_num_threads(before)
    return result


@dataclass(frozen=True)
class Alone:
    """One student that is trained without a teacher."""

    init: How
    seed: int
    lr: float

    @property
    def name(self) -> str:
        return f"{self.init}-seed-{self.seed}-lr-{self.lr:g}"


@dataclass
class Demo:
    settings: DemoSettings
    path: Path
    overwrite: bool
    progress: bool
    say: Callable[[str], None]
    machine: Mapping[str, Any]

    # ---- phases ---------------------------------------------------------------------------------

    def data(self) -> None:
        if (self.path / "data" / "sizes.json").exists() and not self.overwrite:
            self._check_data_settings()
            self.say("data: done before")
            return
        self.say("data: splitting labelled sentences and reviews")
        with self._timed("data"):
            (self.path / "data" / "sizes.json").unlink(missing_ok=True)  # the last to be written
            settings = json.dumps(self._data_settings(), indent=2)
            atomic_write(self.path / "data" / "settings.json", settings + "\n")
            texts.write_texts(self.path / "data", self.settings)

    def teacher(self) -> None:
        s, sizes = self.settings, self.sizes
        self._phase(
            "teacher",
            f"fine-tuning MiniLM on {sizes['train']:,} sentences, {s.teacher_epochs:g} epochs",
            lambda common: finetune(
                texts.teacher_folder(),
                self.path / "data/train.csv",
                self.path / "data/dev.csv",
                epochs=s.teacher_epochs,
                lr=s.teacher_lr,
                **self._task_options(),
                **common,
            ),
        )

    def general(self) -> None:
        s, sizes = self.settings, self.sizes
        for loss in s.losses:
            self._phase(
                folder_of("general", loss),
                f"{sizes['sentences']:,} unlabelled sentences, {s.general_steps:,} steps of "
                f"{s.general_batch_size}",
                partial(self._distil_general, loss),
            )

    def _distil_general(self, loss: str, common: dict[str, Any]) -> dict[str, Any]:
        s = self.settings
        return distill_general(
            texts.teacher_folder(),
            s.student,
            self.path / "data/sentences.txt",
            init="pca",
            steps=s.general_steps,
            batch_size=s.general_batch_size,
            lr=s.rates(loss)[0],
            max_length=s.max_length,
            bf16=s.bf16,
            **s.objective(loss),
            **common,
        )

    def student(self) -> None:
        s = self.settings
        self._need("teacher", *self._generals())
        for loss in s.losses:
            for seed, folder in enumerate(self._students(loss)):
                self._phase(
                    folder,
                    f"{self.sizes['augmented']:,} sentences, {s.intermediate_epochs:g} + "
                    f"{s.prediction_epochs:g} epochs",
                    partial(self._distil_task, loss, seed),
                )

    def _distil_task(self, loss: str, seed: int, common: dict[str, Any]) -> dict[str, Any]:
        s = self.settings
        return distill_task(
            self.path / "teacher",
            self.path / folder_of("general", loss),
            self.path / "data/train.csv",
            self.path / "data/dev.csv",
            augmented=self.path / "data/augmented.csv",
            intermediate_epochs=s.intermediate_epochs,
            intermediate_lr=s.rates(loss)[1],
            intermediate_schedule=s.intermediate_schedule,
            prediction_epochs=s.prediction_epochs,
            prediction_lr=s.prediction_lr,
            eval_steps=s.eval_steps,
            select_by=s.select_students_by,
            seed=seed,
            **s.objective(loss),
            **self._task_options(),
            **common,
        )

    def _generals(self) -> list[str]:
        return [folder_of("general", loss) for loss in self.settings.losses]

    def _students(self, loss: str) -> list[str]:
        return [f"{folder_of('student', loss)}/seed-{at}" for at in range(self.settings.seeds)]

    def alone(self) -> None:
        for lr in self.settings.alone_lrs:
            self._train_alone(Alone("random", 0, lr))
        for run in self.chosen_alone():
            self._train_alone(run)

    def score(self) -> dict[str, Any]:
        s = self.settings
        students = {folder_of("student", loss): self._students(loss) for loss in s.losses}
        self._need("teacher", *self._generals(), *chain(*students.values()))
        self._need(*(f"alone/{Alone('random', 0, lr).name}" for lr in s.alone_lrs))
        chosen = self.chosen_alone()
        self._need(*(f"alone/{run.name}" for run in chosen))
        # Complete, as all are: each compares its settings with today's, and returns.
        same = replace(self, overwrite=False, say=lambda line: None)
        for phase in (same.teacher, same.general, same.student, same.alone):
            phase()
        self.say("score: held-out accuracy and speed")
        groups = {"teacher": ["teacher"], **students}
        for run in chosen:
            groups.setdefault(f"alone-{run.init}", []).append(f"alone/{run.name}")
        with self._timed("score"):
            models = scores.measure(self.path, groups, s)
        return scores.write(
            self.path,
            s,
            models,
            sizes=self.sizes,
            times=self._read(TIMES),
            lr=chosen[0].lr,
            machine=self.machine,
        )

    # ---- students without a teacher -------------------------------------------------------------

    def chosen_alone(self) -> list[Alone]:
        """For each start and seed the run at the learning rate that was best on dev in seed 0."""
        tried = {
            lr: self._dev(f"alone/{Alone('random', 0, lr).name}") for lr in self.settings.alone_lrs
        }
        lr = max(tried, key=lambda rate: tried[rate])
        inits: tuple[How, ...] = ("random", "pca") if self.settings.pca_alone else ("random",)
        return [Alone(i, seed, lr) for i in inits for seed in range(self.settings.seeds)]

    def _train_alone(self, run: Alone) -> None:
        s = self.settings
        self._phase(
            f"alone/{run.name}",
            f"{run.init} start, no teacher, {s.alone_epochs:g} epochs at {run.lr:g}",
            lambda common: finetune(
                self._start(run),
                self.path / "data/train.csv",
                self.path / "data/dev.csv",
                epochs=s.alone_epochs,
                lr=run.lr,
                seed=run.seed,
                **self._task_options(),
                **common,
            ),
        )

    def _start(self, run: Alone) -> Path:
        """A student nobody has trained yet, saved for `finetune` to start from."""
        folder = RunFolder(
            self.path / "alone" / "starts" / f"{run.init}-seed-{run.seed}", overwrite=True
        )
        if (folder.path / "config.json").exists() and not self.overwrite:
            return folder.path
        teacher = texts.teacher_folder()
        config = load_config(teacher)
        student = Student.of(self.settings.student, config)
        matches = matches_for(self.settings.matches, student.config, config)
        model, _ = student.build(load_encoder(teacher), matches, init=run.init, seed=run.seed)
        folder.save_model(model, load_tokenizer(teacher))
        return folder.path

    # ---- bookkeeping ----------------------------------------------------------------------------

    @property
    def sizes(self) -> dict[str, int]:
        if not (self.path / "data" / "sizes.json").exists():
            raise FileNotFoundError(f"{self.path} has no data yet; run the phase data first")
        self._check_data_settings()
        return self._read("data/sizes.json")

    def _phase(self, name: str, what: str, train: Callable[[dict], Any]) -> None:
        """One training run in the folder `name`: skipped if complete, resumed if interrupted, and
        begun again if what it was made from is another now.
        """
        changed = None if self.overwrite else self._changed(name)
        again = self.overwrite or changed is not None
        done = self._finished(name) and not again
        if changed:
            what = f"{changed} changed since, so again: {what}"
        self.say(f"{name}: {'done before' if done else what}")
        common = {
            "output": self.path / name,
            "overwrite": again,
            "resume": not again,
            "progress": self.progress,
            "callbacks": [KeepHistory(self.path / name)],
        }
        if done:
            train(common)  # compares the settings and returns at once
            return
        with self._timed(name, resumed=not again and (self.path / name / RUN).exists()):
            train(common)

    def _task_options(self) -> dict[str, Any]:
        s = self.settings
        return {"batch_size": s.batch_size, "max_length": s.max_length, "bf16": s.bf16}

    def _data_settings(self) -> dict[str, Any]:
        s = self.settings
        return {
            "sentences": s.general_steps * s.general_batch_size,
            "augmented_sentences": s.augmented_sentences,
            "rows": s.rows,
        }

    def _check_data_settings(self) -> None:
        if self._read("data/settings.json") != self._data_settings():
            raise FileExistsError(
                f"{self.path} holds a demo with other settings; choose another --output, or start "
                "again (--overwrite)"
            )

    def _finished(self, name: str) -> bool:
        return (self.path / name / RUN).exists() and bool(
            self._read(f"{name}/{RUN}").get("finished")
        )

    def _changed(self, name: str) -> str | None:
        """What the run in the folder `name` was made from and is another now, told by its hash."""
        made_from = self._read(f"{name}/{RUN}").get("settings")
        if made_from is None:
            return None
        place, data = name.split("/")[0], self.path / "data"
        now: dict[str, str | None] = {}
        if place.startswith("general"):
            now["corpus"] = Lines.of(data / "sentences.txt").survey()[1]
        else:
            learns = load_examples(data / "train.csv", labelled=not place.startswith("student"))
            now["train"] = examples_digest(learns)
        if place.startswith("student"):
            augmented = load_examples(data / "augmented.csv", labelled=False)
            now["augmented"] = examples_digest(augmented)
            now["teacher_weights"] = weights_digest(self.path / "teacher")
            now["student_weights"] = weights_digest(self.path / place.replace("student", "general"))
        different = (key for key in now if key in made_from and made_from[key] != now[key])
        return MADE_FROM.get(next(different, ""))

    def _need(self, *names: str) -> None:
        for name in names:
            phase = name.split("/")[0].partition("-")[0]
            if not self._finished(name):
                raise FileNotFoundError(
                    f"{self.path / name} is not complete; run the phase {phase} first"
                )
            changed = self._changed(name)
            if changed:
                raise ValueError(
                    f"{changed} changed since {self.path / name} was made; run the phase {phase} "
                    "again"
                )

    def _dev(self, name: str) -> float:
        self._need(name)
        return self._read(f"{name}/{METRICS}")["dev"]["accuracy"]

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    @contextmanager
    def _timed(self, name: str, resumed: bool = False) -> Iterator[None]:
        """Keeps the seconds of this phase, those before an interruption included."""
        start = time.perf_counter()
        try:
            yield
        finally:
            times = self._read(TIMES)
            before = times.get(name, 0.0) if resumed else 0.0
            times[name] = round(before + time.perf_counter() - start, 1)
            atomic_write(self.path / TIMES, json.dumps(times, indent=2) + "\n")


class KeepHistory(TrainerCallback):
    """Keeps what a stage logged in history-<stage>.json, for the plot."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_end(self, args, state, control, **kwargs):
        file = self.folder / f"history-{Path(args.output_dir).name}.json"
        atomic_write(file, json.dumps(state.log_history) + "\n")
