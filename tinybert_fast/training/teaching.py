"""How a distillation recipe comes by its teacher's lessons: live in each epoch, or cached."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from tinybert_fast.data.shards import fingerprint
from tinybert_fast.modules.capture import Capture
from tinybert_fast.training.distill import DistillationTrainer, Stage
from tinybert_fast.training.initialise import How
from tinybert_fast.training.lessons import LessonCache, check_cache_dtype
from tinybert_fast.training.losses import Parity
from tinybert_fast.training.objectives import Matches
from tinybert_fast.training.run_folder import RunFolder, weights_digest
from tinybert_fast.training.teacher import Teacher, TeacherDtype, check_teacher_dtype

log = logging.getLogger(__name__)

TOO_FAST = ("cuda",)  # for lessons of layers: more bytes a second than a disk and PCIe bring


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
        matches: Matches | None,
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
        if folder is not None and stage == "intermediate" and self.run.main:
            device = trainer.args.device.type
            if device in TOO_FAST:
                log.warning(
                    "lessons of layers are read from a cache for a run on %s: they have kilobytes "
                    "a token, so expect them to come more slowly than a live teacher's; leave "
                    "cache_teacher out (--cache-teacher, --cache-folder), which is for CPUs",
                    device,
                )
        if folder is not None:  # every process, or the first would wait here for the others
            with trainer.args.main_process_first(local=False):
                trainer.lessons = (
                    lessons
                    or LessonCache.found(folder, made_from)
                    or LessonCache.build(
                        folder,
                        trainer.teach_raw,
                        examples,
                        trainer.data_collator,
                        made_from,
                        batch_size=trainer.args.train_batch_size,
                        dtype=self.cache_dtype,
                        progress=progress,
                    )
                )
        changes = self.changes()
        if live and self.compare and name not in changes:
            changes[name] = trainer.change_of_terms(self.teacher.exact)
            self.run.record(teacher_change=changes)
        if folder is not None:
            trainer.teacher = None
        self.teacher.forget(asked=folder is not None)
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
            raise ValueError("cache_dtype is for cached lessons; ask for them (--cache-teacher)")
        check_cache_dtype(cache_dtype)
    if isinstance(cache_teacher, (str, Path)) and Path(cache_teacher).is_file():
        raise NotADirectoryError(f"{cache_teacher} is a file; expected a folder for cached lessons")
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
