"""TinyBERT's attention loss: mean squared error of pre-softmax scores, no N x N tensor kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tinybert_fast.ops.block_mask import BlockMask, check_block_mask
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
from tinybert_fast.ops.layout import SequenceLayout, counted_lengths, full_cu_seqlens
from tinybert_fast.ops.loss import check_sides, clearing, in_fp32, scalar_loss
from tinybert_fast.reference.attention_score_mse import attention_score_mse as reference
from tinybert_fast.reference.block_mask import allowed_pairs
from tinybert_fast.tuned.attention_score_mse import crossover

WIDEST_HEAD = 64  # of the Triton kernels: Gram matrices of wider heads would not fit


def _refuses(width: int = 1, dense_mask: bool = False, **others: Any) -> str | None:
    if width > WIDEST_HEAD:
        return f"heads of {width} numbers are wider than {WIDEST_HEAD}"
    return "block_mask is a dense tensor; give BlockMask.from_dense(mask)" if dense_mask else None


LIMITS = Limits(
    "attention_score_mse",
    torch=Limit(FLOATS_AND_DOUBLE),
    native=Limit(FLOATS_AND_DOUBLE, ("cpu",)),  # under masks and in fp64: PyTorch
    triton=Limit(FLOATS, TRITON_DEVICES, _refuses),
)
FORMS = ("auto", "direct", "gram")
LOSSES = ("full", "student")


def _gradient(x: Tensor, impl: str) -> Tensor:
    """An uninitialised gradient; kernels and C++ leave bf16's, which has fp32's range, in bf16."""
    bf16 = impl in ("triton", "native") and x.dtype == torch.bfloat16
    return x.new_empty(x.shape) if bf16 else in_fp32(x)


def _flops(q, k, p, r, cu_seqlens, longest, form, loss, block_mask, wanted) -> int:
    """Of tuned/attention_score_mse.py, in either form."""
    heads, d, d_teacher = q.shape[1], q.shape[2], p.shape[2]
    both, numbers = d + d_teacher, 0
    for n in counted_lengths(cu_seqlens, longest):
        if form == "gram" or (form == "auto" and n > crossover(d, d_teacher)):
            numbers += 2 * n * both * d * (1 + any(wanted))
            numbers += 2 * n * d_teacher**2 if loss == "full" else 0
        else:
            numbers += n * n * (both + 2 * d * any(wanted))
            numbers += n * n * d_teacher if loss == "student" else 0
    return 2 * heads * numbers


_forward = define(
    "attention_score_mse_fwd(Tensor q, Tensor k, Tensor p, Tensor r, Tensor cu_seqlens,"
    " SymInt max_length, str form, str loss, Tensor[] block_mask)"
    " -> (Tensor loss, Tensor dq, Tensor dk)",
    fake=lambda q, k, *rest: (in_fp32(q, ()), *(_gradient(x, rest[-1]) for x in (q, k))),
    fake_knows_impl=True,
    sparing=("torch", "native"),
    flops=_flops,
    torch="tinybert_fast.tuned.attention_score_mse:forward",
    native="tinybert_fast.tuned.attention_score_mse:forward_native",
    triton="tinybert_fast.kernels.attention_score_mse:forward",
)


def _by_definition(q, k, p, r, cu_seqlens, max_length, form, loss, block_mask: list[Tensor]):
    """The reference, which takes a mask as bool (N, N) or (B, N, N)."""
    dense = block_mask[0] if block_mask else None
    if len(block_mask) > 1:
        size = block_mask[0].shape[1] // 2 * block_mask[6].shape[1]
        dense = allowed_pairs(block_mask, size)
        dense = dense[0] if len(dense) == 1 else dense
    return reference(q, k, p, r, cu_seqlens, form, loss, dense)


def attention_score_mse(
    q_student: Tensor,
    k_student: Tensor,
    q_teacher: Tensor,
    k_teacher: Tensor,
    *,
    layout: SequenceLayout | None = None,
    form: str = "auto",
    loss: str = "full",
    block_mask: BlockMask | Tensor | None = None,
    count_padded_queries: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """``F.mse_loss(q_s @ k_s.mT / D_s**0.5, q_t @ k_t.mT / D_t**0.5)`` within each sequence.

    Args:
        q_student, k_student, q_teacher, k_teacher: packed (T, H, D) with ``layout``; or padded
            (B, N, H, D), where ``layout`` names the real tokens and None means all. Student and
            teacher may differ in D, not in H. fp16, bf16, fp32 or fp64 (``triton``: not fp64, D up
            to 64); any strides.
        form: "direct" (scores in blocks), "gram" (no scores, linear in the length), or "auto":
            whichever multiplies less, decided by lengths, widths and the mask, never by values.
        loss: "student" leaves out the teacher's own term, the mean of its squared scores: the
            same gradients, of a loss that is smaller by a constant (so it may be negative). The
            Gram form then takes fewer products; the direct form takes more.
        block_mask: only these pairs count: a BlockMask; or bool (N, N) or (B, N, N), which
            ``triton`` does not take. Both are indexed by token ranks. Gram sums over all pairs,
            so the form is direct.
        count_padded_queries: the released code's semantics, padded operands only: padding keys
            contribute 0, padding queries count, and the mean is over B * H * N * N.
        impl: "auto", a name, or one for each pass: ``ops/dispatch.py``.

    Precision, where rho = sum (S - T)^2 / sum (S^2 + T^2): Gram's gradients, before they are
    rounded to the operands' dtype, are within 1e-3 of exact ones down to rho = 3e-5; its full loss
    is within 1e-3, and 2e-3 in half precision, down to rho = 1e-3 (below, it loses digits as
    1 / rho grows, and is never negative). The direct form loses none of them.

    Returns:
        Scalar, fp32 or wider: by default the mean over the H * sum(n^2) real (query, key) pairs
        (Jiao et al. 2020, equation 7); under a mask over those that it allows, 0 if there is none.
        No gradient to the teacher.

    Raises:
        ValueError: shapes, devices or a layout that disagree (the message names the remedy for
            different head counts), an unknown form or loss, the Gram form or
            ``count_padded_queries`` under a mask, or a named ``impl`` that cannot serve the call.
    """
    widths = q_student.shape[-1], q_teacher.shape[-1]
    facts = {"width": max(widths), "dense_mask": isinstance(block_mask, Tensor)}
    impls = choose(impl, LIMITS, q_student, **facts)
    q, k, p, r = q_student, k_student, q_teacher.detach(), k_teacher.detach()
    _check((q, k, p, r), layout, form, loss, block_mask, count_padded_queries)
    if count_padded_queries and layout is not None:
        real = layout.pad(torch.ones_like(layout.rows, dtype=torch.bool), fill=0)[..., None, None]
        k, r, layout = k * real, r * real, None  # what is left counts every position
    forward: Callable = _forward
    if layout is None:  # short sequences' products take no longer than a whole layout
        batch, longest = q.shape[:2]
        cu_seqlens = full_cu_seqlens(batch, longest, q.device)
        operands = tuple(x.flatten(0, 1) for x in (q, k, p, r))
    else:
        operands = (q, k, p, r) if q.dim() == 3 else tuple(layout.pack(x) for x in (q, k, p, r))
        layout = layout.counted
        cu_seqlens, longest = layout.cu_seqlens, layout.max_length
        forward = clearing(forward, layout)
    mask: list[Tensor] = []
    if block_mask is not None:
        form = "direct"
        mask = list(block_mask.lists) if isinstance(block_mask, BlockMask) else [block_mask]
    elif impls[0] == "triton" and form == "auto":  # all sequences in one launch
        form = "gram" if longest > crossover(*widths) else "direct"
    call = (*operands, cu_seqlens, longest, form, loss, mask)
    if impls[0] == "reference":
        return without_autocast(_by_definition, *call)
    return scalar_loss(forward, _by_definition, impls, 2, *call)


def _check(operands, layout, form, loss, block_mask, count_padded_queries) -> None:
    q, _, p, _ = operands
    names = ("q_student", "k_student", "q_teacher", "k_teacher")
    check_sides("attention_score_mse", names, operands, layout)
    if q.shape[-2] != p.shape[-2]:
        raise ValueError(
            f"attention_score_mse: the student has {q.shape[-2]} heads and the teacher "
            f"{p.shape[-2]}; scores are matched head by head, so give the student "
            f"{p.shape[-2]} heads (num_attention_heads={p.shape[-2]})"
        )
    if form not in FORMS:
        raise ValueError(f"attention_score_mse: form={form!r} is not one of {FORMS}")
    if loss not in LOSSES:
        raise ValueError(f"attention_score_mse: loss={loss!r} is not one of {LOSSES}")
    if count_padded_queries and q.dim() == 3:
        raise ValueError(
            "attention_score_mse: count_padded_queries=True needs padded (B, N, H, D) operands; "
            "packed ones have no padding rows to count"
        )
    if block_mask is None:
        return
    if form == "gram":
        raise ValueError(
            "attention_score_mse: form='gram' sums over all pairs of a sequence, not those of a "
            "block_mask; use form='direct' or 'auto'"
        )
    if count_padded_queries:
        raise ValueError(
            "attention_score_mse: count_padded_queries=True is the released code's loss, which has "
            "no block_mask; leave one of them out"
        )
    batch, longest = q.shape[:2] if layout is None else (layout.batch_size, layout.max_length)
    check_block_mask("attention_score_mse", block_mask, longest, batch, q.device)
