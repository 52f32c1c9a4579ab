"""loss = -sum_c softmax(teacher / t)_c * log_softmax(student / t)_c, averaged over the batch.

Shapes: student, teacher (B, K). Jiao et al. 2020, arXiv:1909.10351, equation 10 (no t^2 factor).
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, temperature: float, divisor: int
) -> Tensor:
    """``F.cross_entropy(student / t, softmax(teacher / t), reduction="sum") / divisor``."""
    wide = torch.promote_types(student.dtype, torch.float32)
    targets = torch.softmax(teacher.detach().to(wide) / temperature, -1)
    return -(targets * torch.log_softmax(student.to(wide) / temperature, -1)).sum() / divisor
