"""The hidden-state loss of one matched layer, forward and backward: B=32, N=128 tokens 312 wide,
projected to a teacher's 768; and 768 wide, projected too, as the released code does.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.benchmarks.case import BASELINE, OURS, Case, Cases, Check, Setup
from tinybert_fast.benchmarks.op_call import OpCall

BATCH, WIDTH, TEACHER_WIDTH = 32, 128, 768
STUDENT_WIDTHS = (312, 768)
SMOKE_BATCH, SMOKE_WIDTH = 2, 16
SAME = "every token"


def autograd(student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(F.linear(student, weight, bias).float(), teacher.float())


def ours(student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor) -> Tensor:
    return ops.hidden_mse(student, teacher, weight, bias)


def cases(setup: Setup, *, name: str, columns: int) -> Iterator[Case]:
    batch, width = (SMOKE_BATCH, SMOKE_WIDTH) if setup.smoke else (BATCH, WIDTH)
    generator = setup.generator()
    shapes = (batch * width, columns), (TEACHER_WIDTH, columns), (TEACHER_WIDTH,)
    operands = [torch.randn(shape, generator=generator) for shape in shapes]
    operands[1] *= columns**-0.5
    operands.append(torch.randn(batch * width, TEACHER_WIDTH, generator=generator))
    call = tuple(x.to(setup.device) for x in operands)
    yield Case(
        name=name,
        batch=batch,
        width=width,
        valid_tokens=batch * width,
        dropout=0.0,
        optimizer="none",
        providers=[
            OpCall("autograd", BASELINE, autograd, call, 3),
            OpCall("ours", OURS, ours, call, 3),
        ],
        checks=(Check(SAME, "autograd", ("ours",)),),
    )


CASES: Cases = {
    name: partial(cases, name=name, columns=columns)
    for columns in STUDENT_WIDTHS
    for name in (f"hidden_mse_d{columns}",)
}
