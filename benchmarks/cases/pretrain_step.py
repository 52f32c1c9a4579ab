"""Pre-training step of TinyBERT-4L-312 on sentence pairs: forward, both losses, backward, update.

loss = mean over labelled positions of cross_entropy(head(h), label)
     + mean over pairs of cross_entropy(order(h_[CLS]), next sentence or not)
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from tinybert_fast.benchmarks.baselines.one_model import PRE_TRAINING, TaskStep
from tinybert_fast.benchmarks.batches import FILL, Batch
from tinybert_fast.benchmarks.case import OURS, Case, Cases, Setup
from tinybert_fast.benchmarks.cases.step_case import step_case
from tinybert_fast.benchmarks.step_work import pre_training_work
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.pretraining import Objectives, PreTraining

SHAPE, GPU_SHAPE = {"batch": 32, "width": 128}, {"batch": 256, "width": 128}


class OurStep(TaskStep):
    """What `tinybert-fast pretrain` runs: heads on the rows that predict, which the collator
    knows."""

    name, role = "ours", OURS

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.losses = PreTraining(self.trained, Objectives())

    def prepare(self, batch: Batch, setting: Any) -> dict[str, Any]:
        width = batch.input_ids.shape[1]
        return {
            **batch.inputs,
            "layout": SequenceLayout.from_lengths(batch.lengths, width, self.device),
            "next_sentence_label": batch.classes,
            "targets": {"mlm": (batch.labelled, batch.labels.flatten()[batch.labelled])},
        }

    def backward(self, batch: dict[str, Any], dtype: str, setting: Any) -> Tensor:
        with self.autocast(dtype):
            sums, _ = self.losses(batch)
        loss = sums["mlm"] / len(batch["targets"]["mlm"][1])
        loss = loss + sums["nsp"] / len(batch["next_sentence_label"])
        loss.backward()
        return loss.detach()


def cases(setup: Setup, *, fill: float = FILL, **shape: Any) -> Iterator[Case]:
    """``shape``: name, batch, width."""
    return step_case(setup, PRE_TRAINING, OurStep, pre_training_work, fill=fill, **shape)


CASES: Cases = {"pretrain_step": partial(cases, name="pretrain_step", **SHAPE)}
GPU_CASES: Cases = {
    "pretrain_step_b256_n128": partial(cases, name="pretrain_step_b256_n128", **GPU_SHAPE)
}
