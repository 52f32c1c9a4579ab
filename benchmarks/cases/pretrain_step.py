"""Pre-training step of TinyBERT-4L-312: forward, both losses, backward, AdamW update.

loss = mean over labelled positions of cross_entropy(head(h), label)
     + mean over pairs of cross_entropy(order(h_[CLS]), next sentence or not)
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from tinybert_fast.benchmarks.baselines.one_model import PRE_TRAINING, TaskStep
from tinybert_fast.benchmarks.batches import Batch
from tinybert_fast.benchmarks.case import OURS, Cases
from tinybert_fast.benchmarks.cases.step_case import step_case
from tinybert_fast.benchmarks.step_work import pre_training_work
from tinybert_fast.training.pretraining import Objectives, PreTraining


class OurPreTrainingStep(TaskStep):
    """What `tinybert-fast pretrain` runs: heads on the rows that predict, which the collator
    knows."""

    name, role = "ours", OURS

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.losses = PreTraining(self.trained, Objectives())

    def prepare(self, batch: Batch, setting: Any) -> dict[str, Any]:
        return {
            **batch.inputs,
            "layout": batch.layout,
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


_cases = partial(
    step_case, task=PRE_TRAINING, ours=OurPreTrainingStep, work=pre_training_work, width=128
)
CASES: Cases = {"pretrain_step": partial(_cases, name="pretrain_step", batch=32)}
GPU_CASES: Cases = {
    "pretrain_step_b256_n128": partial(_cases, name="pretrain_step_b256_n128", batch=256)
}
