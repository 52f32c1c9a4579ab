"""What general and task distillation have in common: set-up of a run, and its report."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import BertConfig

from tinybert_fast import integrations
from tinybert_fast.data import LengthCollator, usable_length
from tinybert_fast.data.shards import fingerprint
from tinybert_fast.modules.capture import Capture
from tinybert_fast.training.callbacks import KeepSeconds
from tinybert_fast.training.common import RunTrainer
from tinybert_fast.training.distill import DistillationTrainer, Stage
from tinybert_fast.training.initialise import How
from tinybert_fast.training.lessons import LessonCache, check_cache_dtype
from tinybert_fast.training.losses import PARITIES, Parity
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.report import Panels, panels_of, table
from tinybert_fast.training.run_folder import RunFolder, weights_digest
from tinybert_fast.training.students import Student
from tinybert_fast.training.teacher import Teacher, TeacherDtype, check_teacher_dtype


def check_parity(parity: str) -> None:
    if parity not in PARITIES:
        raise ValueError(f"parity is {parity!r}; expected one of {', '.join(PARITIES)}")


def check_batches(examples: int, batch_size: int, parity: Parity) -> None:
    if parity == "official" and examples < batch_size:
        raise ValueError(
            f"parity='official' drops the last incomplete batch, and {examples} texts do not fill "
            f"one of {batch_size}; choose a smaller batch_size"
        )


def usable(max_length: int, *configs: BertConfig) -> int:
    for config in configs:
        max_length = usable_length(max_length, config)
    return max_length


def prepare(model: Any, *, parity: Parity, accelerate: bool, impl: str) -> Any:
    """On packed rows, unless the run follows the official code."""
    if accelerate and parity != "official":
        integrations.accelerate(model, impl=impl)
    return model


def more_arguments(parity: Parity, stage: Stage) -> dict[str, Any]:
    """What the stage and the official code ask of TrainingArguments."""
    more: dict[str, Any] = {}
    if stage == "intermediate":
        more["ddp_find_unused_parameters"] = True  # pooler and heads get no gradient
    if parity == "official":
        more.update(
            dataloader_drop_last=True,
            train_sampling_strategy="random",
            max_grad_norm=0.0,  # BertAdam clips each parameter by itself
        )
    return more


def collator_for(tokenizer: Any, parity: Parity, max_length: int) -> LengthCollator:
    """The official code pads everything to the longest length allowed."""
    if parity == "official":
        return LengthCollator(tokenizer, pad_to_multiple_of=max_length)
    return LengthCollator(tokenizer, lengths=True)


def student_settings(chosen: Student, init: str | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"student": chosen.name}
    if chosen.folder is None:
        settings["init"] = init or "random"
        settings["student_config"] = chosen.config.to_diff_dict()
    else:
        settings["student_weights"] = weights_digest(chosen.folder)
    return settings


def start_of(run: RunFolder, stage: str, init: How | None) -> How | None:
    """``init``, but where a checkpoint replaces the weights anyway: it may need the teacher's."""
    return init if run.last_checkpoint(stage) is None else None


@dataclass(frozen=True)
class Teaching:
    """How a run learns from its teacher: asked in each epoch, or once, its lessons kept in
    ``cache`` (one sub-folder a stage) in ``cache_dtype``.
    """

    teacher: Teacher
    run: RunFolder
    cache: Path | None
    cache_dtype: str | None
    made_from: Mapping[str, Any]  # what the lessons of every stage depend on
    compare: bool  # with the teacher in fp32, on the first batch

    @classmethod
    def of(
        cls,
        teacher: Teacher,
        where: str | Path,
        run: RunFolder,
        tokenizer: Any,
        max_length: int,
        *,
        cache_teacher: bool | str | Path,
        cache_dtype: str | None,
        compare: bool,
    ) -> "Teaching":
        """``cache_teacher``: True for a folder inside the run's, which goes with its checkpoints,
        or one that stays.
        """
        volatile = ("_name_or_path", "transformers_version", "architectures", "dtype")
        config = {k: v for k, v in teacher.config.to_diff_dict().items() if k not in volatile}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
        made_from = {
            "teacher": weights_digest(where) or str(where),
            "teacher_config": digest,
            "teacher_dtype": teacher.dtype,
            "cache_dtype": cache_dtype,
            "tokenizer": fingerprint(tokenizer),
            "max_length": max_length,
        }
        folder = run.checkpoints("lessons") if cache_teacher is True else cache_teacher
        cache = Path(folder) if folder else None
        compare = compare or cache_dtype is not None
        return cls(teacher, run, cache, cache_dtype, made_from, compare)

    def trainer(
        self,
        student: Any,
        name: str,
        examples: Dataset,
        digest: str,
        *,
        stage: Stage,
        matches: LayerMatches | None,
        progress: bool,
        **options: Any,
    ) -> DistillationTrainer:
        """Of one stage, called ``name``. With a cache, its lessons are made first if they are not
        there, and the teacher leaves memory.
        """
        lessons, states = None, None
        if stage == "intermediate":
            assert matches is not None
            states = _asked_for(matches.teacher_capture())
        made_from = {**self.made_from, "examples": digest, "states": states or "logits"}
        folder = None if self.cache is None else self.cache / name
        if folder is not None:
            examples = examples.add_column("index", np.arange(len(examples)))
            lessons = LessonCache.found(folder, made_from)
        live = lessons is None
        trainer = DistillationTrainer(
            student,
            self.teacher.asked if live else self.teacher.config,
            stage=stage,
            matches=matches,
            teacher_dtype=self.teacher.dtype,
            lessons=lessons,
            train_dataset=examples,
            progress=progress,
            **options,
        )
        if live and folder is not None:
            with trainer.args.main_process_first(local=False):
                trainer.lessons = LessonCache.found(folder, made_from) or LessonCache.build(
                    folder,
                    trainer.teach_raw,
                    examples,
                    trainer.data_collator,
                    made_from,
                    batch_size=trainer.args.train_batch_size,
                    dtype=self.cache_dtype,
                    progress=progress,
                )
        changes = self.changes()
        if live and self.compare and name not in changes:
            changes[name] = trainer.change_of_terms(self.teacher.exact)
            self.run.record(teacher_change=changes)
        if folder is not None:
            trainer.teacher = None
            self.teacher.forget()
        return trainer

    def changes(self) -> dict[str, dict[str, float]]:
        """{stage: {loss term: relative change by the teacher's dtype and the cache's}}."""
        return dict(self.run.recorded("teacher_change", {}))


def check_teaching(
    parity: Parity,
    teacher_dtype: str | None,
    cache_teacher: bool | str | Path,
    cache_dtype: str | None,
    *,
    bf16: bool,
) -> TeacherDtype:
    """The teacher's dtype: that of the run if none is named."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    check_teacher_dtype(teacher_dtype, device)
    if cache_dtype is not None:
        if not cache_teacher:
            raise ValueError("cache_dtype is for cached lessons; ask for them (cache_teacher)")
        check_cache_dtype(cache_dtype)
    if cache_teacher and parity == "official":
        raise ValueError(
            "parity='official' counts padding, which cached lessons do not hold; leave one of the "
            "two out"
        )
    return teacher_dtype or ("bf16" if bf16 else "fp32")  # type: ignore[return-value]


def _asked_for(capture: Capture) -> dict[str, Any]:
    """What a record is to hold, as JSON."""
    wanted = {f.name: getattr(capture, f.name) for f in fields(capture) if f.init}
    return {k: v if isinstance(v, bool) else sorted(v) for k, v in wanted.items()}


def train(trainer: RunTrainer, run: RunFolder, stage: str = "train") -> dict[str, Any]:
    """Trains a stage, from its last checkpoint on if there is one. {"steps", "train_loss",
    "train_seconds"}: of the whole stage; no loss after a restart, from which Trainer counts anew.
    """
    checkpoint = run.last_checkpoint(stage)
    clock = KeepSeconds(run, stage, resumed=checkpoint is not None)
    trainer.add_callback(clock)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    return {
        "steps": trainer.state.global_step,
        "train_loss": outcome.training_loss if checkpoint is None else None,
        "train_seconds": clock.before + outcome.metrics["train_runtime"],
    }


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- reports -------------------------------------------------------------------------------------


def first_and_last(history: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """{term: {"first": value, "last": value}} of everything logged as a loss."""
    found: dict[str, dict[str, float]] = {}
    for entry in history:
        for name, value in entry.items():
            if name.endswith("loss") and name != "train_loss" and not name.startswith("eval_"):
                found.setdefault(name, {"first": value})["last"] = value
    return found


def loss_panels(history: Iterable[Mapping[str, Any]], stage: str) -> Panels:
    """Attention, hidden-state and total loss apart: their sizes differ a hundredfold."""
    panels: Panels = {}
    for title, curves in panels_of(history).items():
        if title != "training loss":
            panels[f"{stage}: {title}"] = curves
            continue
        for name, curve in curves.items():
            term = name.removesuffix("_loss")
            group = {"loss": "loss", "prediction": "loss"}.get(term, "hidden-state losses")
            group = "attention losses" if term.startswith("attention") else group
            panels.setdefault(f"{stage}: {group}", {})[term] = curve
    return panels


def facts(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        (prefix + name.replace("_", " "), value)
        for name, value in metrics.items()
        if not isinstance(value, dict | list) and value is not None
    ]


def change_tables(changes: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """A section for each stage, if something was rounded."""
    return {
        f"Loss by the teacher's rounding, {stage} stage": table(
            ("term", "relative change, first batch"), terms.items()
        )
        for stage, terms in changes.items()
    }


def loss_table(losses: Mapping[str, Mapping[str, float]]) -> str:
    return table(
        ("term", "first", "last"), [(name, v["first"], v["last"]) for name, v in losses.items()]
    )


def usage(path: Path, cls: str) -> str:
    return (
        f"```python\nfrom transformers import {cls}, AutoTokenizer\n"
        f'model = {cls}.from_pretrained("{path}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{path}")\n```\n\n'
        f"Logs: `tensorboard --logdir {path / 'logs'}`"
    )
