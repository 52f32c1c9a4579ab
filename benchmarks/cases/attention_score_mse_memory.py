"""Peak memory of the attention loss, forward and backward, against the length N at fixed B.

One matched layer of TinyBERT-4L (12 heads of 26) and its teacher (12 heads of 64), every position
real. The peak counts what the loss adds to its operands: temporaries and the gradients of q and k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.benchmarks.baselines.attention_scores import gram_sum, official, scores
from tinybert_fast.benchmarks.case import (
    BASELINE,
    CAREFUL,
    DTYPES,
    OURS,
    Case,
    Cases,
    Check,
    Outcome,
    Setup,
)

BATCH, HEADS, STUDENT_WIDTH, TEACHER_WIDTH = 4, 12, 26, 64
LENGTHS = (128, 256, 512, 1024)
SMOKE_LENGTHS = (64, 128)
FULL = "every position real"

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def direct(q: Tensor, k: Tensor, p: Tensor, r: Tensor) -> Tensor:
    q, k, p, r = (x.transpose(1, 2) for x in (q, k, p, r))
    return official(scores(q, k), scores(p, r))


def gram(q: Tensor, k: Tensor, p: Tensor, r: Tensor) -> Tensor:
    batch, length, heads, _ = q.shape
    total = gram_sum(*(x.transpose(1, 2).float() for x in (q, k, p, r)))
    return total / (batch * heads * length * length)


class LossStep:
    """A loss of (B, N, H, D) operands as a provider: forward and backward."""

    def __init__(self, name: str, role: str, loss: Loss, operands: tuple[Tensor, ...]) -> None:
        self.name, self.role, self.loss, self.operands = name, role, loss, operands
        self._cast: dict[str, list[Tensor]] = {}

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        pass

    def setting(self, dtype: str) -> str:
        return ""

    def run(self, dtype: str) -> None:
        self._gradients(dtype)

    def outcome(self, what: str, dtype: str) -> Outcome:
        loss, (dq, dk) = self._gradients(dtype)
        return Outcome(float(loss), {"q": dq, "k": dk})

    def _gradients(self, dtype: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        if dtype not in self._cast:
            q, k, p, r = (x.to(DTYPES[dtype]) for x in self.operands)
            self._cast[dtype] = [q.requires_grad_(), k.requires_grad_(), p, r]
        q, k, p, r = self._cast[dtype]
        loss = self.loss(q, k, p, r)
        return loss.detach(), torch.autograd.grad(loss, (q, k))


def cases(setup: Setup, *, name: str) -> Iterator[Case]:
    batch, heads = (2, 2) if setup.smoke else (BATCH, HEADS)
    for length in SMOKE_LENGTHS if setup.smoke else LENGTHS:
        generator = setup.generator()

        def draw(width: int) -> Tensor:
            shape = batch, length, heads, width  # noqa: B023 - called within this round
            return torch.randn(shape, generator=generator).to(setup.device)  # noqa: B023

        operands = tuple(
            draw(width) for width in (STUDENT_WIDTH, STUDENT_WIDTH, TEACHER_WIDTH, TEACHER_WIDTH)
        )
        providers = [
            LossStep(label, role, loss, operands)
            for label, role, loss in (
                ("official", BASELINE, direct),
                ("careful", CAREFUL, gram),
                ("ours", OURS, ops.attention_score_mse),
            )
        ]
        yield Case(
            name=name,
            batch=batch,
            width=length,
            valid_tokens=batch * length,
            dropout=0.0,
            optimizer="none",
            providers=providers,
            checks=(Check(FULL, "official", ("careful", "ours")),),
        )


NAME = "attention_score_mse_memory"
CASES: Cases = {NAME: partial(cases, name=NAME)}
