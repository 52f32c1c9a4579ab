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


def direct_sum_bf16(q: Tensor, k: Tensor, p: Tensor, r: Tensor) -> Tensor:
    """The same of operands in bf16: each N x N tensor is written once, the differences by the
    product that makes the student's scores, which subtracts in fp32. The sum is in fp32."""
    q, k, p, r = (x.flatten(0, 1) for x in (q, k, p, r))
    a, b = q.shape[-1] ** -0.5, p.shape[-1] ** -0.5
    taught = torch.baddbmm(p.new_empty(()), p, r.mT, beta=0, alpha=b)
    difference = torch.baddbmm(taught, q, k.mT, beta=-1, alpha=a)
    return torch.linalg.vector_norm(difference, dtype=torch.float32).square()


def score_sum(form: str, q: Tensor, k: Tensor, p: Tensor, r: Tensor) -> Tensor:
    """The sum in fp32, by one of SUMS. The Gram form is computed in fp32 throughout: it subtracts
    numbers of one size, too much for bf16."""
    if form == "direct" and q.dtype == torch.bfloat16:
        return direct_sum_bf16(q, k, p, r)
    return SUMS[form](*(x.float() for x in (q, k, p, r)))


SUMS = {"direct": direct_sum, "gram": gram_sum}
