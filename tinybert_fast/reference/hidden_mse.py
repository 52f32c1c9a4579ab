"""loss = mean((student W^T + bias - teacher)^2): TinyBERT's hidden-state and embedding loss.

Shapes: student (rows, C), teacher (rows, Ct), weight (Ct, C), bias (Ct,).
Jiao et al. 2020, arXiv:1909.10351, equations 8 and 9.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hidden_mse(
    student: Tensor, weight: Tensor | None, bias: Tensor | None, teacher: Tensor
) -> Tensor:
    """``F.mse_loss(F.linear(student, weight, bias), teacher)``; no weight: widths agree."""
    narrow, wide = student.dtype, torch.promote_types(student.dtype, torch.float32)
    projected = student
    if weight is not None:
        projected = F.linear(student, weight.to(narrow), None if bias is None else bias.to(narrow))
    error = projected.to(wide) - teacher.detach()
    return error.square().sum() / max(error.numel(), 1)
