"""The attention loss of one matched layer, forward and backward, against the length N: 12 heads of
26 (TinyBERT-4) or 64 (TinyBERT-6) under a teacher's 12 of 64, every position real.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.benchmarks.baselines.attention_scores import gram_sum, official, scores
from tinybert_fast.benchmarks.case import BASELINE, CAREFUL, OURS, Case, Cases, Check, Setup
from tinybert_fast.benchmarks.op_call import OpCall

BATCH, HEADS, TEACHER_WIDTH = 8, 12, 64
STUDENT_WIDTHS = (26, 64)
LENGTHS = (32, 64, 128, 256, 512, 1024)
SMOKE_LENGTHS = (64,)
FULL = "every position real"


def direct(q: Tensor, k: Tensor, p: Tensor, r: Tensor) -> Tensor:
    """As anyone writes it, on (B, N, H, D)."""
    q, k, p, r = (x.transpose(1, 2) for x in (q, k, p, r))
    return F.mse_loss(scores(q, k), scores(p, r))


def as_released(q: Tensor, k: Tensor, p: Tensor, r: Tensor) -> Tensor:
    """The same with the released code's treatment of masked keys."""
    q, k, p, r = (x.transpose(1, 2) for x in (q, k, p, r))
    return official(scores(q, k), scores(p, r))


def gram(q: Tensor, k: Tensor, p: Tensor, r: Tensor) -> Tensor:
    """With no N x N tensor, differentiated by autograd."""
    batch, length, heads, _ = q.shape
    total = gram_sum(*(x.transpose(1, 2).float() for x in (q, k, p, r)))
    return total / (batch * heads * length * length)


def case_of(
    name: str,
    setup: Setup,
    batch: int,
    length: int,
    width: int,
    baseline: Callable[..., Tensor] = direct,
) -> Case:
    """Baseline, the careful user's faster form, and ours on operands (B, N, H, D)."""
    generator = setup.generator()
    heads = 2 if setup.smoke else HEADS
    operands = tuple(
        torch.randn(batch, length, heads, size, generator=generator).to(setup.device)
        for size in (width, width, TEACHER_WIDTH, TEACHER_WIDTH)
    )
    careful = {"direct": direct, "gram": gram}
    return Case(
        name=name,
        batch=batch,
        width=length,
        valid_tokens=batch * length,
        dropout=0.0,
        optimizer="none",
        providers=[
            OpCall("autograd", BASELINE, baseline, operands, 2),
            OpCall("careful", CAREFUL, careful, operands, 2),
            OpCall("ours", OURS, ops.attention_score_mse, operands, 2),
        ],
        checks=(Check(FULL, "autograd", ("careful", "ours")),),
    )


def cases(setup: Setup, *, name: str, width: int) -> Iterator[Case]:
    for length in SMOKE_LENGTHS if setup.smoke else LENGTHS:
        yield case_of(name, setup, 2 if setup.smoke else BATCH, length, width)


CASES: Cases = {
    name: partial(cases, name=name, width=width)
    for width in STUDENT_WIDTHS
    for name in (f"attention_score_mse_d{width}",)
}
