"""Linear bias + erf GELU of rows 1,200 (TinyBERT-4) and 3,072 wide: F.gelu behind a linear layer,
which has added its bias, F.gelu(x + bias) compiled, and ours.

Work: x read and y written forward; dy and x read and dx written backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.benchmarks.case import Case, Cases, Setup, Work
from tinybert_fast.benchmarks.cases.op_case import batch_of, normal, row_case, sum_of

COLUMNS = (1200, 3072)


def ours(x: Tensor, bias: Tensor, **how: Any) -> Tensor:
    return ops.bias_gelu(x, bias, **how)


def work_of(rows: int, columns: int, phase: str, size: int) -> Work:
    row = columns * size
    return sum_of(phase, Work(0, (2 * rows + 1) * row), Work(0, (3 * rows + 2) * row))


def cases(setup: Setup, *, name: str, columns: int) -> Iterator[Case]:
    batch, width = batch_of(setup)
    draw, rows = normal(setup), batch * width
    operands = (draw(rows, columns), draw(columns))
    work = partial(work_of, rows, columns)
    yield from row_case(name, setup, F.gelu, ours, operands, 2, work, behind_linear=True)


CASES: Cases = {
    name: partial(cases, name=name, columns=columns)
    for columns in COLUMNS
    for name in (f"bias_gelu_d{columns}",)
}
