"""TinyBERT's hidden-state loss: project the student, mean squared error against the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from tinybert_fast.ops.dispatch import FLOATS_AND_DOUBLE, Impl, Limit, Limits, choose, define
from tinybert_fast.ops.loss import ScalarLoss
from tinybert_fast.reference.hidden_mse import hidden_mse as reference

LIMITS = Limits("hidden_mse", torch=Limit(FLOATS_AND_DOUBLE))


def _fake(student, weight, bias, teacher):
    none = student.new_empty(0)
    return (
        student.new_empty((), dtype=torch.promote_types(student.dtype, torch.float32)),
        torch.empty_like(student),
        none if weight is None else torch.empty_like(weight),
        none.clone() if bias is None else torch.empty_like(bias),
    )


_forward = define(
    "hidden_mse_fwd(Tensor student, Tensor? weight, Tensor? bias, Tensor teacher)"
    " -> (Tensor loss, Tensor dstudent, Tensor dweight, Tensor dbias)",
    fake=_fake,
    torch="tinybert_fast.tuned.hidden_mse:forward",
)


def hidden_mse(
    student: Tensor,
    teacher: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """``F.mse_loss(F.linear(student, weight, bias), teacher)``, no gradient to the teacher.

    Args:
        student: (..., C). teacher: (..., Ct), the same leading sizes.
        weight, bias: (Ct, C) and (Ct,) of the projection; None where the widths agree.

    Returns:
        Scalar, fp32 or wider: the mean over all entries (Jiao et al. 2020, equations 8 and 9).

    Raises:
        ValueError: shapes that disagree, or a named ``impl`` that cannot serve the call.
    """
    impls = choose(impl, LIMITS, student)
    width = student.shape[-1] if weight is None else weight.shape[0]
    if student.shape[:-1] != teacher.shape[:-1] or width != teacher.shape[-1]:
        raise ValueError(
            f"hidden_mse: student {tuple(student.shape)} projected by "
            f"{None if weight is None else tuple(weight.shape)} does not give the teacher's "
            f"{tuple(teacher.shape)}; weight is (teacher width, student width)"
        )
    if weight is None and bias is not None:
        raise ValueError("hidden_mse: a bias comes with a weight; got a bias alone")
    rows = student.reshape(-1, student.shape[-1])
    targets = teacher.detach().reshape(-1, teacher.shape[-1])
    operands = (rows, weight, bias, targets)
    if impls[0] == "reference":
        return reference(*operands)
    return ScalarLoss.apply(_forward, reference, impls, *operands)
