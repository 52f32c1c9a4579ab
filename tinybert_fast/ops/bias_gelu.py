"""Linear bias + erf GELU, behind a product or with it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from tinybert_fast.ops.dispatch import (
    FLOATS,
    FLOATS_AND_DOUBLE,
    TRITON_DEVICES,
    Impl,
    Limit,
    Limits,
    apply,
    autocast,
    check_devices,
    choose,
    define,
    reference_gradient,
    wanted_gradients,
    without_autocast,
)
from tinybert_fast.ops.layer_norm import any_double, check_columns
from tinybert_fast.reference.bias_gelu import bias_gelu as reference


def _refuses(double: bool = False, **others: Any) -> str | None:
    return "an operand is float64, and the kernels compute in fp32" if double else None


LIMITS = Limits(
    "bias_gelu",
    torch=Limit(FLOATS_AND_DOUBLE),
    triton=Limit(FLOATS, TRITON_DEVICES, _refuses),
)

_forward = define(
    "bias_gelu_fwd(Tensor x, Tensor bias) -> Tensor y",
    fake=lambda x, bias: x.new_empty(x.shape),
    torch="tinybert_fast.tuned.bias_gelu:forward",
    triton="tinybert_fast.kernels.bias_gelu:forward",
)
_backward = define(
    "bias_gelu_bwd(Tensor grad, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)",
    fake=lambda grad, x, bias: (x.new_empty(x.shape), torch.empty_like(bias)),
    torch="tinybert_fast.tuned.bias_gelu:backward",
    triton="tinybert_fast.kernels.bias_gelu:backward",
)
# Besides, grad, contiguous and in x's dtype, becomes the forward's answer.
_backward_in_place = define(
    "bias_gelu_bwd_in_place(Tensor(a!) grad, Tensor x, Tensor bias) -> (Tensor dx, Tensor dbias)",
    fake=lambda grad, x, bias: (x.new_empty(x.shape), torch.empty_like(bias)),
    triton="tinybert_fast.kernels.bias_gelu:backward_in_place",
)
_forward_of_product = define(
    "linear_gelu_fwd(Tensor x, Tensor weight, Tensor bias) -> Tensor y",
    fake=lambda x, weight, bias: x.new_empty((x.shape[0], weight.shape[0])),
    flops=lambda x, weight, bias: 2 * x.shape[0] * weight.numel(),
    triton="tinybert_fast.kernels.linear_gelu:forward",
)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, impls):
        ctx.save_for_backward(x, bias)
        ctx.impl = impls[1]
        return _forward(x, bias, impls[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, bias = ctx.saved_tensors
        if ctx.impl == "reference":
            needs = ctx.needs_input_grad[:2]
            return (*reference_gradient(reference, (x, bias), needs, grad), None)
        return (*_backward(grad.contiguous(), x, bias, ctx.impl), None)


def bias_gelu(
    x: Tensor, bias: Tensor, weight: Tensor | None = None, *, impl: Impl = "auto"
) -> Tensor:
    """``F.gelu(x + bias)``, the erf form (Hendrycks & Gimpel 2016, arXiv:1606.08415): (..., C) and
    (C,) -> (..., C) in x's dtype. With ``weight``, ``F.gelu(F.linear(x, weight, bias))``: (..., K)
    -> (..., C), in autocast's dtype where autocast is on.

    Where nobody wants a gradient, which needs the product, ``triton`` makes product and GELU in one
    kernel: in half precision, for K and C that are multiples of 8, on sm_90 and sm_100. The answer
    is rounded once then; everywhere else F.linear makes the product, rounded as its answer is. (So
    is the second pass of re-entrant checkpointing, whose first one has no graph.)

    Args:
        x, bias: fp16, bf16, fp32 or fp64 (``triton``: not fp64); any strides.
        weight: (C, K) in x's dtype, or in one that autocast changes to it; any strides.
        impl: "auto", a name, or one for each pass: ``ops/dispatch.py``.

    Raises:
        ValueError: bias is not (C,), weight not (C, K) in x's dtype, one of them is on another
            device, or a named ``impl`` that cannot serve the call.
    """
    if weight is not None:
        x, weight = autocast(x), autocast(weight)
    impls = choose(impl, LIMITS, x, double=any_double(bias))
    if weight is not None:
        _check_product(x, bias, weight)
        recorded = any(wanted_gradients(x, bias, weight)) or forward_ad._current_level >= 0
        if impls[0] == "triton" and not recorded:
            rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
            y = _forward_of_product(rows, weight, bias, "triton")
            return y.view(*x.shape[:-1], weight.shape[0])
        x = F.linear(x, weight)
    check_columns("bias_gelu", x, bias=bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = (
        without_autocast(reference, rows, bias)
        if impls[0] == "reference"
        else apply(_BiasGelu, rows, bias, impls)
    )
    return y.view(x.shape)


def _check_product(x: Tensor, bias: Tensor, weight: Tensor) -> None:
    check_devices("bias_gelu", x.device, weight=weight, bias=bias)
    width = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or weight.dtype != x.dtype:
        raise ValueError(
            f"bias_gelu: weight must be (C, {width}) in {x.dtype}, as x {tuple(x.shape)} is; got "
            f"{tuple(weight.shape)} in {weight.dtype}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias_gelu: bias must have shape ({weight.shape[0]},), a number for each row of "
            f"weight {tuple(weight.shape)}; got {tuple(bias.shape)}"
        )
