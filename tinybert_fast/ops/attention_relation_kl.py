"""MiniLM's loss: KL divergence of softmaxed self-relations, no N x N tensor kept."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from tinybert_fast.ops.dispatch import (
    FLOATS,
    FLOATS_AND_DOUBLE,
    TRITON_DEVICES,
    Impl,
    Limit,
    Limits,
    choose,
    define,
    integer,
    without_autocast,
)
from tinybert_fast.ops.layout import SequenceLayout, counted_lengths, full_tables
from tinybert_fast.ops.loss import check_sides, clearing, in_fp32, scalar_loss
from tinybert_fast.reference.attention_relation_kl import attention_relation_kl as reference

WIDEST_HEAD = 128  # of the Triton kernels


def _refuses(width: int = 1, **others: Any) -> str | None:
    if width > WIDEST_HEAD:
        return f"relation heads of {width} numbers are wider than {WIDEST_HEAD}"
    return None


LIMITS = Limits(
    "attention_relation_kl",
    torch=Limit(FLOATS_AND_DOUBLE),
    native=Limit(FLOATS_AND_DOUBLE, ("cpu",)),  # in fp64: PyTorch
    triton=Limit(FLOATS, TRITON_DEVICES, _refuses),
)


def _flops(a, b, c, d, cu_seqlens, work, longest, wanted) -> int:
    pairs = sum(n * n for n in counted_lengths(cu_seqlens, longest))
    gradients = any(wanted) * (1 if b is None else 2)
    return 2 * pairs * a.shape[1] * (a.shape[2] * (1 + gradients) + c.shape[2])


_forward = define(
    "attention_relation_kl_fwd(Tensor a, Tensor? b, Tensor c, Tensor? d, Tensor cu_seqlens,"
    " Tensor work, SymInt max_length) -> (Tensor loss, Tensor da, Tensor db)",
    fake=lambda a, b, *rest: (in_fp32(a, ()), in_fp32(a), in_fp32(a, (0,) if b is None else None)),
    sparing=("torch", "native"),
    flops=_flops,
    torch="tinybert_fast.tuned.attention_relation_kl:forward",
    native="tinybert_fast.tuned.attention_relation_kl:forward_native",
    triton="tinybert_fast.kernels.attention_relation_kl:forward",
)


def attention_relation_kl(
    a_student: Tensor,
    b_student: Tensor,
    a_teacher: Tensor,
    b_teacher: Tensor,
    *,
    relation_heads: int,
    layout: SequenceLayout | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``F.kl_div(log_softmax(a_s @ b_s.mT / d_s**0.5), softmax(a_t @ b_t.mT / d_t**0.5),
    reduction="sum") / (T * R)``, pairs within each of the sequences, whose tokens are T, after H
    heads of D numbers have become R = ``relation_heads`` of d = H D / R.

    Args:
        a_student, b_student, a_teacher, b_teacher: packed (T, H, D) with ``layout``; or padded
            (B, N, H, D), where ``layout`` names the real tokens and None means all. Queries and
            keys, or one tensor twice: queries, keys or values (a relation with itself, which costs
            less and whose gradient is the sum of both). Student and teacher may differ in H and D.
            fp16, bf16, fp32 or fp64 (``triton``: not fp64, d up to 128); any strides.
        relation_heads: R, of student and teacher alike; divides both widths H D.
        impl: "auto", a name, or one for each pass: ``ops/dispatch.py``.

    Returns:
        Scalar, fp32 or wider: the mean over real tokens and relation heads of KL(teacher ||
        student) (Wang et al. 2020, arXiv:2002.10957; Wang et al. 2021, arXiv:2012.15828). No
        gradient to the teacher.

    Raises:
        ValueError: shapes, devices or a layout that disagree, relation heads that do not divide a
            width, or a named ``impl`` that cannot serve the call.
    """
    operands = (a_student, b_student, a_teacher, b_teacher)
    _check(operands, layout, relation_heads)
    widths = [x.shape[-2] * x.shape[-1] // relation_heads for x in (a_student, a_teacher)]
    impls = choose(impl, LIMITS, a_student, width=max(widths))

    def regrouped(x: Tensor) -> Tensor:
        if x.dim() == 4:
            x = x.flatten(0, 1) if layout is None else layout.pack(x)
        return x.flatten(1).unflatten(1, (relation_heads, -1))

    a, c = regrouped(a_student), regrouped(a_teacher.detach())
    b = d = None
    if a_student is not b_student or a_teacher is not b_teacher:
        b, d = regrouped(b_student), regrouped(b_teacher.detach())
    counted, forward = None, _forward
    if layout is None:
        batch, longest = a_student.shape[:2]
        cu_seqlens, work, _ = full_tables(batch, longest, a.device)
    else:
        counted = layout.counted
        cu_seqlens, work, longest = counted.cu_seqlens, counted.work, counted.max_length
        forward = clearing(_forward, counted)
    call = (a, b, c, d, cu_seqlens, work, longest)
    if impls[0] == "reference":
        loss = without_autocast(reference, *call)
    else:
        loss = scalar_loss(forward, reference, impls, 2, *call)
    return loss if counted is None else counted.over_tokens(loss)


def _check(operands, layout, relation_heads) -> None:
    names = ("a_student", "b_student", "a_teacher", "b_teacher")
    check_sides("attention_relation_kl", names, operands, layout)
    widths = [x.shape[-2] * x.shape[-1] for x in operands[::2]]
    integer("attention_relation_kl", "relation_heads", relation_heads, 1, max(1, *widths))
    if any(width % relation_heads for width in widths):
        raise ValueError(
            f"attention_relation_kl: relation_heads={relation_heads} must divide the student's "
            f"width {widths[0]} and the teacher's {widths[1]}; take a divisor of "
            f"{math.gcd(*widths)}"
        )
