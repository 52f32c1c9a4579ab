"""Distillation step, 12L-768 teacher (random weights) and 4L-312 student: both forwards, embedding,
hidden-state and attention losses, backward, AdamW update of student and projection.

The official formulas compare padding too, ours and the careful baseline's do not. So `careful` and
`ours` are held to each other on the timed lengths, and to `official` where every position is real
and the losses coincide.

On a GPU the batches are larger, with every position real or lengths as drawn, and the steps are
also replayed as CUDA graphs. Where the official N x N tensors of B = 256, N = 512 would not fit,
`official` is left out and measured at B = 32 instead. Where every position is real, our step has a
provider more, whose teacher rounds its feed-forward blocks to fp8; it is held to the others within
what that changes. `student_step`: the same without the teacher,
whose answers are there before anything is timed. On a CPU TextBrewer takes part in the whole step
where it is installed, as the extra ``test`` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from tinybert_fast.benchmarks.baselines import textbrewer
from tinybert_fast.benchmarks.baselines.distillation import (
    CarefulStep,
    KeptLessons,
    OfficialStep,
    PlainStep,
)
from tinybert_fast.benchmarks.baselines.plain_bert import any_shape
from tinybert_fast.benchmarks.batches import FILL, Batch, draw_batch, draw_lengths
from tinybert_fast.benchmarks.case import (
    COMPILED,
    OURS,
    Case,
    Cases,
    Check,
    Setup,
    Unavailable,
    Work,
    one_line,
)
from tinybert_fast.benchmarks.cases.step_case import SMOKE_BATCH, SMOKE_WIDTH, student_config
from tinybert_fast.benchmarks.step_work import distillation_work
from tinybert_fast.benchmarks.training_step import (
    OPTIMIZER,
    GraphedStep,
    Teacher,
    TrainingStep,
    sharing,
)
from tinybert_fast.integrations import accelerate
from tinybert_fast.modules.capture import Capture
from tinybert_fast.ops.feed_forward_fp8 import why_not
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.lessons import LessonCache
from tinybert_fast.training.losses import intermediate_terms
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.projection import HiddenProjection
from tinybert_fast.training.teacher import record

SHAPES = ((16, 128), (4, 512))
FULL_SHAPES, RAGGED_SHAPES = ((256, 128), (32, 512), (256, 512)), ((256, 128),)
STUDENT_SHAPES, GPU_STUDENT_SHAPES = ((16, 128),), ((256, 128),)
CHECKED_TOKENS = 1 << 15  # of a full batch, on a GPU
OFFICIAL_PAIRS = 1 << 23  # B N^2 that 80 GB hold: fp32 scores of 12 + 4 layers and their gradients
FP8, FP8_ROUNDING = "ours fp8 graph", 0.1  # of the loss, and of gradients
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

    def backward(self, batch: Any, dtype: str, setting: Any) -> Tensor:
        batch, layout = self.laid_out(batch)
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

    def laid_out(self, batch: Any) -> tuple[Batch, SequenceLayout]:
        return batch, SequenceLayout.from_mask(batch.attention_mask)

    @torch.no_grad()
    def lesson(self, batch: Batch, layout: SequenceLayout, dtype: str) -> Capture:
        theirs = self.matches.teacher_capture()
        record(self.teacher(dtype), batch.inputs, theirs, layout)
        return theirs


class OnGpu:
    """Mixed into our steps: the layout comes with the batch, so nothing waits for the device."""

    def prepare(self, batch: Batch, setting: Any) -> tuple[Batch, SequenceLayout]:
        return batch, batch.layout

    def laid_out(self, batch: Any) -> tuple[Batch, SequenceLayout]:
        return batch


class OurGpuStep(OnGpu, OurStep):
    """`OurStep` without a read of the device."""


class Fp8TeacherStep(OurGpuStep):
    """With a teacher whose feed-forward blocks are in fp8."""

    name = role = "ours fp8"

    def lesson(self, batch: Batch, layout: SequenceLayout, dtype: str) -> Capture:
        reason = why_not(self.device)
        if self.device.type == "cuda" and reason is not None:  # by the reference it is no provider
            raise Unavailable(reason)
        with self.autocast("bf16"):
            return super().lesson(batch, layout, "fp8")


class OurStudentStep(KeptLessons, OurStep):
    """Of the student alone."""


class OurGpuStudentStep(KeptLessons, OurGpuStep):
    """Of the student alone."""


class OfficialStudentStep(KeptLessons, OfficialStep):
    """Of the student alone."""


class CarefulStudentStep(KeptLessons, CarefulStep):
    """Of the student alone."""


class PlainStudentStep(KeptLessons, PlainStep):
    """Of the student alone."""


class Numbers:
    """The sequences of a batch by number, as far as `LessonCache.build` looks at a data set."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = lengths

    def __getitem__(self, column: str) -> list[int]:
        assert column == "length"
        return self.lengths

    def __getitems__(self, numbers: list[int]) -> list[int]:
        return numbers


class CachedStep(OurStep):
    """The same from the second epoch on, if the teacher's lessons are cached: read from the disk
    (or from the memory that keeps its files), in the dtype they were computed in."""

    name = role = "ours cached"
    work: Callable[[str], Work]  # without the teacher's

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


class CachedGpuStep(OnGpu, CachedStep):
    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        """Writes the lessons, for which there may be no room."""
        try:
            self._gradients("timed", dtype)
        except (OSError, RuntimeError, ValueError) as error:
            raise Unavailable(one_line(error)) from error
        finally:
            self.optimizer.zero_grad(set_to_none=True)


def cases(
    setup: Setup,
    *,
    name: str,
    batch: int,
    width: int,
    fill: float = FILL,
    student_alone: bool = False,
) -> Iterator[Case]:
    from transformers import BertConfig, BertModel

    pairs = batch * width**2
    if setup.smoke:
        batch, width = min(batch, SMOKE_BATCH), min(width, SMOKE_WIDTH)
    every_position = fill == 1.0
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
    with setup.device:
        student = BertModel(config, add_pooling_layer=False)
        teacher = BertModel(teacher_config, add_pooling_layer=False)
        projection = HiddenProjection(config.hidden_size, teacher_config.hidden_size)
    matches = LayerMatches.uniform(config.num_hidden_layers, teacher_config.num_hidden_layers)

    def draw(lengths: list[int]) -> Batch:
        return draw_batch(lengths, width, config.vocab_size, generator, setup.device)

    drawn = draw([width] * batch if every_position else draw_lengths(batch, width, generator, fill))
    full = drawn if every_position else draw([width] * batch)
    if setup.on_gpu:  # in fp32 the largest batch of the baselines would not fit
        full = full.rows(list(range(max(1, min(batch, CHECKED_TOKENS // width)))))
    batches = {"timed": drawn, FULL: full} | ({} if every_position else {RAGGED: drawn})

    def plain(step: Any, **how: Any) -> Any:
        return step(_both(student, projection), sharing(teacher), batches, setup.dropout, **how)

    def compiled(step: Any) -> list[Any]:
        """On a CPU; on a GPU it is a form of the step that is captured."""
        return [plain(step, name=COMPILED, offered=any_shape)] if setup.compiles else []

    def fast(step: Any) -> Any:
        trained = _both(accelerate(copy.deepcopy(student)), projection)
        return step(trained, accelerate(sharing(teacher)), matches, batches, setup.dropout)

    fits = pairs <= OFFICIAL_PAIRS
    if student_alone and setup.on_gpu:
        providers = [
            *([plain(OfficialStudentStep)] if fits else []),
            plain(CarefulStudentStep),
            GraphedStep("careful graph", plain(PlainStudentStep)),
            fast(OurGpuStudentStep),
            GraphedStep("ours graph", fast(OurGpuStudentStep)),
        ]
    elif student_alone:
        providers = [
            plain(OfficialStudentStep),
            plain(CarefulStudentStep),
            *compiled(PlainStudentStep),
            fast(OurStudentStep),
        ]
    elif setup.on_gpu:
        rounded = GraphedStep(FP8, fast(Fp8TeacherStep))
        providers = [
            *([plain(OfficialStep)] if fits else []),
            plain(CarefulStep),
            GraphedStep("careful graph", plain(PlainStep)),
            fast(OurGpuStep),
            GraphedStep("ours graph", fast(OurGpuStep)),
            *([rounded] if every_position else [fast(CachedGpuStep)]),
        ]
    else:
        others = [plain(textbrewer.TextBrewerStep)] if textbrewer.is_installed() else []
        providers = [
            plain(OfficialStep),
            plain(CarefulStep),
            *compiled(PlainStep),
            *others,
            fast(OurStep),
            fast(CachedStep),
        ]
    work = partial(distillation_work, config, teacher_config, drawn.lengths)
    for provider in providers:
        if isinstance(provider, CachedStep):
            provider.work = partial(work, False)
    names = [provider.name for provider in providers]
    exact = tuple(name for name in names[1:] if name != FP8)
    checks = [Check(FULL, names[0], exact)]
    if FP8 in names:
        checks.append(Check(FULL, names[0], (FP8,), FP8_ROUNDING))
    if not every_position:
        careful = names.index(CarefulStep.name)
        checks.append(Check(RAGGED, CarefulStep.name, tuple(names[careful + 1 :])))
    yield Case(
        name=name,
        batch=batch,
        width=width,
        valid_tokens=drawn.tokens,
        dropout=setup.dropout,
        optimizer=OPTIMIZER,
        providers=providers,
        checks=tuple(checks),
        work=partial(work, not student_alone),
    )


def _both(student: nn.Module, projection: nn.Module) -> nn.ModuleDict:
    """What is trained, in copies: one set of parameter names for all providers."""
    parts = {"student": student, "projection": projection}
    return nn.ModuleDict({name: copy.deepcopy(part) for name, part in parts.items()})


def _named(shapes: Iterable[tuple[int, int]], step: str, end: str = "", **how: Any) -> Cases:
    return {
        name: partial(cases, name=name, batch=batch, width=width, **how)
        for batch, width in shapes
        for name in (f"{step}_b{batch}_n{width}{end}",)
    }


CASES = {
    **_named(SHAPES, "distill_step"),
    **_named(STUDENT_SHAPES, "student_step", student_alone=True),
}
GPU_CASES = {  # what takes least compiling first
    **_named(FULL_SHAPES, "distill_step", "_full", fill=1.0),
    **_named(GPU_STUDENT_SHAPES, "student_step", "_full", fill=1.0, student_alone=True),
    **_named(RAGGED_SHAPES, "distill_step"),
}
