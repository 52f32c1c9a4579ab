"""Scaled dot-product attention over packed or padded sequences."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast.ops.block_mask import BlockMask, check_block_mask
from tinybert_fast.ops.dispatch import (
    FLOATS,
    FLOATS_AND_DOUBLE,
    TRITON_DEVICES,
    Impl,
    Limit,
    Limits,
    apply,
    check_dropout,
    choose,
    define,
    reference_gradient,
    without_autocast,
)
from tinybert_fast.ops.layout import SequenceLayout, counted_lengths, full_tables
from tinybert_fast.ops.native import DIRECTIONS
from tinybert_fast.ops.packed import check_layout
from tinybert_fast.reference.attention import attention as reference

WIDEST_HEAD = 128  # of the Triton kernels
LOAD = 16  # bytes, the widest
HEAD_UNIT = LOAD // 2  # numbers in half precision, which fused kernels ask for too
READ_ONCE = 128  # tokens of a sequence, in whose backward a program reads each head once


def _refuses(
    width: int = 1, scale: float | None = None, dense_mask: bool = False, **others: Any
) -> str | None:
    if width > WIDEST_HEAD:
        return f"heads of {width} numbers are wider than {WIDEST_HEAD}"
    if scale is not None and not scale > 0:
        return f"scale={scale} is not positive"
    return "block_mask is a dense tensor; give BlockMask.from_dense(mask)" if dense_mask else None


LIMITS = Limits(
    "attention",
    torch=Limit(FLOATS_AND_DOUBLE),
    native=Limit(FLOATS_AND_DOUBLE, ("cpu",)),  # of masks and fp64: PyTorch, the same dropout
    triton=Limit(FLOATS, TRITON_DEVICES, _refuses),
)
_CALL = (
    "Tensor cu_seqlens, Tensor? work, SymInt max_length, float scale, str direction,"
    " float dropout_p, Tensor? seed, int site, Tensor[] block_mask"
)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _flops(products: int, heads: Tensor, cu_seqlens: Tensor, longest: int) -> int:
    """Of so many products for each head of (T, H, D) or (T, 3, H, D)."""
    pairs = sum(n * n for n in counted_lengths(cu_seqlens, longest))
    return 2 * products * pairs * heads.shape[-2] * heads.shape[-1]


_forward = define(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_CALL}) -> (Tensor out, Tensor lse, Tensor rng)",
    fake=lambda q, k, v, *call: (
        q.new_empty(v.shape),
        q.new_empty(q.shape[:-1], dtype=_wide(q)),
        q.new_empty(2, dtype=torch.int64),
    ),
    flops=lambda q, k, v, cu_seqlens, work, longest, *rest: _flops(2, q, cu_seqlens, longest),
    torch="tinybert_fast.tuned.attention:forward",
    native="tinybert_fast.tuned.attention:forward_native",
    triton="tinybert_fast.kernels.attention:forward",
)
_backward = define(
    "attention_bwd(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor rng,"
    f" {_CALL}) -> (Tensor dq, Tensor dk, Tensor dv)",
    fake=lambda grad, q, k, v, *rest: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    flops=lambda *args: _flops(5, args[1], args[7], args[9]),  # scores once more
    torch="tinybert_fast.tuned.attention:backward",
    native="tinybert_fast.tuned.attention:backward_native",
    triton="tinybert_fast.kernels.attention:backward",
)
_backward_of_stack = define(
    "attention_stack_bwd(Tensor grad, Tensor stack, Tensor? dq, Tensor? dk, Tensor? dv, Tensor out,"
    f" Tensor lse, Tensor rng, {_CALL}) -> Tensor gradient",
    fake=lambda grad, stack, *rest: torch.empty_like(stack),
    flops=lambda *args: _flops(5, args[1], args[8], args[10]),
    triton="tinybert_fast.kernels.attention:backward_of_stack",
)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, work, seed, settings, impls, *masks):
        *call, forward_masks = settings
        mask = list(masks[:forward_masks])
        arguments = _arguments(cu_seqlens, work, seed, mask, call)
        out, lse, rng = _forward(q, k, v, *arguments, impls[0])
        ctx.save_for_backward(q, k, v, out, lse, rng, cu_seqlens, work, seed, *masks)
        ctx.settings, ctx.impl = settings, impls[1]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        q, k, v, out, lse, rng, cu_seqlens, work, seed, *masks = ctx.saved_tensors
        *call, forward_masks = ctx.settings
        if ctx.impl == "reference":
            _, scale, direction, dropout_p, site = call
            mask = masks[forward_masks] if len(masks) > forward_masks else None
            operands = (q, k, v, cu_seqlens, scale, direction, dropout_p, seed, site, mask)
            needs = (*ctx.needs_input_grad[:3], *(False,) * 7)
            grads = reference_gradient(reference, operands, needs, grad)[:3]
        else:
            arguments = _arguments(cu_seqlens, work, seed, masks[:forward_masks], call)
            grads = _backward(grad, q, k, v, out, lse, rng, *arguments, ctx.impl)
        return (*grads, *(None,) * (5 + len(masks)))


class _AttentionOfStack(torch.autograd.Function):
    """Of queries, keys and values in one tensor, whose gradient comes as one; hands out views of
    them, and its kernels add what is found of these to the gradient: nothing is padded or summed
    behind them."""

    @staticmethod
    def forward(ctx, stack, cu_seqlens, work, seed, settings, impl, give, width, *mask):
        ctx.set_materialize_grads(False)
        arguments = _arguments(cu_seqlens, work, seed, list(mask), settings)
        out, lse, rng = _forward(*stack.unbind(1), *arguments, impl)
        ctx.save_for_backward(stack, out, lse, rng, cu_seqlens, work, seed, *mask)
        ctx.settings, ctx.impl = settings, impl
        return out, *(stack[:, i, :, :width].detach() if i in give else None for i in range(3))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, dq, dk, dv):
        stack, out, lse, rng, cu_seqlens, work, seed, *mask = ctx.saved_tensors
        grad = torch.zeros_like(out) if grad is None else grad
        arguments = _arguments(cu_seqlens, work, seed, mask, ctx.settings)
        gradient = _backward_of_stack(grad, stack, dq, dk, dv, out, lse, rng, *arguments, ctx.impl)
        return gradient, *(None,) * (7 + len(mask))


def _arguments(cu_seqlens, work, seed, mask, call) -> tuple:
    max_length, scale, direction, dropout_p, site = call
    return cu_seqlens, work, max_length, scale, direction, dropout_p, seed, site, mask


def _mask_of(block_mask: BlockMask | Tensor | None, impl: str) -> tuple[Tensor, ...]:
    """As an implementation takes it: the lists, or one dense mask, which the reference needs."""
    if block_mask is None:
        return ()
    if isinstance(block_mask, Tensor):
        return (block_mask,)
    if impl != "reference":
        return block_mask.lists
    return (block_mask.dense[0] if block_mask.masks == 1 else block_mask.dense,)


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
    block_mask: BlockMask | Tensor | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``dropout(softmax(q @ k.mT * scale)) @ v`` within each sequence (Vaswani et al. 2017,
    arXiv:1706.03762, equation 1).

    Args:
        q, k, v: packed (T, H, D) with ``layout``; or padded (B, N, H, D), where ``layout`` names
            the real tokens and None means all. One dtype, fp16, bf16, fp32 or fp64 (``triton``:
            not fp64, D up to 128); any strides. On a GPU heads that fill no whole 16 bytes are
            copied, of sequences of more than 128 tokens.
        scale: D**-0.5 by default.
        direction: "both", "causal" (a token sees itself and what precedes it) or "anti_causal".
        dropout_p, seed, site: rate, contiguous int64 (2,) seed of the step, and the number of this
            place in the model, 0 to 2^32 - 1; the rate is 0 or above 1/512 and below 1 - 1/512. The
            ``torch`` implementation draws from torch's own generator, every other one drops the
            cells of ``reference/philox.py``.
        block_mask: a BlockMask; or bool (N, N) or (B, N, N), True where attention is allowed, which
            ``triton`` does not take. Both are indexed by token ranks.
        impl: "auto", a name, or one for each pass: ``ops/dispatch.py``.

    Returns:
        The shape and dtype of ``q``; padding rows and queries with no allowed key are zero.

    Raises:
        ValueError: shapes, dtypes, devices or a layout that disagree, an unknown direction, a
            dropout rate, seed or site that is none, or a named ``impl`` that cannot serve the call.
    """
    facts = {
        "width": q.shape[-1],
        "scale": scale,
        "dense_mask": isinstance(block_mask, Tensor),
    }
    impls = choose(impl, LIMITS, q, dropout_p=dropout_p, **facts)
    _check(q, k, v, layout, direction, block_mask)
    check_dropout("attention", dropout_p, seed, site, q.device)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    in_place = impls == ("triton", "triton")  # reads padded rows where they are
    padded, shape = q.dim() == 4, q.shape
    whole = padded and (layout is None or layout.is_full)  # nothing is padding
    if whole and all(x.stride(0) == x.stride(1) * shape[1] for x in (q, k, v)):
        packs = True  # views: every row is written, and none is filled with zeros before
    else:
        packs = padded and not (in_place and (layout is None or not layout.has_holes))
    if layout is None:
        longest = shape[1]
        cu_seqlens, work, padded_work = full_tables(shape[0], longest, q.device)
    else:
        longest = layout.max_length
        cu_seqlens, work, padded_work = layout.cu_seqlens, layout.work, layout.padded_work
    if packs:
        q, k, v = (x.flatten(0, 1) if layout is None else layout.pack(x) for x in (q, k, v))
    width, missing = q.shape[-1], _missing(q, longest, impls[0])
    if missing:
        q, k, v = (F.pad(x, (0, missing)) for x in (q, k, v))
    forms = [_mask_of(block_mask, name) for name in impls]
    if impls[0] == "reference":
        mask = forms[0][0] if forms[0] else None
        out = without_autocast(
            reference, q, k, v, cu_seqlens, scale, direction, dropout_p, seed, site, mask
        )
    else:
        settings = (longest, scale, direction, dropout_p, site, len(forms[0]))
        masks = forms[0] if impls[0] == impls[1] else forms[0] + forms[1]
        given = None
        if impls[0] == "triton":
            given = padded_work if padded and not packs else work
        out = apply(_Attention, q, k, v, cu_seqlens, given, seed, settings, impls, *masks)
    out = out[..., :width] if missing else out
    if layout is None:
        return out.view(shape)
    return layout.pad(out) if packs else out


def _missing(q: Tensor, longest: int, impl: str) -> int:
    """Zeros behind each head that are worth eight copies and launches: a GPU loads 16 bytes of a
    head at a time, where heads of 26 begin at multiples of 4, and long sequences' again and again.
    """
    worth = impl == "triton" and q.is_cuda and longest > READ_ONCE
    return -q.shape[-1] % (LOAD // q.element_size()) if worth else 0


def attention_of_stack(
    stack: Tensor,
    *,
    layout: SequenceLayout,
    give: Collection[int] = (),
    width: int | None = None,
    scale: float | None = None,
    direction: str = "both",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    block_mask: BlockMask | Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """``attention(*stack.unbind(1), ...)`` of packed (T, 3, H, D), and ``stack[:, i, :, :width]``
    (T, H, width) for each i, or None if it is not in ``give``: 0 queries, 1 keys, 2 values; whoever
    keeps one of these views keeps the stack. Triton adds in fp32 what those are given as gradients
    to attention's own, in one (T, 3, H, D): 0 where nobody reads what depends on a number.

    Raises:
        ValueError: as ``attention`` does.
    """
    stack = stack.contiguous()
    q, k, v = stack.unbind(1)
    width = q.shape[-1] if width is None else width
    dense = isinstance(block_mask, Tensor)
    facts = {"width": q.shape[-1], "scale": scale, "dense_mask": dense, "dropout_p": dropout_p}
    if choose(impl, LIMITS, q, **facts) != ("triton", "triton"):
        out = attention(
            q,
            k,
            v,
            layout=layout,
            scale=scale,
            direction=direction,
            dropout_p=dropout_p,
            seed=seed,
            site=site,
            block_mask=block_mask,
            impl=impl,
        )
        given = (x[..., :width] if i in give else None for i, x in enumerate((q, k, v)))
        return out, *given  # type: ignore[return-value]
    _check(q, k, v, layout, direction, block_mask)
    check_dropout("attention", dropout_p, seed, site, q.device)
    call = (
        layout.max_length,
        q.shape[-1] ** -0.5 if scale is None else scale,
        direction,
        dropout_p,
        site,
    )
    mask = _mask_of(block_mask, "triton")
    return apply(
        _AttentionOfStack, stack, layout.cu_seqlens, layout.work, seed, call, "triton", give, width,
        *mask,
    )  # fmt: skip


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
        check_layout("attention", layout, q, leading=q.dim() - 2)
    longest = layout.max_length if layout is not None else q.shape[1]
    batch = layout.batch_size if layout is not None else q.shape[0]
    _check_pairs(longest, batch, q.device, direction, block_mask)


def _check_pairs(longest, batch, device, direction, block_mask) -> None:
    """ValueError unless direction and mask say which tokens meet, in sequences like these."""
    if direction not in DIRECTIONS:
        raise ValueError(f"attention: direction={direction!r} is not one of {DIRECTIONS}")
    if block_mask is not None:
        check_block_mask("attention", block_mask, longest, batch, device)
