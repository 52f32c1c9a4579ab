"""What the losses share: the autograd.Function of scalars whose gradients are computed in the
forward, and a check of operands.

The upstream gradient of a scalar is a scalar, so the forward that has the loss's intermediates at
hand also leaves the gradients, and the backward scales them (Hsu et al. 2024, arXiv:2410.10989).
They are kept in fp32 or wider, or in bf16, which has fp32's range: a mean's gradients are below
what fp16 holds until they are multiplied by the loss scale, which is in the upstream gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tinybert_fast.ops.dispatch import (
    apply,
    check_devices,
    define,
    reference_gradient,
    wanted_gradients,
)
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.ops.packed import check_layout

_scaled = define(
    "scaled_gradient(Tensor gradient, Tensor upstream, ScalarType dtype) -> Tensor",
    fake=lambda gradient, upstream, dtype: gradient.new_empty(gradient.shape, dtype=dtype),
    torch="tinybert_fast.tuned.scaled_gradient:forward",
    native="tinybert_fast.tuned.scaled_gradient:forward",
    triton="tinybert_fast.kernels.scaled_gradient:forward",
)


def in_fp32(x: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """An uninitialised loss (``shape=()``) or gradient of ``x``: fp32 or wider."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape if shape is None else shape, dtype=dtype)


def check_sides(
    op: str, names: Sequence[str], operands: Sequence[Tensor], layout: SequenceLayout | None
) -> None:
    """ValueError unless two operands of the student and two of the teacher have heads of the same
    tokens, packed as ``layout`` says or padded, on one device.
    """
    a, b, c, d = operands

    def shapes() -> str:  # built on refusal alone: Dynamo cannot trace the join
        return ", ".join(f"{n} {tuple(x.shape)}" for n, x in zip(names, operands, strict=True))

    if a.dim() not in (3, 4) or a.shape != b.shape or c.shape != d.shape or a.dim() != c.dim():
        raise ValueError(
            f"{op}: the two operands of either model must agree, packed (T, H, D) or padded "
            f"(B, N, H, D); got {shapes()}"
        )
    if a.shape[:-2] != c.shape[:-2]:
        raise ValueError(f"{op}: student and teacher must see the same tokens; got {shapes()}")
    if a.dim() == 3 and layout is None:
        raise ValueError(f"{op}: packed (T, H, D) operands need layout=")
    check_devices(op, a.device, **dict(zip(names, operands, strict=True)))
    if layout is not None:
        check_layout(op, layout, a, leading=a.dim() - 2)


def clearing(forward_op: Callable, layout: SequenceLayout) -> Callable:
    """``forward_op`` with gradients of 0 in the rows behind all sequences, which it leaves as they
    were allocated.
    """
    if not layout.spare:
        return forward_op

    def forward(*operands):
        loss, *gradients = forward_op(*operands)
        for gradient in gradients:
            if gradient.numel():
                dead = layout.dead.view(-1, *(1,) * (gradient.dim() - 1))
                gradient[-layout.spare :].masked_fill_(dead, 0.0)
        return loss, *gradients

    return forward


def scalar_loss(
    forward_op: Callable, reference: Callable, impls: tuple[str, str], leading: int, *operands: Any
) -> Tensor:
    """The loss of ``forward_op(*operands, wanted, impl) -> loss, *gradients``, which are those of
    the ``leading`` first operands; what autograd does not want is not computed.

    The loss is fp32 or wider, gradients are too or bf16.
    """
    wanted = wanted_gradients(*operands[:leading])
    if impls[1] == "reference":
        wanted = [False] * leading
    return apply(_ScalarLoss, forward_op, reference, impls, wanted, *operands)


class _ScalarLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, forward_op, reference, impls, wanted, *operands) -> Tensor:
        loss, *gradients = forward_op(*operands, wanted, impls[0])
        ctx.reference, ctx.impl = reference if impls[1] == "reference" else None, impls[1]
        tensors = gradients
        if ctx.reference is not None:
            # Copies of constants: autograd refuses to keep what a teacher made in inference mode.
            needs = ctx.needs_input_grad[4:]
            tensors = [
                x.clone() if isinstance(x, Tensor) and not need else x
                for x, need in zip(operands, needs, strict=True)
            ]
        ctx.save_for_backward(*(x for x in tensors if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in tensors]
        ctx.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in operands]
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        saved = iter(ctx.saved_tensors)
        kept = [next(saved) if other is None else other[0] for other in ctx.others]
        needs = ctx.needs_input_grad[4:]
        if ctx.reference is not None:
            gradients = reference_gradient(ctx.reference, tuple(kept), needs, upstream)
        else:
            kept += [None] * (len(needs) - len(kept))
            gradients = tuple(
                _scaled(g, upstream, dtype, ctx.impl) if need else None
                for g, need, dtype in zip(kept, needs, ctx.dtypes, strict=True)
            )
        return (None, None, None, None, *gradients)
