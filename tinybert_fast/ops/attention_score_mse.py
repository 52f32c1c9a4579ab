"""TinyBERT's attention loss: mean squared error of pre-softmax scores, no N x N tensor kept."""

from __future__ import annotations

from typing import Any

import torch
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
    without_autocast,
)
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.ops.loss import ScalarLoss, in_fp32
from tinybert_fast.reference.attention_score_mse import attention_score_mse as reference
from tinybert_fast.tuned.attention_score_mse import crossover

WIDEST_HEAD = 64  # of the Triton kernels: six Gram matrices of wider heads would not fit


def _refuses(width: int = 1, **others: Any) -> str | None:
    return f"heads of {width} numbers are wider than {WIDEST_HEAD}" if width > WIDEST_HEAD else None


LIMITS = Limits(
    "attention_score_mse",
    torch=Limit(FLOATS_AND_DOUBLE),
    triton=Limit(FLOATS, TRITON_DEVICES, _refuses),
)
FORMS = ("auto", "direct", "gram")

_forward = define(
    "attention_score_mse_fwd(Tensor q, Tensor k, Tensor p, Tensor r, Tensor cu_seqlens,"
    " SymInt max_length, str form)"
    " -> (Tensor loss, Tensor dq, Tensor dk)",
    fake=lambda q, k, *rest: (in_fp32(q, ()), in_fp32(q), in_fp32(k)),
    torch="tinybert_fast.tuned.attention_score_mse:forward",
    triton="tinybert_fast.kernels.attention_score_mse:forward",
)


def attention_score_mse(
    q_student: Tensor,
    k_student: Tensor,
    q_teacher: Tensor,
    k_teacher: Tensor,
    *,
    layout: SequenceLayout | None = None,
    form: str = "auto",
    count_padded_queries: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """``F.mse_loss(q_s @ k_s.mT / D_s**0.5, q_t @ k_t.mT / D_t**0.5)`` within each sequence.

    Args:
        q_student, k_student, q_teacher, k_teacher: packed (T, H, D) with ``layout``; or padded
            (B, N, H, D), where ``layout`` names the real tokens and None means all. Student and
            teacher may differ in D, not in H.
        form: "direct" (scores in blocks), "gram" (linear in the length), or "auto": whichever
            multiplies less at each length. The reported Gram loss loses digits when it is below
            a thousandth of the scores' squares; its gradients stay accurate.
        count_padded_queries: the released code's semantics, padded operands only: padding keys
            contribute 0, padding queries count, and the mean is over B * H * N * N.

    Returns:
        Scalar, fp32 or wider: by default the mean over the H * sum(n^2) real (query, key) pairs
        (Jiao et al. 2020, equation 7). No gradient to the teacher.

    Raises:
        ValueError: shapes that disagree (the message names the remedy for different head counts),
            an unknown form, or a named ``impl`` that cannot serve the call.
    """
    widths = q_student.shape[-1], q_teacher.shape[-1]
    impls = choose(impl, LIMITS, q_student, width=max(widths))
    q, k, p, r = q_student, k_student, q_teacher.detach(), k_teacher.detach()
    _check((q, k, p, r), layout, form, count_padded_queries)
    if count_padded_queries and layout is not None:
        real = layout.pad(torch.ones_like(layout.rows, dtype=torch.bool), fill=0)[..., None, None]
        k, r, layout = k * real, r * real, None  # what is left counts every position
    layout = layout or SequenceLayout.full(q.shape[0], q.shape[1], q.device)
    operands = (q, k, p, r) if q.dim() == 3 else tuple(layout.pack(x) for x in (q, k, p, r))
    if impls[0] == "triton" and form == "auto":  # all sequences in one launch
        form = "gram" if layout.max_length > crossover(*widths) else "direct"
    call = (*operands, layout.cu_seqlens, layout.max_length, form)
    if impls[0] == "reference":
        return without_autocast(reference, *call)
    return ScalarLoss.apply(_forward, reference, impls, *call)


def _check(operands, layout, form, count_padded_queries) -> None:
    q, k, p, r = operands

    def shapes() -> str:  # built on refusal alone: Dynamo cannot trace the join
        names = ("q_student", "k_student", "q_teacher", "k_teacher")
        return ", ".join(f"{n} {tuple(x.shape)}" for n, x in zip(names, operands, strict=True))

    if q.dim() not in (3, 4) or q.shape != k.shape or p.shape != r.shape or q.dim() != p.dim():
        raise ValueError(
            "attention_score_mse: queries and keys must agree, packed (T, H, D) or padded "
            f"(B, N, H, D); got {shapes()}"
        )
    if q.shape[-2] != p.shape[-2]:
        raise ValueError(
            f"attention_score_mse: the student has {q.shape[-2]} heads and the teacher "
            f"{p.shape[-2]}; scores are matched head by head, so give the student "
            f"{p.shape[-2]} heads (num_attention_heads={p.shape[-2]})"
        )
    if q.shape[:-2] != p.shape[:-2]:
        raise ValueError(
            f"attention_score_mse: student and teacher must see the same tokens; got {shapes()}"
        )
    if q.dim() == 3 and layout is None:
        raise ValueError("attention_score_mse: packed (T, H, D) operands need layout=")
    if layout is not None:
        expected = (layout.total,) if q.dim() == 3 else (layout.batch_size, layout.width)
        if tuple(q.shape[: len(expected)]) != expected:
            raise ValueError(
                f"attention_score_mse: the layout has leading sizes {expected}; got {shapes()}"
            )
    if form not in FORMS:
        raise ValueError(f"attention_score_mse: form={form!r} is not one of {FORMS}")
    if count_padded_queries and q.dim() == 3:
        raise ValueError(
            "attention_score_mse: count_padded_queries=True needs padded (B, N, H, D) operands; "
            "packed ones have no padding rows to count"
        )
