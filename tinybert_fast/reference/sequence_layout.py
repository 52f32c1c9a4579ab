"""Which positions of a padded batch are real tokens, and where they go when it is packed.

A batch of B sequences of width N has T real tokens, packed in row-major order. real: bool (B, N).
"""

from __future__ import annotations

import torch
from torch import Tensor


def extents(real: Tensor) -> Tensor:
    """int64 (3, B): real tokens, column of the first, one past that of the last; 0 if none."""
    columns = torch.arange(real.shape[1], device=real.device)
    stops = (real * (columns + 1)).amax(1) if real.shape[1] else real.sum(1)
    firsts = (~real).cumprod(1).sum(1) * (stops > 0)  # padding before the first token
    return torch.stack([real.sum(1), firsts, stops])


def sequence_layout(real: Tensor, cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Flat place ``b * N + n``, sequence b, and rank in it of every token: (T,) each.

    cu_seqlens: int32 (B + 1,), running sum of the lengths. total: T, so that no device is asked.
    """
    rows = torch.nonzero_static(real.flatten(), size=total).flatten()
    sequences = torch.div(rows, max(real.shape[1], 1), rounding_mode="floor")
    positions = torch.arange(total, device=real.device) - cu_seqlens[sequences]
    return rows, sequences.int(), positions.int()
