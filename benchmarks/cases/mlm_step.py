"""Masked-LM training step of TinyBERT-4L-312: forward, loss, backward, AdamW update.

    loss = mean over labelled positions of cross_entropy(head(h), label)

Same loss and gradients for all providers, whatever the padding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tinybert_fast.benchmarks.baselines.masked_lm import CarefulStep, TransformersStep
from tinybert_fast.benchmarks.batches import Batch, draw_batch, draw_lengths
from tinybert_fast.benchmarks.case import OURS, Case, Cases, Check, Setup
from tinybert_fast.benchmarks.training_step import OPTIMIZER, TrainingStep
from tinybert_fast.integrations import TinyBertConfig, accelerate

BATCH, WIDTH = 32, 128
SMOKE_BATCH, SMOKE_WIDTH = 4, 16
RAGGED = "lengths as timed"


class OurStep(TrainingStep):
    name, role = "ours", OURS

    def backward(self, batch: Batch, dtype: str, setting: Any) -> Tensor:
        with self.autocast(dtype):
            loss = self.trained(**batch.inputs, labels=batch.labels).loss
        loss.backward()
        return loss.detach()


def cases(setup: Setup) -> Iterator[Case]:
    from transformers import BertForMaskedLM

    batch, width = (SMOKE_BATCH, SMOKE_WIDTH) if setup.smoke else (BATCH, WIDTH)
    generator = setup.generator()
    torch.manual_seed(setup.seed)
    model = BertForMaskedLM(student_config(setup)).to(setup.device)
    lengths = draw_lengths(batch, width, generator)
    drawn = draw_batch(lengths, width, model.config.vocab_size, generator, setup.device)
    batches = {"timed": drawn, RAGGED: drawn}
    yield Case(
        name="mlm_step",
        batch=batch,
        width=width,
        valid_tokens=drawn.tokens,
        dropout=setup.dropout,
        optimizer=OPTIMIZER,
        providers=[
            TransformersStep(copy.deepcopy(model), batches, setup.dropout),
            CarefulStep(copy.deepcopy(model), batches, setup.dropout),
            OurStep(accelerate(copy.deepcopy(model)), batches, setup.dropout),
        ],
        checks=(Check(RAGGED, "transformers", ("careful", "ours")),),
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


CASES: Cases = {"mlm_step": cases}
