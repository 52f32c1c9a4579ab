"""Soft cross-entropy or divergence with its gradient: f (softmax(S / t) - P) / (t * divisor), where
P = softmax(T / t) and f is 1 for the cross-entropy, t^2 for the divergence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(student: Tensor, teacher: Tensor, temperature: float, divisor: int, form: str):
    """(B, K) logits -> loss, gradient of the student's logits."""
    wide = torch.promote_types(student.dtype, torch.float32)
    targets = torch.softmax(teacher.to(wide) / temperature, -1)
    log_probabilities = torch.log_softmax(student.to(wide) / temperature, -1)
    losses, factor = -(targets * log_probabilities), 1.0
    if form == "kl":
        losses, factor = losses.add_(torch.xlogy(targets, targets)), temperature**2
    grad = log_probabilities.exp().sub_(targets).mul_(factor / (temperature * divisor))
    return losses.sum() * (factor / divisor), grad
