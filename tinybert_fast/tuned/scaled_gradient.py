"""A gradient times a number, rounded once."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * upstream`` in fp32 or wider, rounded to ``dtype``, in one pass."""
    factor: Tensor | float
    if gradient.dtype == dtype != upstream.dtype and gradient.device.type == "cpu":
        factor = upstream.item()  # a number meets bf16 as fp32, and nothing is copied to be wider
    else:
        factor = upstream.reshape((1,) * gradient.dim())  # of no dimension it would take bf16
    scaled = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    return torch.mul(gradient, factor, out=scaled)
