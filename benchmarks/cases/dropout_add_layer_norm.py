"""BERT's post-norm block, rows 312 (TinyBERT-4) and 768 wide: linear bias, dropout, residual, layer
norm in plain PyTorch, compiled and not, and ours. Eager PyTorch finds the bias added by the layer.

Work: x and residual read and y written forward; dy, x and residual read, dx and dresidual written
backward; the row statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.benchmarks.case import Case, Cases, Setup, Work
from tinybert_fast.benchmarks.cases.layer_norm import COLUMNS, EPS, STATISTICS
from tinybert_fast.benchmarks.cases.op_case import batch_of, normal, row_case, sum_of
from tinybert_fast.ops.layout import SequenceLayout


def eager(
    x: Tensor, residual: Tensor, weight: Tensor, ln_bias: Tensor, *, dropout_p: float
) -> Tensor:
    total = F.dropout(x, dropout_p) + residual
    return F.layer_norm(total, x.shape[-1:], weight, ln_bias, EPS)


def ours(layout: SequenceLayout, seed: Tensor, *operands: Tensor, **how: Any) -> Tensor:
    return ops.dropout_add_layer_norm(*operands, eps=EPS, seed=seed, layout=layout, **how)


def work_of(rows: int, columns: int, phase: str, size: int) -> Work:
    row, vectors = columns * size, 3 * columns * size  # bias, weight, ln_bias; then their gradients
    forward = rows * (3 * row + STATISTICS) + vectors
    return sum_of(phase, Work(0, forward), Work(0, rows * (5 * row + STATISTICS) + 2 * vectors))


def cases(setup: Setup, *, name: str, columns: int) -> Iterator[Case]:
    batch, width = batch_of(setup)
    draw, rows = normal(setup), batch * width
    layout = SequenceLayout.full(batch, width, setup.device)
    seed = torch.tensor([setup.seed, 1], device=setup.device)
    yield from row_case(
        name,
        setup,
        eager,
        partial(ours, layout, seed),
        (draw(rows, columns), draw(columns), draw(rows, columns), draw(columns), draw(columns)),
        5,
        partial(work_of, rows, columns),
        dropout=setup.dropout,
        behind_linear=True,
    )


CASES: Cases = {
    name: partial(cases, name=name, columns=columns)
    for columns in COLUMNS
    for name in (f"dropout_add_layer_norm_d{columns}",)
}
