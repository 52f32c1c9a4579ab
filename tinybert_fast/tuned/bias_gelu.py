"""gelu(x + bias) with PyTorch's fused gelu; the backward adds the bias again, nothing is kept.

The bias is rounded to x's dtype, as F.linear under autocast does: a sum of bf16 and fp32 on a CPU
makes an fp32 copy of x, and sum and gelu are fp32 tensors then (gelu computes in fp32 anyway).
"""

from __future__ import annotations

import torch
from torch import Tensor

aten = torch.ops.aten


def forward(x: Tensor, bias: Tensor) -> Tensor:
    """x (rows, C) -> y in x's dtype."""
    return aten.gelu(x + bias.to(x.dtype))


def backward(grad: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and bias."""
    dx = aten.gelu_backward(grad, (x + bias.to(x.dtype)).to(grad.dtype))
    return dx.to(x.dtype), dx.sum(0, dtype=torch.promote_types(dx.dtype, torch.float32)).to(
        bias.dtype
    )
