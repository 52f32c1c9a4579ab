"""Distillation step, 12L-768 teacher (random weights) and 4L-312 student: both forwards, embedding,
hidden-state and attention losses, backward, AdamW update of student and projection.

The official formulas compare padding too, ours and the careful baseline's do not. So `careful` and
`ours` are held to each other on the timed lengths, and to `official` where every position is real
and the losses coincide.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from tinybert_fast.benchmarks.baselines.distillation import CarefulStep, OfficialStep
from tinybert_fast.benchmarks.batches import Batch, draw_batch, draw_lengths
from tinybert_fast.benchmarks.case import OURS, Case, Cases, Check, Setup
from tinybert_fast.benchmarks.cases.mlm_step import student_config
from tinybert_fast.benchmarks.training_step import OPTIMIZER, Teacher, TrainingStep, sharing
from tinybert_fast.integrations import accelerate
from tinybert_fast.modules.capture import Capture
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.lessons import LessonCache
from tinybert_fast.training.losses import intermediate_terms
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.projection import HiddenProjection
from tinybert_fast.training.teacher import record

SHAPES = ((16, 128), (4, 512))
SMOKE_BATCH, SMOKE_WIDTH = 4, 16
RAGGED, FULL = "lengths as timed", "every position real"


class OurStep(TrainingStep):
    """What DistillationTrainer runs: accelerated models, captured states, our losses."""

    name, role = "ours", OURS

    def __init__(
        self,
        trained: nn.ModuleDict,
        teacher: Any,
        matches: LayerMatches,
        batches: dict[str, Batch],
        dropout: float,
    ) -> None:
        super().__init__(trained, batches, dropout)
        self.teacher, self.matches = Teacher(teacher), matches

    def backward(self, batch: Batch, dtype: str, setting: Any) -> Tensor:
        layout = SequenceLayout.from_mask(batch.attention_mask)
        ours = self.matches.student_capture()
        student: Any = self.trained["student"]
        projection: Any = self.trained["projection"]
        with self.autocast(dtype):
            theirs = self.lesson(batch, layout, dtype)
            student(**batch.inputs, layout=layout, capture=ours, packed=True, record_only=True)
            terms = intermediate_terms(ours, theirs, self.matches, projection, layout=layout)
            loss = torch.stack(list(terms.values())).sum()
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def lesson(self, batch: Batch, layout: SequenceLayout, dtype: str) -> Capture:
        theirs = self.matches.teacher_capture()
        record(self.teacher(dtype), batch.inputs, theirs, layout)
        return theirs


class Numbers:
    """The sequences of a batch by number, as far as `LessonCache.build` looks at a data set."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __getitem__(self, key: Any) -> Any:
        return self.lengths if key == "length" else key


class CachedStep(OurStep):
    """The same from the second epoch on, if the teacher's lessons are cached: read from the disk
    (or from the memory that keeps its files), in the dtype they were computed in."""

    name = "ours cached"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._folder = TemporaryDirectory(prefix="lessons-")  # goes with the provider
        self._caches: dict[Any, LessonCache] = {}

    def lesson(self, batch: Batch, layout: SequenceLayout, dtype: str) -> Capture:
        key = id(batch), dtype
        if key not in self._caches:
            self._caches[key] = self._ask(batch, dtype)
        said = self._caches[key].lesson(range(len(batch.lengths)), layout, self.device)
        assert isinstance(said, Capture)
        return said

    def _ask(self, batch: Batch, dtype: str) -> LessonCache:
        lengths = list(batch.lengths)
        rows = Numbers(lengths)

        def teach(some: dict[str, Any]) -> Capture:
            with self.autocast(dtype):
                layout = SequenceLayout.from_mask(some["batch"].attention_mask)
                return OurStep.lesson(self, some["batch"], layout, dtype)

        def collate(some: list[int]) -> dict[str, Any]:
            return {"batch": batch.rows(some)}

        folder = Path(self._folder.name) / str(len(self._caches))
        return LessonCache.build(folder, teach, rows, collate, {}, batch_size=len(lengths))


def cases(setup: Setup, *, batch: int, width: int) -> Iterator[Case]:
    from transformers import BertConfig, BertModel

    name = f"distill_step_b{batch}_n{width}"
    if setup.smoke:
        batch, width = SMOKE_BATCH, SMOKE_WIDTH
    generator = setup.generator()
    torch.manual_seed(setup.seed)
    config = student_config(setup)
    tiny = {
        "vocab_size": config.vocab_size,
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 96,
    }
    teacher_config = BertConfig(**(tiny if setup.smoke else {}))  # BERT-base by default
    student = BertModel(config, add_pooling_layer=False).to(setup.device)
    teacher = BertModel(teacher_config, add_pooling_layer=False).to(setup.device)
    matches = LayerMatches.uniform(config.num_hidden_layers, teacher_config.num_hidden_layers)
    projection = HiddenProjection(config.hidden_size, teacher_config.hidden_size).to(setup.device)

    def draw(lengths: list[int]) -> Batch:
        return draw_batch(lengths, width, config.vocab_size, generator, setup.device)

    drawn = draw(draw_lengths(batch, width, generator))
    batches = {"timed": drawn, RAGGED: drawn, FULL: draw([width] * batch)}
    common = batches, setup.dropout
    yield Case(
        name=name,
        batch=batch,
        width=width,
        valid_tokens=drawn.tokens,
        dropout=setup.dropout,
        optimizer=OPTIMIZER,
        providers=[
            OfficialStep(_both(student, projection), sharing(teacher), *common),
            CarefulStep(_both(student, projection), sharing(teacher), *common),
            *(
                step(
                    _both(accelerate(copy.deepcopy(student)), projection),
                    accelerate(sharing(teacher)),
                    matches,
                    *common,
                )
                for step in (OurStep, CachedStep)
            ),
        ],
        checks=(
            Check(FULL, "official", ("careful", OurStep.name, CachedStep.name)),
            Check(RAGGED, "careful", (OurStep.name, CachedStep.name)),
        ),
    )


def _both(student: nn.Module, projection: nn.Module) -> nn.ModuleDict:
    """What is trained, in copies: one set of parameter names for all providers."""
    parts = {"student": student, "projection": projection}
    return nn.ModuleDict({name: copy.deepcopy(part) for name, part in parts.items()})


CASES: Cases = {
    f"distill_step_b{batch}_n{width}": partial(cases, batch=batch, width=width)
    for batch, width in SHAPES
}
