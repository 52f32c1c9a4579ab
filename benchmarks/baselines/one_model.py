"""Training steps of one model without this package: masked LM, pre-training, a classifier.

A `Task` says which model, what labels it takes, and its loss from the states of a length bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinybert_fast.benchmarks.baselines.plain_bert import (
    ALIGNED,
    Form,
    Offer,
    available,
    compile_once,
    eager_forms,
    encode,
    forms,
    serves,
)
from tinybert_fast.benchmarks.batches import Batch
from tinybert_fast.benchmarks.case import BASELINE, CAREFUL, Outcome
from tinybert_fast.benchmarks.training_step import TrainingStep

Compiler = Callable[[Callable[..., Tensor]], Callable[..., Tensor]]


class Task(NamedTuple):
    model: str  # the class of Transformers
    labels: Callable[[Batch], dict[str, Tensor]]  # keywords of its forward
    read: Callable[[Batch], Tensor]  # flat places (R,) whose last states its heads read
    # Of model, these states (R, C), bucket and whole batch: the bucket's share in the batch's loss.
    loss: Callable[[Any, Tensor, Batch, Batch, Compiler], Tensor]


class TaskStep(TrainingStep):
    def __init__(
        self, task: Task, trained: nn.Module, batches: dict[str, Batch], dropout: float
    ) -> None:
        super().__init__(trained, batches, dropout)
        self.task = task


class TransformersStep(TaskStep):
    """(a) The model as it comes: SDPA, padding computed, logits of every position."""

    name, role = "transformers", BASELINE

    def backward(self, batch: Batch, dtype: str, setting: Any) -> Tensor:
        with self.autocast(dtype):
            loss = self.trained(**batch.inputs, **self.task.labels(batch)).loss
        loss.backward()
        return loss.detach()


class CarefulStep(TaskStep):
    """(b) The encoder of plain_bert.py: SDPA, the batch sorted by length and cut into buckets that
    are trimmed to their longest sequence, gradients accumulated, or tokens alone; heads, and the
    last layer behind its attention, on the rows alone that heads read. The form is the fastest one
    on this machine."""

    name, role = "careful", CAREFUL

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.settings = eager_forms(self.batches["timed"])

    def serves(self, setting: Form, dtype: str) -> bool:
        return serves(setting, self.device, dtype)

    def prepare(self, batch: Batch, setting: Form) -> tuple[Batch, list[Batch]]:
        return batch, batch.buckets(setting.buckets)

    def backward(self, batch: tuple[Batch, list[Batch]], dtype: str, setting: Form) -> Tensor:
        whole, parts = batch
        model: Any = self.trained
        compiled = self.compiles(setting)
        total = torch.zeros((), device=self.device)
        for part in parts:
            with self.autocast(dtype):
                states = encode(
                    model.bert,
                    part,
                    compiled=compiled,
                    packed=setting.packed,
                    read=self.task.read(part),
                )
                compiler = partial(compile_once, device=self.device) if compiled else _eager
                loss = self.task.loss(model, states.hidden[-1], part, whole, compiler)
            loss.backward()
            total += loss.detach()
        return total

    def compiles(self, setting: Form) -> bool:
        return False


class PlainStep(CarefulStep):
    """The careful step compiled, but for the checks, whose dropout rate would be compiled for once
    more. Nothing waits for the device, so that it can be captured."""

    def __init__(self, *args: Any, name: str = "careful plain", offered: Offer = forms) -> None:
        super().__init__(*args)
        self.settings = offered(self.batches["timed"])
        self.name = self.role = name
        self.checking = False

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        with available():
            super().tune(dtype, seconds)
            self._gradients("timed", dtype)
        self.optimizer.zero_grad(set_to_none=True)

    def outcome(self, what: str, dtype: str, through: Any = None) -> Outcome:
        self.checking = True
        try:
            return super().outcome(what, dtype, through)
        finally:
            self.checking = False

    def compiles(self, setting: Form) -> bool:
        return setting.compiled and not self.checking


def _eager(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return function


# ---- tasks ---------------------------------------------------------------------------------------


def masked_lm_loss(
    model: Any, hidden: Tensor, part: Batch, whole: Batch, compiler: Compiler
) -> Tensor:
    labels = part.labels.flatten().index_select(0, part.labelled)
    transform, decoder = model.cls.predictions.transform, model.cls.predictions.decoder
    norm = transform.LayerNorm
    total = compiler(head_loss)(
        hidden,
        labels,
        (transform.dense.weight, transform.dense.bias),
        (norm.weight, norm.bias, norm.eps),
        (decoder.weight, decoder.bias),
    )
    return total / len(whole.labelled)


def pre_training_loss(
    model: Any, hidden: Tensor, part: Batch, whole: Batch, compiler: Compiler
) -> Tensor:
    first, labelled = hidden.split((len(part.firsts), len(part.labelled)))
    order = model.cls.seq_relationship(model.bert.pooler(first.unsqueeze(1)))
    return masked_lm_loss(model, labelled, part, whole, compiler) + class_loss(order, part, whole)


def classifier_loss(
    model: Any, hidden: Tensor, part: Batch, whole: Batch, compiler: Compiler
) -> Tensor:
    pooled = model.bert.pooler(hidden.unsqueeze(1))
    return class_loss(model.classifier(model.dropout(pooled)), part, whole)


def class_loss(logits: Tensor, part: Batch, whole: Batch) -> Tensor:
    return F.cross_entropy(logits.float(), part.classes, reduction="sum") / len(whole.lengths)


def head_loss(hidden: Tensor, labels: Tensor, dense: Any, norm: Any, decoder: Any) -> Tensor:
    """Summed cross-entropy of rows (R, C) behind BERT's prediction head."""
    hidden = F.gelu(F.linear(hidden, *dense))
    hidden = F.layer_norm(hidden, hidden.shape[-1:], *norm)
    logits = F.linear(hidden, *(whole_words(*decoder) if hidden.is_cuda else decoder))
    return F.cross_entropy(logits.float(), labels, reduction="sum")


def whole_words(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A decoder (V, C), (V,) with words that nobody predicts behind BERT's 30,522: of an aligned
    number of them cuBLAS takes its Hopper kernels."""
    missing = -len(weight) % ALIGNED
    if not missing:
        return weight, bias
    return F.pad(weight, (0, 0, 0, missing)), F.pad(bias, (0, missing), value=-torch.inf)


MASKED_LM = Task(
    "BertForMaskedLM",
    labels=lambda batch: {"labels": batch.labels},
    read=lambda part: part.labelled,
    loss=masked_lm_loss,
)
PRE_TRAINING = Task(
    "BertForPreTraining",
    labels=lambda batch: {"labels": batch.labels, "next_sentence_label": batch.classes},
    read=lambda part: torch.cat((part.firsts, part.labelled)),
    loss=pre_training_loss,
)
CLASSIFIER = Task(
    "BertForSequenceClassification",
    labels=lambda batch: {"labels": batch.classes},
    read=lambda part: part.firsts,
    loss=classifier_loss,
)
