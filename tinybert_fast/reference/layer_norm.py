"""y = (x - mean) / sqrt(var + eps) * weight + bias over the last axis.

Shapes: x, y (rows, C); weight, bias (C,). Statistics in fp32 or wider. Ba et al. 2016,
arXiv:1607.06450.
"""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """``F.layer_norm(x, (C,), weight, bias, eps)`` in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    normal = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normal * weight + bias).to(x.dtype)
