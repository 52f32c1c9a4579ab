"""The masked-LM step without this package."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinybert_fast.benchmarks.baselines.plain_bert import (
    Form,
    available,
    compile_once,
    encode,
    forms,
)
from tinybert_fast.benchmarks.batches import Batch, bucket_counts
from tinybert_fast.benchmarks.case import BASELINE, CAREFUL, Outcome
from tinybert_fast.benchmarks.training_step import TrainingStep


class TransformersStep(TrainingStep):
    """(a) BertForMaskedLM as it comes: SDPA, padding computed, logits of every position."""

    name, role = "transformers", BASELINE

    def backward(self, batch: Batch, dtype: str, setting: Any) -> Tensor:
        with self.autocast(dtype):
            loss = self.trained(**batch.inputs, labels=batch.labels).loss
        loss.backward()
        return loss.detach()


class CarefulStep(TrainingStep):
    """(b) The same model: SDPA, the batch sorted by length and cut into buckets that are trimmed to
    their longest sequence, gradients accumulated, the head on labelled rows alone. The number of
    buckets is the fastest one on this machine."""

    name, role = "careful", CAREFUL

    def __init__(self, trained: nn.Module, batches: dict[str, Batch], dropout: float) -> None:
        super().__init__(trained, batches, dropout)
        self.settings = bucket_counts(batches["timed"])

    def prepare(self, batch: Batch, setting: Any) -> list[Batch]:
        return batch.buckets(setting)

    def backward(self, batch: list[Batch], dtype: str, setting: Any) -> Tensor:
        labelled = sum(len(part.labelled) for part in batch)
        total = torch.zeros((), device=self.device)
        for part in batch:
            with self.autocast(dtype):
                loss = self.loss_sum(part, setting) / labelled
            loss.backward()
            total += loss.detach()
        return total

    def loss_sum(self, part: Batch, setting: Any) -> Tensor:
        """Of a bucket's labelled rows."""
        model: Any = self.trained
        hidden = model.bert(**part.inputs).last_hidden_state
        logits = model.cls(hidden.flatten(0, 1).index_select(0, part.labelled))
        labels = part.labels.flatten().index_select(0, part.labelled)
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    def setting(self, dtype: str) -> str:
        return f"length buckets: {self._setting(dtype)}"


class PlainStep(CarefulStep):
    """The careful step on plain_bert.py: nothing waits for the device, so that it can be captured;
    and compiled, but for the checks, whose dropout rate would be compiled for once more."""

    def __init__(
        self,
        trained: nn.Module,
        batches: dict[str, Batch],
        dropout: float,
        *,
        compiled_alone: bool = False,
    ) -> None:
        super().__init__(trained, batches, dropout)
        self.settings = (Form(1, True),) if compiled_alone else forms(batches["timed"])
        self.name = self.role = "careful compile" if compiled_alone else "careful plain"
        self.checking = False

    def prepare(self, batch: Batch, setting: Any) -> list[Batch]:
        return batch.buckets(setting.buckets)

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        with available():
            super().tune(dtype, seconds)
            self._gradients("timed", dtype)
        self.optimizer.zero_grad(set_to_none=True)

    def outcome(self, what: str, dtype: str) -> Outcome:
        self.checking = True
        try:
            return super().outcome(what, dtype)
        finally:
            self.checking = False

    def loss_sum(self, part: Batch, setting: Form) -> Tensor:
        compiled = setting.compiled and not self.checking
        model: Any = self.trained
        hidden = encode(model.bert, part.inputs, full=part.is_full, compiled=compiled).hidden[-1]
        labels = part.labels.flatten().index_select(0, part.labelled)
        transform, decoder = model.cls.predictions.transform, model.cls.predictions.decoder
        norm = transform.LayerNorm
        return (compile_once(head_loss) if compiled else head_loss)(
            hidden.flatten(0, 1).index_select(0, part.labelled),
            labels,
            (transform.dense.weight, transform.dense.bias),
            (norm.weight, norm.bias, norm.eps),
            (decoder.weight, decoder.bias),
        )

    def setting(self, dtype: str) -> str:
        return str(self._setting(dtype))


def head_loss(hidden: Tensor, labels: Tensor, dense: Any, norm: Any, decoder: Any) -> Tensor:
    """Summed cross-entropy of rows (R, C) behind BERT's prediction head."""
    hidden = F.gelu(F.linear(hidden, *dense))
    hidden = F.layer_norm(hidden, hidden.shape[-1:], *norm)
    return F.cross_entropy(F.linear(hidden, *decoder).float(), labels, reduction="sum")
