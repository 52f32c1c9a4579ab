"""The attention loss of one matched layer, forward and backward, against the length N: 12 heads of
26 (TinyBERT-4) or 64 (TinyBERT-6) under a teacher's 12 of 64, every position real.

Work: operations of the form, Gram or direct, that needs fewer; q, k, p, r read once, dq and dk
written once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.benchmarks.baselines.attention_scores import gram_sum, official, scores
from tinybert_fast.benchmarks.case import BASELINE, CAREFUL, OURS, Case, Cases, Setup, Work
from tinybert_fast.benchmarks.cases.op_case import (
    FEW_CALLS,
    compiled,
    loss_phases,
    loss_work,
    normal,
    op_case,
)
from tinybert_fast.benchmarks.op_call import OpCall

BATCH, HEADS, TEACHER_WIDTH = 8, 12, 64
STUDENT_WIDTHS = (26, 64)
LENGTHS = (32, 64, 128, 256, 512, 1024)
GPU_LENGTHS, GPU_TOKENS = (128, 512), 65536
SHORT, SHORT_CALLS = 64, 10  # up to this length a call on a CPU is too short to be timed alone
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


def work_of(
    batch: int, length: int, heads: int, d: int, d_teacher: int, phase: str, size: int
) -> Work:
    forms = (  # operations of a row of a head, forward and backward
        (2 * length * (d + d_teacher), 4 * length * d),
        (4 * (d * d + d * d_teacher + d_teacher**2), 4 * (d * d + d * d_teacher)),
    )
    rows = batch * length * heads
    forward, backward = min(forms, key=sum)
    read, written = rows * 2 * (d + d_teacher) * size, rows * 2 * d * size
    return loss_work(phase, (rows * forward, rows * backward), read, written)


def case_of(
    name: str,
    setup: Setup,
    batch: int,
    length: int,
    width: int,
    baseline: Callable[..., Tensor] = direct,
    **options: Any,
) -> Iterator[Case]:
    """Baseline, the careful user's faster form, and ours on operands (B, N, H, D)."""
    draw, heads = normal(setup), 2 if setup.smoke else HEADS
    operands = tuple(
        draw(batch, length, heads, size) for size in (width, width, TEACHER_WIDTH, TEACHER_WIDTH)
    )
    careful = {"direct": direct, "gram": gram}
    if setup.compiles:
        careful |= {f"{form} compiled": compiled(call) for form, call in careful.items()}
    yield from op_case(
        name,
        setup,
        batch,
        length,
        [
            OpCall("autograd", BASELINE, baseline, operands, 2),
            OpCall("careful", CAREFUL, careful, operands, 2),
            OpCall("ours", OURS, ops.attention_score_mse, operands, 2),
        ],
        partial(work_of, batch, length, heads, width, TEACHER_WIDTH),
        what=FULL,
        gpu_calls=FEW_CALLS,
        **options,
    )


def cases(setup: Setup, *, name: str, width: int) -> Iterator[Case]:
    lengths = GPU_LENGTHS if setup.on_gpu else LENGTHS
    for length in SMOKE_LENGTHS if setup.smoke else lengths:
        batch = 2 if setup.smoke else GPU_TOKENS // length if setup.on_gpu else BATCH
        calls = SHORT_CALLS if length <= SHORT else 1
        yield from case_of(
            name, setup, batch, length, width, phases=loss_phases(setup), cpu_calls=calls
        )


CASES: Cases = {
    name: partial(cases, name=name, width=width)
    for width in STUDENT_WIDTHS
    for name in (f"attention_score_mse_d{width}",)
}
