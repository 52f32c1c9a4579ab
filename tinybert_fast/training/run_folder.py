"""The output folder of a training run: what may be written there, and how a run is found again.

    config.json, model.safetensors, tokenizer files     the model, a plain Transformers folder
    projection.safetensors  intermediate/               of distillation
    metrics.json  report.md  curves.png
    run.json                                            settings, and what the run has finished
    checkpoints/<stage>/checkpoint-N                    removed at the end unless asked for
    logs/<stage>/                                       TensorBoard
    data/                                               of pre-training: tokenizer and shards, kept

A file is written under another name first and then renamed; config.json comes last, so a folder
that holds one holds a whole model. Under torchrun rank 0 alone writes.
"""

import fnmatch
import hashlib
import json
import logging
import math
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from tinybert_fast.data.atomic import atomic_write, partial_of
from tinybert_fast.training.loading import quiet
from tinybert_fast.training.projection import FILE_NAME as PROJECTION
from tinybert_fast.training.projection import HiddenProjection
from tinybert_fast.training.report import Panels, plot

log = logging.getLogger(__name__)

RUN = "run.json"
METRICS = "metrics.json"
REPORT = "report.md"
CURVES = "curves.png"
INTERMEDIATE: Final = "intermediate"  # the student of the first stage of task distillation
FOLDERS = ("checkpoints", "logs", INTERMEDIATE)
FILES = (METRICS, REPORT, CURVES)
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
HASH_BYTES = 1 << 20  # of a file read at a time
# Settings that share the examples of a step out, of which their product alone decides the weights.
SHARING = ("processes", "batch_size", "accumulation")
LAST_FILE = "trainer_state.json"  # that Trainer writes of a checkpoint
CHECKPOINT_FILES = {  # name -> pattern: sharded weights number theirs
    LAST_FILE: LAST_FILE,
    "model.safetensors": "model*.safetensors",
    "optimizer.pt": "optimizer.*",  # FSDP's is .bin
    "scheduler.pt": "scheduler.pt",
}


class RunFolder:
    """Opens `path` for a run. Only checks; nothing is created or removed before `begin`.

    Raises FileExistsError if a model or an unfinished run is there and neither `overwrite` nor
    `resume` says what to do with it. `resume` on an untouched folder starts from the beginning.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False, resume: bool = False):
        if overwrite and resume:
            raise ValueError("overwrite and resume exclude each other: start again, or go on?")
        self.path = Path(
            path
        ).resolve()  # checkpoints remember their folder, whatever the working directory
        self.main = int(os.environ.get("RANK", "0")) == 0
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"{path} is a file; expected a folder to write the model to")
        there = (self.path / RUN).exists() and not overwrite
        self._run = _read_json(self.path / RUN) if there else None
        self.resuming = resume and self._run is not None
        if self.main and not overwrite and not self.resuming:
            self._refuse(resume)

    def _refuse(self, resume: bool) -> None:
        if (self.path / "config.json").exists():
            then = (
                "that this program did not train, so there is nothing to resume" if resume else ""
            )
            raise FileExistsError(
                f"{self.path} already holds a model{' ' + then if then else ''}; "
                "choose another folder, or overwrite it (--overwrite)"
            )
        if self._run is not None:
            raise FileExistsError(
                f"{self.path} holds an unfinished run; go on with it (--resume) "
                "or start again (--overwrite)"
            )
        others = [name for name in (*FOLDERS, *FILES) if (self.path / name).exists()]
        if others:
            raise FileExistsError(
                f"{self.path} holds {', '.join(others)}, which no run left there; "
                "choose another folder, or let them be replaced (--overwrite)"
            )

    # ---- the run ---------------------------------------------------------------------------------

    def finished(self, settings: Mapping[str, Any]) -> bool:
        """True when a resumed run has nothing left to do: its answer is `metrics()`.

        `settings`: what decides the weights; JSON values. Raises ValueError if the run was begun
        with others, but for SHARING, or if its processes do not `agree`: call it after
        TrainingArguments, which start torchrun's group.
        """
        agree(settings)
        if self.resuming:
            self._compare(_as_json(settings))
        return self.resuming and bool(self.recorded("finished"))

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Creates the folder, or goes on in it: see `finished`.

        Call it when every input has been read: nothing is left behind by a bad one.
        """
        processes = settings.get("processes", 1)
        if self.resuming:
            self._compare(_as_json(settings))
            self._go_on_as(settings)
            known = {*self.recorded("processes", [processes]), processes}
            self.record(settings=_as_json(settings), processes=sorted(known))
        else:
            self._run = {
                "settings": _as_json(settings), "processes": [processes], "finished": False
            }  # fmt: skip
            if self.main:
                self.path.mkdir(parents=True, exist_ok=True)
                for name in FOLDERS:
                    shutil.rmtree(self.path / name, ignore_errors=True)
                for name in FILES:
                    (self.path / name).unlink(missing_ok=True)
            self._write_run()
        _barrier()

    def _go_on_as(self, settings: Mapping[str, Any]) -> None:
        """Says that a step's examples are shared out in another way than they were."""
        then, now = (
            " x ".join(f"{one.get(name, 1)} {name}" for name in SHARING)
            for one in (self.recorded("settings", {}), settings)
        )
        if then != now and self.main:
            log.warning("going on with %s, after %s: the same steps, other dropout", now, then)

    def _compare(self, settings: dict) -> None:
        old, settings = _decisive(self.recorded("settings", {})), _decisive(settings)
        changed = [
            f"{name} was {old.get(name)!r}, now {settings.get(name)!r}"
            for name in {**old, **settings}
            if old.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"the run in {self.path} was begun with other settings ({'; '.join(changed)}); "
                "resume with the same ones, or start again (--overwrite)"
            )

    def record(self, **values: Any) -> None:
        """Keeps small facts (JSON values) in run.json, for `recorded` after a restart."""
        if self._run is None:
            raise RuntimeError("record before begin")
        self._run.update(values)
        self._write_run()

    def recorded(self, name: str, default: Any = None) -> Any:
        return (self._run or {}).get(name, default)

    def recorded_by_resumed(self, name: str) -> Any:
        """What a run that this one goes on with had recorded; None for a new one."""
        return self.recorded(name) if self.resuming else None

    def _write_run(self) -> None:
        if self.main:
            atomic_write(self.path / RUN, json.dumps(self._run, indent=2))

    def finish(self, keep_checkpoints: bool = False) -> None:
        """Marks the run as complete and removes its checkpoints."""
        _barrier()
        self.record(finished=True)
        if self.main and not keep_checkpoints:
            shutil.rmtree(self.path / "checkpoints", ignore_errors=True)

    # ---- checkpoints -----------------------------------------------------------------------------

    def checkpoints(self, stage: str = "train") -> Path:
        return self.path / "checkpoints" / stage

    def logs(self, stage: str = "train") -> Path:
        return self.path / "logs" / stage

    def last_checkpoint(self, stage: str = "train") -> str | None:
        """Where a resumed stage goes on, checked file by file; None: from the beginning."""
        found = checkpoints_in(self.checkpoints(stage)) if self.resuming else []
        while found and not (found[-1] / LAST_FILE).exists():
            log.warning("%s was not finished: going on from the one before", found.pop())
        if not found:
            return None
        before = f"resume from {found[-2].name}" if len(found) > 1 else "start from the beginning"
        processes = self.recorded("processes", [1])
        check_checkpoint(found[-1], processes, f"delete the folder {found[-1]} to {before}")
        return str(found[-1])

    # ---- results ---------------------------------------------------------------------------------

    def save_model(
        self,
        model,
        tokenizer=None,
        name: str | None = None,
        projection: HiddenProjection | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> Path:
        """All of them into the folder (or its sub-folder `name`), by rename. What is replaced loses
        its config.json first, so that old and new files together are never taken for a model.
        `state` stands for the model's own weights.
        """
        target = self.path if name is None else self.path / name
        if self.main:
            target.mkdir(parents=True, exist_ok=True)
            partial = partial_of(target / "model")
            more = {} if state is None else {"state_dict": state}
            try:
                with quiet():
                    model.save_pretrained(partial, **more)
                    if tokenizer is not None:
                        tokenizer.save_pretrained(partial)
                if projection is not None:
                    projection.save(partial)
                for old in ("config.json", PROJECTION):
                    (target / old).unlink(missing_ok=True)
                for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
                    os.replace(file, target / file.name)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        _barrier()
        return target

    def write_metrics(self, metrics: Mapping[str, Any]) -> None:
        if self.main:
            atomic_write(self.path / METRICS, json.dumps(metrics, indent=2) + "\n")

    def metrics(self) -> dict[str, Any]:
        return _read_json(self.path / METRICS)

    def write_report(self, title: str, sections: Mapping[str, str], panels: Panels) -> None:
        """report.md (a heading and Markdown per section) and curves.png beside it."""
        if not self.main:
            return
        parts = [f"# {title}", *(f"## {heading}\n\n{body}" for heading, body in sections.items())]
        picture = plot(panels)
        if picture is not None:
            atomic_write(self.path / CURVES, picture)
            parts.append(f"## Curves\n\n![curves]({CURVES})")
        atomic_write(self.path / REPORT, "\n\n".join(parts) + "\n")


def checkpoints_in(folder: Path) -> list[Path]:
    """checkpoint-N folders, oldest step first."""
    found = [p for p in folder.glob("checkpoint-*") if p.is_dir() and p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]))


def check_checkpoint(folder: Path, processes: Sequence[int], remedy: str) -> None:
    """Raises ValueError that names the first missing, truncated or damaged file of a checkpoint
    that a Trainer wrote, as one of so many ``processes``.
    """
    present = sorted(file for file in folder.iterdir() if file.is_file())
    names = {file.name for file in present}
    each = [
        [f"rng_state_{rank}.pth" for rank in range(n)] if n > 1 else ["rng_state.pth"]
        for n in processes
    ]
    own = next((files for files in each if names.issuperset(files)), each[0])
    for name, pattern in {**CHECKPOINT_FILES, **dict(zip(own, own))}.items():
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"{folder / name} is missing: the run was stopped while it wrote this "
                f"checkpoint; {remedy}"
            )
    for file in present:
        fault = _fault(file)
        if fault:
            raise ValueError(f"{file} is truncated or damaged ({fault}); {remedy}")


def _fault(file: Path) -> str | None:
    """What is wrong with the file, as far as its format can tell (zip archives carry checksums)."""
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(file, framework="pt"):
                return None
        except SafetensorError as error:
            return str(error)
    if file.suffix in (".pt", ".pth", ".bin"):
        try:
            with zipfile.ZipFile(file) as archive:
                bad = archive.testzip()
            return f"checksum of {bad}" if bad else None
        except zipfile.BadZipFile as error:
            return str(error)
    if file.suffix == ".json":
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            return str(error)
    return None


def examples_digest(examples) -> str:
    """Short hash of a dataset's texts and labels: tells a resumed run that its data is the same."""
    digest = hashlib.sha256()
    for column in sorted(examples.column_names):
        digest.update(column.encode())
        for value in examples[column]:
            digest.update(repr(value).encode())
    return digest.hexdigest()[:16]


def weights_digest(model: str | Path) -> str | None:
    """Short hash of a model folder's weights, its projection included: tells a resumed run that it
    starts from the same ones. None for a name of the hub.
    """
    digest = hashlib.sha256()
    files = {file for pattern in WEIGHTS for file in Path(model).glob(pattern)}
    for path in sorted(files):
        with path.open("rb") as file:
            while block := file.read(HASH_BYTES):
                digest.update(block)
    return digest.hexdigest()[:16] if files else None


def agree(facts: Mapping[str, Any]) -> None:
    """ValueError on every process of a run if one has other facts (JSON values) than process 0.

    They would average gradients of different things, or wait for each other's steps.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, _as_json(facts))
    first = everyone[0]
    for rank, other in enumerate(everyone):
        changed = [name for name in {**first, **other} if first.get(name) != other.get(name)]
        if changed:
            name = changed[0]
            raise ValueError(
                f"the processes of this run disagree ({name} is {first.get(name)!r} in process 0, "
                f"{other.get(name)!r} in process {rank}); give all of them the same files and "
                "options"
            )


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """With the examples of a step in the place of how they are shared out."""
    found = {name: value for name, value in settings.items() if name not in SHARING}
    return {**found, "examples of a step": math.prod(settings.get(name, 1) for name in SHARING)}


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they are read back: tuples become lists."""
    return json.loads(json.dumps(settings))


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); start again (--overwrite)") from None


def _barrier() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
