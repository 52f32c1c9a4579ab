"""Soft cross-entropy with its gradient: (softmax(S / t) * sum(P) - P) / (t * divisor)."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(student: Tensor, teacher: Tensor, temperature: float, divisor: int):
    """(B, K) logits -> loss, gradient of the student's logits."""
    wide = torch.promote_types(student.dtype, torch.float32)
    targets = torch.softmax(teacher.to(wide) / temperature, -1)
    log_probabilities = torch.log_softmax(student.to(wide) / temperature, -1)
    loss = -(targets * log_probabilities).sum() / divisor
    grad = log_probabilities.exp().sub_(targets).div_(temperature * divisor)
    return loss, grad
