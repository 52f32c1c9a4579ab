"""The masked-LM step without this package."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinybert_fast.benchmarks.batches import IGNORED, Batch, bucket_counts
from tinybert_fast.benchmarks.case import BASELINE, CAREFUL
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

    def prepare(self, batch: Batch, setting: int) -> list[Batch]:
        return batch.buckets(setting)

    def backward(self, batch: list[Batch], dtype: str, setting: int) -> Tensor:
        labelled = sum(int((part.labels != IGNORED).sum()) for part in batch)
        total = torch.zeros((), device=self.device)
        for part in batch:
            rows = part.labels != IGNORED
            with self.autocast(dtype):
                hidden = self.trained.bert(**part.inputs).last_hidden_state
                logits = self.trained.cls(hidden[rows])
                loss = F.cross_entropy(logits.float(), part.labels[rows], reduction="sum")
            loss = loss / labelled
            loss.backward()
            total += loss.detach()
        return total

    def setting(self, dtype: str) -> str:
        return f"length buckets: {self._setting(dtype)}"
