"""Layer norm through PyTorch's fused kernels, statistics in fp32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float):
    """x (rows, C) -> y in x's dtype, mean and rstd (rows, 1) fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    # Widened first: in half precision PyTorch's CPU kernel would return half statistics.
    y, mean, rstd = torch.native_layer_norm(
        x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), eps
    )
    return y.to(x.dtype), mean, rstd


def backward(grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor):
    """Gradients of x (in its dtype), weight and bias (in the weight's)."""
    wide = mean.dtype
    dx, dweight, dbias = aten.native_layer_norm_backward(
        grad.to(wide).contiguous(), x.to(wide), x.shape[-1:], mean, rstd, weight.to(wide),
        weight.to(wide), (True, True, True),
    )  # fmt: skip
    return dx.to(x.dtype), dweight.to(weight.dtype), dbias.to(weight.dtype)
