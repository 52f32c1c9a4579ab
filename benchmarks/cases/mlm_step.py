"""Masked-LM training step of TinyBERT-4L-312: forward, loss, backward, AdamW update.

    loss = mean over labelled positions of cross_entropy(head(h), label)

Same loss and gradients for all providers, whatever the padding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinybert_fast.benchmarks.baselines.masked_lm import CarefulStep, PlainStep, TransformersStep
from tinybert_fast.benchmarks.batches import FILL, IGNORED, Batch, draw_batch, draw_lengths
from tinybert_fast.benchmarks.case import OURS, Case, Cases, Check, Setup
from tinybert_fast.benchmarks.step_work import masked_lm_work
from tinybert_fast.benchmarks.training_step import OPTIMIZER, GraphedStep, TrainingStep
from tinybert_fast.integrations import TinyBertConfig, accelerate
from tinybert_fast.modules.heads import vocabulary_loss
from tinybert_fast.ops.layout import SequenceLayout

BATCH, WIDTH = 32, 128
GPU_SHAPES = ((256, 128), (64, 512))
SMOKE_BATCH, SMOKE_WIDTH = 4, 16
RAGGED = "lengths as timed"


class OurStep(TrainingStep):
    name, role = "ours", OURS

    def backward(self, batch: Batch, dtype: str, setting: Any) -> Tensor:
        with self.autocast(dtype):
            loss = self.trained(**batch.inputs, labels=batch.labels).loss
        loss.backward()
        return loss.detach()


class Packed(NamedTuple):
    """A batch with what a collator knows of it."""

    batch: Batch
    layout: SequenceLayout
    read: Tensor  # int64 (R,): packed rows of the labelled tokens
    labels: Tensor  # int64 (R,)


class OurGpuStep(TrainingStep):
    """What PreTraining runs: the layout comes from lengths on the host and the head is told which
    rows it reads, so nothing waits for the device."""

    name, role = "ours", OURS

    def prepare(self, batch: Batch, setting: Any) -> Packed:
        layout = SequenceLayout.from_lengths(batch.lengths, batch.input_ids.shape[1], self.device)
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


def cases(setup: Setup, *, name: str, batch: int, width: int, fill: float = FILL) -> Iterator[Case]:
    from transformers import BertForMaskedLM

    if setup.smoke:
        batch, width = min(batch, SMOKE_BATCH), min(width, SMOKE_WIDTH)
    generator = setup.generator()
    torch.manual_seed(setup.seed)
    with setup.device:
        model = BertForMaskedLM(student_config(setup))
    lengths = draw_lengths(batch, width, generator, fill)
    drawn = draw_batch(lengths, width, model.config.vocab_size, generator, setup.device)
    common = {"timed": drawn, RAGGED: drawn}, setup.dropout

    def fast() -> Any:
        return accelerate(copy.deepcopy(model))

    providers: list[Any] = [
        TransformersStep(copy.deepcopy(model), *common),
        CarefulStep(copy.deepcopy(model), *common),
    ]
    if setup.on_gpu:
        providers += [
            PlainStep(copy.deepcopy(model), *common, compiled_alone=True),
            GraphedStep("careful graph", PlainStep(copy.deepcopy(model), *common)),
            OurGpuStep(fast(), *common),
            GraphedStep("ours graph", OurGpuStep(fast(), *common)),
        ]
    else:
        providers.append(OurStep(fast(), *common))
    yield Case(
        name=name,
        batch=batch,
        width=width,
        valid_tokens=drawn.tokens,
        dropout=setup.dropout,
        optimizer=OPTIMIZER,
        providers=providers,
        checks=(Check(RAGGED, "transformers", tuple(one.name for one in providers[1:])),),
        work=partial(masked_lm_work, model.config, drawn.lengths, len(drawn.labelled)),
    )


def student_config(setup: Setup) -> Any:
    """TinyBERT-4L-312 (12 heads of 26, 30522 word pieces), or its smoke size."""
    dropout = {
        "hidden_dropout_prob": setup.dropout,
        "attention_probs_dropout_prob": setup.dropout,
    }
    tiny = {
        "vocab_size": 120,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    return TinyBertConfig.tiny_4l_312(**dropout, **(tiny if setup.smoke else {}))


CASES: Cases = {"mlm_step": partial(cases, name="mlm_step", batch=BATCH, width=WIDTH)}
GPU_CASES: Cases = {
    name: partial(cases, name=name, batch=batch, width=width)
    for batch, width in GPU_SHAPES
    for name in (f"mlm_step_b{batch}_n{width}",)
}
