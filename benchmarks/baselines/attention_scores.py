"""The attention loss in plain PyTorch: N x N scores as published, and the Gram form with bmm.

Student q, k (B, H, N, D) against teacher p, r (B, H, N, Dt); ``real`` (B, N) says which positions
are tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MASKED_BELOW = -1e2  # a score that the additive key mask has pushed down


def official(student_scores: Tensor, teacher_scores: Tensor) -> Tensor:
    """Mean over B * H * N * N of the squared difference, masked keys counted as 0: the released
    code's words. Queries of padding count."""
    student_scores = torch.where(
        student_scores <= MASKED_BELOW, torch.zeros_like(student_scores), student_scores
    )
    teacher_scores = torch.where(
        teacher_scores <= MASKED_BELOW, torch.zeros_like(teacher_scores), teacher_scores
    )
    return F.mse_loss(student_scores, teacher_scores)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / q.shape[-1] ** 0.5


def direct_sum(q: Tensor, k: Tensor, p: Tensor, r: Tensor) -> Tensor:
    """Sum of squared score differences. Rows of padding must be zero."""
    return (scores(q, k) - scores(p, r)).square().sum()


def gram_sum(q: Tensor, k: Tensor, p: Tensor, r: Tensor) -> Tensor:
    """The same sum with no N x N tensor: a^2 <Q'Q, K'K> - 2ab <P'Q, R'K> + b^2 <P'P, R'R>."""
    a, b = q.shape[-1] ** -0.5, p.shape[-1] ** -0.5
    with torch.no_grad():
        teacher = b * b * ((p.mT @ p) * (r.mT @ r)).sum()
    student = a * a * ((q.mT @ q) * (k.mT @ k)).sum()
    return student - 2 * a * b * ((p.mT @ q) * (r.mT @ k)).sum() + teacher


SUMS = {"direct": direct_sum, "gram": gram_sum}
