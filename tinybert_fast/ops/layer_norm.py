"""Layer norm over the last axis."""

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
    apply,
    check_devices,
    choose,
    define,
    reference_gradient,
    without_autocast,
)
from tinybert_fast.reference.layer_norm import layer_norm as reference

WIDEST_ROW = 8192  # of the Triton kernels, which hold whole rows in registers


def refuses_columns(columns: int = 1, double: bool = False, **others: Any) -> str | None:
    """Why the Triton kernels of a layer norm cannot serve rows of ``columns`` numbers, or operands
    of which one is fp64.
    """
    if columns > WIDEST_ROW:
        return f"rows of {columns} numbers are wider than {WIDEST_ROW}"
    return "an operand is float64, and the kernels compute in fp32" if double else None


LIMITS = Limits(
    "layer_norm",
    torch=Limit(FLOATS_AND_DOUBLE),
    triton=Limit(FLOATS, TRITON_DEVICES, refuses_columns),
)


def statistic(x: Tensor) -> Tensor:
    """One fp32 (or wider) number per row, as layer-norm kernels return mean and rstd."""
    return x.new_empty((x.shape[0], 1), dtype=torch.promote_types(x.dtype, torch.float32))


_forward = define(
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
    fake=lambda x, weight, bias, eps: (x.new_empty(x.shape), statistic(x), statistic(x)),
    torch="tinybert_fast.tuned.layer_norm:forward",
    triton="tinybert_fast.kernels.layer_norm:forward",
)
_backward = define(
    "layer_norm_bwd(Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    fake=lambda grad, x, weight, mean, rstd: (
        x.new_empty(x.shape),
        torch.empty_like(weight),
        torch.empty_like(weight),
    ),
    torch="tinybert_fast.tuned.layer_norm:backward",
    triton="tinybert_fast.kernels.layer_norm:backward",
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, impls):
        y, mean, rstd = _forward(x, weight, bias, eps, impls[0])
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.eps, ctx.impl = eps, impls[1]
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        if ctx.impl == "reference":
            needs = ctx.needs_input_grad[:4]
            grads = reference_gradient(reference, (x, weight, bias, ctx.eps), needs, grad)
            return (*grads, None)
        return (*_backward(grad, x, weight, mean, rstd, ctx.impl), None, None)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-12, impl: Impl = "auto"
) -> Tensor:
    """``F.layer_norm(x, (C,), weight, bias, eps)`` (Ba et al. 2016, arXiv:1607.06450): (..., C) ->
    (..., C) in x's dtype.

    Args:
        x, weight, bias: (..., C), (C,) and (C,), fp16, bf16, fp32 or fp64 (``triton``: not fp64,
            C up to 8192); any strides.
        impl: "auto", a name, or one for each pass: ``ops/dispatch.py``.

    Raises:
        ValueError: weight or bias is not (C,) or is on another device, or a named ``impl`` that
            cannot serve the call.
    """
    impls = choose(impl, LIMITS, x, columns=x.shape[-1], double=any_double(weight, bias))
    check_columns("layer_norm", x, weight=weight, bias=bias)
    rows = x.reshape(-1, x.shape[-1])
    if impls[0] == "reference":
        return without_autocast(reference, rows, weight, bias, eps).view(x.shape)
    return apply(_LayerNorm, rows, weight, bias, eps, impls).view(x.shape)


def any_double(*operands: Tensor | None) -> bool:
    """Whether one is fp64, which no kernel computes in."""
    return any(x is not None and x.dtype == torch.float64 for x in operands)


def check_columns(op: str, x: Tensor, **vectors: Tensor | None) -> None:
    """ValueError unless every vector given is (C,) for x (..., C), and on its device."""
    check_devices(op, x.device, **vectors)
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: {name} must have shape ({x.shape[-1]},), the last axis of x "
                f"{tuple(x.shape)}; got {tuple(vector.shape)}"
            )
