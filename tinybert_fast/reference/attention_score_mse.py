"""loss = mean((S - T)^2), S = Q K^T / sqrt(D), T = P R^T / sqrt(Dt): TinyBERT's attention loss.

Scores before the softmax, student q, k (T, H, D) against teacher p, r (T, H, Dt), over the real
(query, key) pairs of each sequence, or those of them that a mask allows. Jiao et al. 2020,
arXiv:1909.10351, equation 7.

Gram form, exact, no N x N matrix: with a = D**-0.5 and b = Dt**-0.5,

    sum (S - T)^2 = a^2 <Q^T Q, K^T K> - 2ab <Q^T P, K^T R> + b^2 <P^T P, R^T R>
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def attention_score_mse(
    q: Tensor, k: Tensor, p: Tensor, r: Tensor, cu_seqlens: Tensor, form: str, loss: str,
    block_mask: Tensor | None,
) -> Tensor:  # fmt: skip
    """``F.mse_loss(q @ k.mT / D**0.5, p @ r.mT / Dt**0.5)`` over all pairs of all sequences.

    block_mask: bool (N, N) or (B, N, N). loss "student": without the mean of T^2, a constant.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    a, b = q.shape[-1] ** -0.5, p.shape[-1] ** -0.5
    bounds = cu_seqlens.tolist()
    pairs = 0
    total = q[:0].sum(dtype=wide) + k[:0].sum(dtype=wide)  # a zero with a graph, if nothing follows
    for sequence, (start, stop) in enumerate(pairwise(bounds)):
        q_, k_, p_, r_ = (
            x[start:stop].transpose(0, 1).to(wide) for x in (q, k, p.detach(), r.detach())
        )
        length = stop - start
        if form == "gram":
            total = total + a * a * ((q_.mT @ q_) * (k_.mT @ k_)).sum()
            total = total - 2 * a * b * ((q_.mT @ p_) * (k_.mT @ r_)).sum()
            if loss == "full":
                total = total + b * b * ((p_.mT @ p_) * (r_.mT @ r_)).sum()
            pairs += length**2
            continue
        allowed = torch.ones(length, length, dtype=torch.bool, device=q.device)
        if block_mask is not None:
            of_sequence = block_mask if block_mask.dim() == 2 else block_mask[sequence]
            allowed = of_sequence[:length, :length]
        teacher = b * (p_ @ r_.mT) * allowed
        total = total + (a * (q_ @ k_.mT) * allowed - teacher).square().sum()
        if loss == "student":
            total = total - teacher.square().sum()
        pairs += int(allowed.sum())
    return total / max(q.shape[1] * pairs, 1)
