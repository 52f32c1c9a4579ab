"""Masked-LM training step of TinyBERT-4L-312: forward, loss, backward, AdamW update.

loss = mean over labelled positions of cross_entropy(head(h), label)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from tinybert_fast.benchmarks.baselines.one_model import MASKED_LM, TaskStep
from tinybert_fast.benchmarks.batches import IGNORED, Batch
from tinybert_fast.benchmarks.case import OURS, Case, Cases, Setup
from tinybert_fast.benchmarks.cases.step_case import AcceleratedStep, step_case
from tinybert_fast.benchmarks.step_work import masked_lm_work
from tinybert_fast.modules.heads import vocabulary_loss
from tinybert_fast.ops.layout import SequenceLayout

BATCH, WIDTH = 32, 128
GPU_SHAPES = ((256, 128), (64, 512))


class Packed(NamedTuple):
    """A batch with what a collator knows of it."""

    batch: Batch
    layout: SequenceLayout
    read: Tensor  # int64 (R,): packed rows of the labelled tokens
    labels: Tensor  # int64 (R,)


class OurGpuStep(TaskStep):
    """The layout comes from lengths on the host and the head is told which rows it reads, so
    nothing waits for the device."""

    name, role = "ours", OURS

    def prepare(self, batch: Batch, setting: Any) -> Packed:
        layout = batch.layout
        labels = layout.pack(batch.labels)
        read = (labels != IGNORED).nonzero().squeeze(1)
        return Packed(batch, layout, read, labels.index_select(0, read))

    def backward(self, batch: Packed, dtype: str, setting: Any) -> Tensor:
        model: Any = self.trained
        with self.autocast(dtype):
            found = model.encode_packed(layout=batch.layout, read=batch.read, **batch.batch.inputs)
            loss = vocabulary_loss(
                model.cls.predictions, found.rows, batch.labels, impl=model.fast_impl
            )
        loss.backward()
        return loss.detach()


def cases(setup: Setup, **shape: Any) -> Iterator[Case]:
    """``shape``: name, batch, width, fill."""
    ours = OurGpuStep if setup.on_gpu else AcceleratedStep
    return step_case(setup, task=MASKED_LM, ours=ours, work=masked_lm_work, **shape)


CASES: Cases = {"mlm_step": partial(cases, name="mlm_step", batch=BATCH, width=WIDTH)}
GPU_CASES: Cases = {
    name: partial(cases, name=name, batch=batch, width=width)
    for batch, width in GPU_SHAPES
    for name in (f"mlm_step_b{batch}_n{width}",)
}
