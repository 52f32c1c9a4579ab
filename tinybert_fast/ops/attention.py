"""Scaled dot-product attention over packed or padded sequences."""

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
    check_dropout,
    choose,
    define,
    reference_gradient,
    without_autocast,
)
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.reference.attention import attention as reference

WIDEST_HEAD = 128  # of the Triton kernels


def _refuses(
    width: int = 1, scale: float | None = None, masked: bool = False, **others: Any
) -> str | None:
    if width > WIDEST_HEAD:
        return f"heads of {width} numbers are wider than {WIDEST_HEAD}"
    if scale is not None and not scale > 0:
        return f"scale={scale} is not positive"
    return "it takes no block mask" if masked else None


LIMITS = Limits(
    "attention",
    torch=Limit(FLOATS_AND_DOUBLE),
    triton=Limit(FLOATS, TRITON_DEVICES, _refuses),
)
DIRECTIONS = ("both", "causal", "anti_causal")

_CALL = (
    "Tensor cu_seqlens, SymInt max_length, float scale, str direction, float dropout_p,"
    " Tensor? seed, int site, Tensor? block_mask"
)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


_forward = define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor out, Tensor lse, Tensor rng)",
    fake=lambda q, k, v, *call: (
        q.new_empty(v.shape),
        q.new_empty(q.shape[:2], dtype=_wide(q)),
        q.new_empty(2, dtype=torch.int64),
    ),
    torch="tinybert_fast.tuned.attention:forward",
    triton="tinybert_fast.kernels.attention:forward",
)
_backward = define(
    "attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor rng,"
    f" {_CALL}) -> (Tensor dq, Tensor dk, Tensor dv)",
    fake=lambda grad, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    torch="tinybert_fast.tuned.attention:backward",
    triton="tinybert_fast.kernels.attention:backward",
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, seed, block_mask, settings, impls):
        max_length, scale, direction, dropout_p, site = settings
        call = (cu_seqlens, max_length, scale, direction, dropout_p, seed, site, block_mask)
        out, lse, rng = _forward(q, k, v, *call, impls[0])
        ctx.save_for_backward(q, k, v, out, lse, rng, cu_seqlens, seed, block_mask)
        ctx.settings, ctx.impl = settings, impls[1]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse, rng, cu_seqlens, seed, block_mask = ctx.saved_tensors
        max_length, scale, direction, dropout_p, site = ctx.settings
        if ctx.impl == "reference":
            operands = (q, k, v, cu_seqlens, scale, direction, dropout_p, seed, site, block_mask)
            needs = (*ctx.needs_input_grad[:3], *(False,) * 7)
            grads = reference_gradient(reference, operands, needs, grad)[:3]
        else:
            call = (cu_seqlens, max_length, scale, direction, dropout_p, seed, site, block_mask)
            grads = _backward(grad, q, k, v, out, lse, rng, *call, ctx.impl)
        return (*grads, None, None, None, None, None)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout | None = None,
    scale: float | None = None,
    direction: str = "both",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    block_mask: Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``dropout(softmax(q @ k.mT * scale)) @ v`` within each sequence.

    Args:
        q, k, v: packed (T, H, D) with ``layout``; or padded (B, N, H, D), where ``layout`` names
            the real tokens and None means all. Any strides.
        scale: D**-0.5 by default.
        direction: "both", "causal" (a token sees itself and what precedes it) or "anti_causal".
        dropout_p, seed, site: rate, int64 (2,) seed of the step, and the number of this place in
            the model; the rate is 0 or above 1/512 and below 1 - 1/512. The ``torch``
            implementation draws from torch's own generator, every other one drops the cells of
            ``reference/philox.py``.
        block_mask: bool (N, N) or (B, N, N) in token ranks, True where attention is allowed.

    Returns:
        The shape and dtype of ``q``; padding rows and queries with no allowed key are zero.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, an unknown direction, a dropout rate
            out of range, or a named ``impl`` that cannot serve the call.
    """
    facts = {"width": q.shape[-1], "scale": scale, "masked": block_mask is not None}
    impls = choose(impl, LIMITS, q, dropout_p=dropout_p, **facts)
    _check(q, k, v, layout, direction, block_mask)
    check_dropout("attention", dropout_p, seed)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    padded = q.dim() == 4
    layout = layout or SequenceLayout.full(q.shape[0], q.shape[1], q.device)
    if padded:
        q, k, v = (layout.pack(x) for x in (q, k, v))
    cu_seqlens = layout.cu_seqlens
    if impls[0] == "reference":
        out = without_autocast(
            reference, q, k, v, cu_seqlens, scale, direction, dropout_p, seed, site, block_mask
        )
    else:
        settings = (layout.max_length, scale, direction, dropout_p, site)
        out = _Attention.apply(q, k, v, cu_seqlens, seed, block_mask, settings, impls)
    return layout.pad(out) if padded else out


def _check(q, k, v, layout, direction, block_mask) -> None:
    def shapes() -> str:
        return ", ".join(f"{n} {tuple(x.shape)}" for n, x in (("q", q), ("k", k), ("v", v)))

    if q.dim() not in (3, 4) or not q.shape == k.shape == v.shape:
        raise ValueError(
            f"attention: q, k and v must share one shape, packed (T, H, D) or padded (B, N, H, D); "
            f"got {shapes()}"
        )
    if len({x.dtype for x in (q, k, v)}) > 1 or len({x.device for x in (q, k, v)}) > 1:
        kinds = ", ".join(f"{x.dtype} on {x.device}" for x in (q, k, v))
        raise ValueError(f"attention: q, k and v must share dtype and device; got {kinds}")
    if q.dim() == 3 and layout is None:
        raise ValueError(
            "attention: packed (T, H, D) operands need layout=, a SequenceLayout that says where "
            "each sequence starts"
        )
    if layout is not None:
        expected = (layout.total,) if q.dim() == 3 else (layout.batch_size, layout.width)
        if tuple(q.shape[: len(expected)]) != expected:
            raise ValueError(
                f"attention: the layout describes leading sizes {expected}; got {shapes()}"
            )
    if direction not in DIRECTIONS:
        raise ValueError(f"attention: direction={direction!r} is not one of {DIRECTIONS}")
    if block_mask is not None:
        longest = layout.max_length if layout is not None else q.shape[1]
        batch = layout.batch_size if layout is not None else q.shape[0]
        sizes = block_mask.shape
        square = len(sizes) >= 2 and sizes[-2] == sizes[-1] and sizes[:-2] in ((), (batch,))
        if block_mask.dtype != torch.bool or not square or sizes[-1] < longest:
            raise ValueError(
                f"attention: block_mask must be bool (N, N) or ({batch}, N, N), N >= {longest}; "
                f"got {block_mask.dtype} {tuple(sizes)}"
            )
