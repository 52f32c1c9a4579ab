"""Fine-tuning step of a classifier, TinyBERT-4L-312: forward, loss, backward, AdamW update.

    loss = mean over sequences of cross_entropy(classifier(dropout(pool(h_[CLS]))), class)

Sentences as a task has them when they are padded to 128: 30 % of the positions are real.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from tinybert_fast.benchmarks.baselines.one_model import CLASSIFIER, TaskStep
from tinybert_fast.benchmarks.batches import Batch
from tinybert_fast.benchmarks.case import OURS, Case, Cases, Setup
from tinybert_fast.benchmarks.cases.step_case import step_case
from tinybert_fast.benchmarks.step_work import classifier_work
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.teacher import classify

FILL = 0.3
SHAPE, GPU_SHAPE = {"batch": 32, "width": 128}, {"batch": 256, "width": 128}


class LaidOut(NamedTuple):
    batch: Batch
    layout: SequenceLayout


class OurStep(TaskStep):
    """What `tinybert-fast finetune` runs."""

    name, role = "ours", OURS

    def prepare(self, batch: Batch, setting: Any) -> LaidOut:
        width = batch.input_ids.shape[1]
        return LaidOut(batch, SequenceLayout.from_lengths(batch.lengths, width, self.device))

    def backward(self, batch: LaidOut, dtype: str, setting: Any) -> Tensor:
        rows, layout = batch
        with self.autocast(dtype):
            loss = classify(self.trained, rows.inputs, layout, labels=rows.classes).loss
        loss.backward()
        return loss.detach()


def cases(setup: Setup, *, fill: float = FILL, **shape: Any) -> Iterator[Case]:
    """``shape``: name, batch, width."""
    return step_case(setup, CLASSIFIER, OurStep, classifier_work, fill=fill, **shape)


CASES: Cases = {"finetune_step": partial(cases, name="finetune_step", **SHAPE)}
GPU_CASES: Cases = {
    "finetune_step_b256_n128": partial(cases, name="finetune_step_b256_n128", **GPU_SHAPE)
}
