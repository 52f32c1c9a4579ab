"""The teacher's predictions against the student's, at a temperature t, averaged over the batch.

    cross_entropy   -sum_c softmax(teacher / t)_c log_softmax(student / t)_c
    kl              t^2 KL(softmax(teacher / t) || softmax(student / t))

The first is Jiao et al. 2020, arXiv:1909.10351, equation 10; the second Hinton et al. 2015,
arXiv:1503.02531, section 2. Shapes: student, teacher (B, K).
"""

from __future__ import annotations

import torch
from torch import Tensor


def soft_cross_entropy(
    student: Tensor, teacher: Tensor, temperature: float, divisor: int, form: str
) -> Tensor:
    """``F.cross_entropy(student / t, softmax(teacher / t), reduction="sum") / divisor``, or the
    divergence, which is t^2 times what is left without the teacher's entropy.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    targets = torch.softmax(teacher.detach().to(wide) / temperature, -1)
    losses = -targets * torch.log_softmax(student.to(wide) / temperature, -1)
    if form == "kl":
        losses = (losses + torch.xlogy(targets, targets)) * temperature**2
    return losses.sum() / divisor
