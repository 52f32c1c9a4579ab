"""TinyBERT's hidden-state loss: project the student, mean squared error against the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from tinybert_fast.ops.dispatch import (
    FLOATS,
    FLOATS_AND_DOUBLE,
    TRITON_DEVICES,
    Impl,
    Limit,
    Limits,
    autocast,
    check_devices,
    choose,
    define,
    without_autocast,
)
from tinybert_fast.ops.layer_norm import refuses_columns
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.ops.loss import in_fp32, scalar_loss
from tinybert_fast.ops.packed import check_layout
from tinybert_fast.reference.hidden_mse import hidden_mse as reference
from tinybert_fast.tuned import hidden_mse as tuned

LIMITS = Limits(
    "hidden_mse",
    torch=Limit(FLOATS_AND_DOUBLE),
    triton=Limit(FLOATS, TRITON_DEVICES, refuses_columns),
)


def _flops(student, weight, bias, teacher, wanted):
    return 0 if weight is None else 2 * len(student) * weight.numel() * (1 + sum(wanted[:2]))


_forward = define(
    "hidden_mse_fwd(Tensor student, Tensor? weight, Tensor? bias, Tensor teacher)"
    " -> (Tensor loss, Tensor dstudent, Tensor dweight, Tensor dbias)",
    fake=lambda student, weight, bias, teacher: (
        in_fp32(student, ()),
        in_fp32(student),
        in_fp32(student, (0,) if weight is None else weight.shape),
        in_fp32(student, (0,) if bias is None else bias.shape),
    ),
    sparing=("torch", "triton"),
    flops=_flops,
    torch="tinybert_fast.tuned.hidden_mse:forward",
    triton="tinybert_fast.kernels.hidden_mse:forward",
)


def _forward_of_live(student, weight, bias, teacher, dead: Tensor, wanted, impl):
    """``_forward`` without the rows that ``dead`` names of the last ones, divided by the numbers
    that the rows before those have, or a row if there is none. PyTorch takes the last ones: the
    device alone knows how many are dead.
    """
    first = len(student) - len(dead)
    n = max(first, 1) * teacher.shape[1]
    live = (student[:first], weight, bias, teacher[:first])
    loss, dstudent, *others = _forward(*live, wanted, impl)
    last = (student[first:], weight, bias, teacher[first:], wanted, dead, n)
    more, dlast, *rest = without_autocast(tuned.forward, *last)
    sums = (a + b for a, b in zip(others, rest, strict=True))
    return loss + more, torch.cat((dstudent, dlast)), *sums


def _reference_of_live(student, weight, bias, teacher, dead: Tensor):
    first = len(student) - len(dead)
    alive = torch.cat((dead.new_ones(first), ~dead))
    student, teacher = student[alive], teacher[alive]
    return reference(student, weight, bias, teacher) * (len(student) / max(first, 1))


def hidden_mse(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    layout: SequenceLayout | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``F.mse_loss(F.linear(student, weight, bias), teacher)``, no gradient to the teacher.

    Args:
        student: (..., C). teacher: (..., Ct), the same leading sizes. fp16, bf16, fp32 or fp64 each
            (``triton``: no fp64 student, Ct up to 8192); any strides.
        weight, bias: (Ct, C) and (Ct,) of the projection; None where the widths agree.
        layout: of packed (T, C) rows; the mean leaves out those of its dummies.
        impl: "auto", a name, or one for each pass: ``ops/dispatch.py``.

    Returns:
        Scalar, fp32 or wider: the mean over all entries (Jiao et al. 2020, equations 8 and 9), 0
        of none. The product runs in the student's dtype, or in autocast's.

    Raises:
        ValueError: shapes, devices or a layout that disagree, or a named ``impl`` that cannot serve
            the call.
    """
    impls = choose(impl, LIMITS, student, columns=teacher.shape[-1])
    _check(student, teacher, weight, bias, layout)
    student = student if weight is None else autocast(student)
    rows = student.reshape(-1, student.shape[-1]).contiguous()
    targets = teacher.detach().reshape(-1, teacher.shape[-1]).contiguous()
    operands = (rows, weight, bias, targets)
    if layout is None or not layout.spare:
        if impls[0] == "reference":
            return without_autocast(reference, *operands)
        return scalar_loss(_forward, reference, impls, 3, *operands)
    layout = layout.counted
    if impls[0] == "reference":
        loss = without_autocast(_reference_of_live, *operands, layout.dead)
    else:
        both = (_forward_of_live, _reference_of_live)
        loss = scalar_loss(*both, impls, 3, *operands, layout.dead)
    return loss * max(len(rows) - layout.spare, 1) / layout.cu_seqlens[-1]


def _check(student, teacher, weight, bias, layout) -> None:
    check_devices("hidden_mse", student.device, teacher=teacher, weight=weight, bias=bias)
    if layout is not None:
        if student.dim() != 2:
            raise ValueError(
                f"hidden_mse: with a layout rows are packed (T, C); got {tuple(student.shape)}"
            )
        check_layout("hidden_mse", layout, student, leading=1)
    width, projection = student.shape[-1], None if weight is None else tuple(weight.shape)
    if weight is not None and (weight.dim() != 2 or weight.shape[1] != width):
        raise ValueError(
            f"hidden_mse: weight must be (teacher width, student width) for a student "
            f"{tuple(student.shape)}; got {projection}"
        )
    if weight is None and bias is not None:
        raise ValueError("hidden_mse: a bias comes with a weight; got a bias alone")
    width = width if weight is None else weight.shape[0]
    if student.shape[:-1] != teacher.shape[:-1] or width != teacher.shape[-1]:
        raise ValueError(
            f"hidden_mse: student {tuple(student.shape)} projected by {projection} does not give "
            f"the teacher's {tuple(teacher.shape)}; weight is (teacher width, student width)"
        )
    if bias is not None and bias.shape != (width,):
        raise ValueError(
            f"hidden_mse: bias must be ({width},), the teacher's width; got {tuple(bias.shape)}"
        )
