"""y = gelu(x + bias), gelu(s) = s / 2 * (1 + erf(s / sqrt 2)). Hendrycks & Gimpel 2016, 1606.08415.

Shapes: x, y (rows, C); bias (C,).
"""

from __future__ import annotations

import torch
from torch import Tensor


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """``F.gelu(x + bias)``, the erf form, in x's dtype."""
    s = x.to(torch.promote_types(x.dtype, torch.float32)) + bias
    return (0.5 * s * (1.0 + torch.erf(s * 2**-0.5))).to(x.dtype)
