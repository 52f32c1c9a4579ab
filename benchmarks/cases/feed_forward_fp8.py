"""A frozen BERT-base's feed-forward block on a GPU, forward alone: linear layers in bf16 around
F.gelu, compiled and not; ours in bf16, as a teacher runs it by default; PyTorch's products of e4m3
behind a compiled rounding of their rows; and ours in e4m3.

Work: both products, x read and y written. The bound is that of bf16, which e4m3 may go below.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.benchmarks.case import (
    BASELINE,
    CAREFUL,
    OURS,
    Case,
    Cases,
    Failed,
    Setup,
    Work,
)
from tinybert_fast.benchmarks.cases.op_case import SAME, batch_of, compiled, normal, op_case
from tinybert_fast.benchmarks.op_call import OpCall
from tinybert_fast.ops.feed_forward_fp8 import why_not

COLUMNS = ((768, 3072),)
ROUNDING = 0.05  # of y, by e4m3: what an answer may be further away by than one in bf16

Linears = tuple[Tensor, Tensor, Tensor, Tensor]  # weight and bias of the inner and of the outer one


def eager(x: Tensor, inner: Tensor, bias: Tensor, outer: Tensor, outer_bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, inner, bias)), outer, outer_bias)


def fused(x: Tensor, inner: Tensor, bias: Tensor, outer: Tensor, outer_bias: Tensor) -> Tensor:
    return F.linear(ops.bias_gelu(x, bias, inner), outer, outer_bias)


class ScaledProducts:
    """The block as PyTorch's own parts make it in e4m3, a scale for each row of every operand."""

    def __init__(self, linears: Linears) -> None:
        inner, self.bias, outer, self.outer_bias = linears
        self.inner, self.outer = rounded_rows(inner), rounded_rows(outer)

    def __call__(self, x: Tensor, *linears: Tensor) -> Tensor:
        expanded = F.gelu(self._product(x, *self.inner, self.bias))
        return self._product(expanded, *self.outer, self.outer_bias)

    def _product(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        rows, of_rows = rounded_rows(x)
        if not x.is_cuda:  # where PyTorch has no such product
            return (rows.float() @ weight.float().mT * of_rows * scale.mT + bias).to(x.dtype)
        return torch._scaled_mm(
            rows, weight.mT, scale_a=of_rows, scale_b=scale.mT, bias=bias.to(x.dtype),
            out_dtype=x.dtype, use_fast_accum=True,
        )  # fmt: skip


def rounded_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / largest
    return (x / scale).to(torch.float8_e4m3fn), scale


class Ours:
    """With weights rounded beforehand, as a teacher's are."""

    def __init__(self, linears: Linears) -> None:
        self.weights = ops.Fp8Weights.of(*linears)

    def __call__(self, x: Tensor, *linears: Tensor, **how: Any) -> Tensor:
        return ops.feed_forward_fp8(x, self.weights, **how)


def work_of(rows: int, columns: int, hidden: int, phase: str, size: int) -> Work:
    weights = 2 * columns * hidden
    return Work(2 * rows * weights, (2 * rows * columns + weights) * size)


def cases(setup: Setup, *, name: str, columns: int, hidden: int) -> Iterator[Case]:
    reason = why_not(setup.device)
    if setup.device.type == "cuda" and reason is not None:  # the reference is not ours
        raise Failed(f"{name}: {reason}")
    batch, width = batch_of(setup)
    draw, rows = normal(setup), batch * width
    linears = (
        draw(hidden, columns) * columns**-0.5,
        draw(hidden),
        draw(columns, hidden) * hidden**-0.5,
        draw(columns),
    )
    operands = draw(rows, columns), *linears
    providers = [OpCall("eager", BASELINE, eager, operands, 0)]
    others = {"compile": CAREFUL, "scaled_mm": "scaled_mm"}
    if setup.smoke:
        others = {}
    for other, role in others.items():
        op = eager if role == CAREFUL else ScaledProducts(linears)
        providers.append(OpCall(other, role, compiled(op), operands, 0))
    providers.append(OpCall("ours bf16", "ours bf16", fused, operands, 0))
    providers.append(OpCall("ours", OURS, Ours(linears), operands, 0))
    for case in op_case(
        name,
        setup,
        batch,
        width,
        providers,
        partial(work_of, rows, columns, hidden),
        what=SAME,
        optional=tuple(others),
        phases=("forward",),
        rounding=ROUNDING,
    ):
        case.dtypes = ("bf16",)
        yield case


CASES: Cases = {
    name: partial(cases, name=name, columns=columns, hidden=hidden)
    for columns, hidden in COLUMNS
    for name in (f"feed_forward_fp8_d{columns}",)
}
