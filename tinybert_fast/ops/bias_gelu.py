"""Linear bias + erf GELU."""

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
    choose,
    define,
    reference_gradient,
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


def bias_gelu(x: Tensor, bias: Tensor, *, impl: Impl = "auto") -> Tensor:
    """``F.gelu(x + bias)``, the erf form (Hendrycks & Gimpel 2016, arXiv:1606.08415): (..., C) and
    (C,) -> (..., C) in x's dtype.

    Args:
        x, bias: fp16, bf16, fp32 or fp64 (``triton``: not fp64); any strides.
        impl: "auto", a name, or one for each pass: ``ops/dispatch.py``.

    Raises:
        ValueError: bias is not (C,) or is on another device, or a named ``impl`` that cannot serve
            the call.
    """
    impls = choose(impl, LIMITS, x, double=any_double(bias))
    check_columns("bias_gelu", x, bias=bias)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    y = (
        without_autocast(reference, rows, bias)
        if impls[0] == "reference"
        else apply(_BiasGelu, rows, bias, impls)
    )
    return y.view(x.shape)
