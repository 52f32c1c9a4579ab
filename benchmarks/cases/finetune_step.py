"""Fine-tuning step of a classifier, TinyBERT-4L-312: forward, loss, backward, AdamW update.

    loss = mean over sequences of cross_entropy(classifier(dropout(pool(h_[CLS]))), class)

30 % of the positions are real: sentences of a task, most of them short, one about as long as the
width.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from tinybert_fast.benchmarks.baselines.one_model import CLASSIFIER, TaskStep
from tinybert_fast.benchmarks.batches import Batch
from tinybert_fast.benchmarks.case import OURS, Cases
from tinybert_fast.benchmarks.cases.step_case import step_case
from tinybert_fast.benchmarks.step_work import classifier_work
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.teacher import classify

FILL = 0.3


class LaidOut(NamedTuple):
    batch: Batch
    layout: SequenceLayout


class OurClassifierStep(TaskStep):
    """What `tinybert-fast finetune` runs."""

    name, role = "ours", OURS

    def prepare(self, batch: Batch, setting: Any) -> LaidOut:
        return LaidOut(batch, batch.layout)

    def backward(self, batch: LaidOut, dtype: str, setting: Any) -> Tensor:
        rows, layout = batch
        with self.autocast(dtype):
            loss = classify(self.trained, rows.inputs, layout, labels=rows.classes).loss
        loss.backward()
        return loss.detach()


_cases = partial(
    step_case, task=CLASSIFIER, ours=OurClassifierStep, work=classifier_work, width=128, fill=FILL
)
CASES: Cases = {"finetune_step": partial(_cases, name="finetune_step", batch=32)}
GPU_CASES: Cases = {
    "finetune_step_b256_n128": partial(_cases, name="finetune_step_b256_n128", batch=256)
}
