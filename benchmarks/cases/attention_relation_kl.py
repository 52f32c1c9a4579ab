"""MiniLM's loss of one relation, forward and backward, against the length N: queries and keys, or
values with themselves, 12 relation heads of a 312 wide student under a 768 wide teacher.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.benchmarks.baselines.attention_scores import scores
from tinybert_fast.benchmarks.case import BASELINE, OURS, Case, Cases, Check, Setup
from tinybert_fast.benchmarks.op_call import OpCall

BATCH, HEADS, WIDTH, TEACHER_WIDTH = 8, 12, 26, 64
LENGTHS = (128, 512)
SMOKE_LENGTHS = (64,)
KINDS = ("qk", "vv")
FULL = "every position real"


def autograd(kind: str, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """As anyone writes it, on (B, N, H, D)."""
    a, b, c, d = (x.transpose(1, 2) for x in ((a, b, c, d) if kind == "qk" else (a, a, c, c)))
    student, teacher = (scores(x, y).float().log_softmax(-1) for x, y in ((a, b), (c, d)))
    rows = student.numel() // student.shape[-1]
    return F.kl_div(student, teacher, reduction="sum", log_target=True) / rows


def ours(kind: str, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    operands = (a, b, c, d) if kind == "qk" else (a, a, c, c)
    return ops.attention_relation_kl(*operands, relation_heads=a.shape[2])


def cases(setup: Setup, *, name: str, kind: str) -> Iterator[Case]:
    batch, heads = (2, 2) if setup.smoke else (BATCH, HEADS)
    for length in SMOKE_LENGTHS if setup.smoke else LENGTHS:
        generator = setup.generator()
        operands = tuple(
            torch.randn(batch, length, heads, width, generator=generator).to(setup.device)
            for width in (WIDTH, WIDTH, TEACHER_WIDTH, TEACHER_WIDTH)
        )
        trained = 2 if kind == "qk" else 1
        yield Case(
            name=name,
            batch=batch,
            width=length,
            valid_tokens=batch * length,
            dropout=0.0,
            optimizer="none",
            providers=[
                OpCall("autograd", BASELINE, partial(autograd, kind), operands, trained),
                OpCall("ours", OURS, partial(ours, kind), operands, trained),
            ],
            checks=(Check(FULL, "autograd", ("ours",)),),
        )


CASES: Cases = {
    name: partial(cases, name=name, kind=kind)
    for kind in KINDS
    for name in (f"attention_relation_kl_{kind}",)
}
