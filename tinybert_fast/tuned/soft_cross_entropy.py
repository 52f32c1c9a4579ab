"""Soft cross-entropy or divergence with its gradient: f (softmax(S / t) - P) / (t * divisor), where
P = softmax(T / t) and f is 1 for the cross-entropy, t^2 for the divergence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    student: Tensor, teacher: Tensor, temperature: float, divisor: int, form: str,
    wanted: list[bool],
):  # fmt: skip
    """(B, K) logits -> loss, gradient of the student's logits, empty unless wanted."""
    wide = torch.promote_types(student.dtype, torch.float32)
    targets = torch.softmax(teacher.to(wide) / temperature, -1)
    log_probabilities = torch.log_softmax(student.to(wide) / temperature, -1)
    losses, factor = -(targets * log_probabilities), 1.0
    if form == "kl":
        losses, factor = losses.add_(torch.xlogy(targets, targets)), temperature**2
    loss = losses.sum() * (factor / divisor)
    if not any(wanted):
        return loss, loss.new_empty(0)
    return loss, log_probabilities.exp().sub_(targets).mul_(factor / (temperature * divisor))
