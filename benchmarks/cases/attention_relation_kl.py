"""MiniLM's loss of one relation, forward and backward, against the length N: queries and keys, or
values with themselves, 12 relation heads of a 312 wide student under a 768 wide teacher.

Work: the scores of both models and the gradients through them; operands read once, gradients
written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.benchmarks.baselines.attention_scores import scores
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

BATCH, HEADS, WIDTH, TEACHER_WIDTH = 8, 12, 26, 64
LENGTHS, GPU_TOKENS = (128, 512), 65536
SMOKE_LENGTHS = (64,)
KINDS = ("qk", "vv")
FULL = "every position real"


def autograd(kind: str, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """As anyone writes it, on (B, N, H, D)."""
    a, b, c, d = (x.transpose(1, 2) for x in ((a, b, c, d) if kind == "qk" else (a, a, c, c)))
    student, teacher = (scores(x, y).float().log_softmax(-1) for x, y in ((a, b), (c, d)))
    rows = student.numel() // student.shape[-1]
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / rows


def ours(kind: str, a: Tensor, b: Tensor, c: Tensor, d: Tensor, **how: Any) -> Tensor:
    operands = (a, b, c, d) if kind == "qk" else (a, a, c, c)
    return ops.attention_relation_kl(*operands, relation_heads=a.shape[2], **how)


def work_of(batch: int, length: int, heads: int, kind: str, phase: str, size: int) -> Work:
    rows, tensors = batch * length * heads, 2 if kind == "qk" else 1
    flops = 2 * rows * length * (WIDTH + TEACHER_WIDTH), 4 * rows * length * WIDTH
    read, written = rows * tensors * (WIDTH + TEACHER_WIDTH) * size, rows * tensors * WIDTH * size
    return loss_work(phase, flops, read, written)


def cases(setup: Setup, *, name: str, kind: str) -> Iterator[Case]:
    for length in SMOKE_LENGTHS if setup.smoke else LENGTHS:
        batch, heads = GPU_TOKENS // length if setup.on_gpu else BATCH, HEADS
        if setup.smoke:
            batch, heads = 2, 2
        draw = normal(setup)
        operands = tuple(
            draw(batch, length, heads, width)
            for width in (WIDTH, WIDTH, TEACHER_WIDTH, TEACHER_WIDTH)
        )
        trained, eager = 2 if kind == "qk" else 1, partial(autograd, kind)
        providers = [OpCall("autograd", BASELINE, eager, operands, trained)]
        if setup.compiles:
            providers.append(OpCall("compile", CAREFUL, compiled(eager), operands, trained))
        providers.append(OpCall("ours", OURS, partial(ours, kind), operands, trained))
        yield from op_case(
            name,
            setup,
            batch,
            length,
            providers,
            partial(work_of, batch, length, heads, kind),
            what=FULL,
            optional=("compile",),
            phases=loss_phases(setup),
            gpu_calls=FEW_CALLS,
        )


CASES: Cases = {
    name: partial(cases, name=name, kind=kind)
    for kind in KINDS
    for name in (f"attention_relation_kl_{kind}",)
}
