"""The hidden-state loss of one matched layer, forward and backward: B=32, N=128 tokens 312 wide,
projected to a teacher's 768; and 768 wide, projected too, as the released code does. On a GPU
B=256.

Work: the projection and its two gradients; student, teacher and weights read once, gradients
written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.benchmarks.case import BASELINE, CAREFUL, OURS, Case, Cases, Setup, Work
from tinybert_fast.benchmarks.cases.op_case import (
    compiled,
    loss_phases,
    loss_work,
    normal,
    op_case,
)
from tinybert_fast.benchmarks.op_call import OpCall

BATCH, GPU_BATCH, WIDTH, TEACHER_WIDTH = 32, 256, 128, 768
STUDENT_WIDTHS = (312, 768)
SMOKE_BATCH, SMOKE_WIDTH = 2, 16
SAME = "every token"


def autograd(student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(F.linear(student, weight, bias).float(), teacher.float())


def ours(student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor, **how: Any) -> Tensor:
    return ops.hidden_mse(student, teacher, weight, bias, **how)


def work_of(rows: int, columns: int, phase: str, size: int) -> Work:
    product = 2 * rows * columns * TEACHER_WIDTH
    trained = (rows * columns + (columns + 1) * TEACHER_WIDTH) * size
    read = trained + rows * TEACHER_WIDTH * size
    return loss_work(phase, (product, 2 * product), read, trained)


def cases(setup: Setup, *, name: str, columns: int) -> Iterator[Case]:
    batch, width = GPU_BATCH if setup.on_gpu else BATCH, WIDTH
    if setup.smoke:
        batch, width = SMOKE_BATCH, SMOKE_WIDTH
    draw, rows = normal(setup), batch * width
    operands = (
        draw(rows, columns),
        draw(TEACHER_WIDTH, columns) * columns**-0.5,
        draw(TEACHER_WIDTH),
        draw(rows, TEACHER_WIDTH),
    )
    providers = [OpCall("autograd", BASELINE, autograd, operands, 3)]
    if setup.compiles:
        providers.append(OpCall("compile", CAREFUL, compiled(autograd), operands, 3))
    providers.append(OpCall("ours", OURS, ours, operands, 3))
    yield from op_case(
        name,
        setup,
        batch,
        width,
        providers,
        partial(work_of, rows, columns),
        what=SAME,
        optional=("compile",),
        phases=loss_phases(setup),
    )


CASES: Cases = {
    name: partial(cases, name=name, columns=columns)
    for columns in STUDENT_WIDTHS
    for name in (f"hidden_mse_d{columns}",)
}
