"""Layer norm of rows 312 (TinyBERT-4) and 768 wide: F.layer_norm, compiled and not, Liger's, ours.

Work: x read and y written forward; dy and x read and dx written backward; the row statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.benchmarks.case import Case, Cases, Setup, Work
from tinybert_fast.benchmarks.cases.op_case import batch_of, has_kernels, normal, row_case, sum_of

COLUMNS = (312, 768)
EPS = 1e-12  # of BERT
STATISTICS = 8  # bytes of a row's mean and reciprocal deviation, fp32


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, EPS)


def ours(x: Tensor, weight: Tensor, bias: Tensor, **how: Any) -> Tensor:
    return ops.layer_norm(x, weight, bias, eps=EPS, **how)


def work_of(rows: int, columns: int, phase: str, size: int) -> Work:
    """Only additions and the like, which no figure of matrix products is the measure of."""
    row, vectors = columns * size, 2 * columns * size
    forward = rows * (2 * row + STATISTICS) + vectors
    return sum_of(phase, Work(0, forward), Work(0, forward + rows * row + columns * size))


def cases(setup: Setup, *, name: str, columns: int) -> Iterator[Case]:
    batch, width = batch_of(setup)
    draw, rows = normal(setup), batch * width
    operands = (draw(rows, columns), draw(columns), draw(columns))
    yield from row_case(
        name,
        setup,
        eager,
        ours,
        operands,
        3,
        partial(work_of, rows, columns),
        others={"liger": liger} if has_kernels(setup, "liger_kernel") else {},
    )


CASES: Cases = {
    name: partial(cases, name=name, columns=columns)
    for columns in COLUMNS
    for name in (f"layer_norm_d{columns}",)
}
