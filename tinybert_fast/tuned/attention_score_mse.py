"""TinyBERT's attention loss and its gradients, equal lengths batched, scores in blocks or none.

With a = D**-0.5, b = Dt**-0.5, w = 1 / (H * sum n^2):

    direct   E = a Q K^T - b P R^T;  dQ = 2wa E K,  dK = 2wa E^T Q                    O(n^2 D)
    gram     dQ = 2wa (a Q (K^T K) - b P (R^T K)),  dK = 2wa (a K (Q^T Q) - b R (P^T Q))  O(n D^2)
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinybert_fast.tuned.attention import SCRATCH, equal_lengths, heads_of, put


def forward(
    q: Tensor, k: Tensor, p: Tensor, r: Tensor, cu_seqlens: Tensor, max_length: int, form: str
):
    """(T, H, D) student, (T, H, Dt) teacher -> loss, dq, dk."""
    wide = torch.promote_types(q.dtype, torch.float32)
    heads, d, d_teacher = q.shape[1], q.shape[2], p.shape[2]
    a, b = d**-0.5, d_teacher**-0.5
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    weight = 1.0 / max(heads * int(lengths.square().sum()), 1)
    loss = q.new_zeros((), dtype=wide)
    dq, dk = (torch.empty(x.shape, dtype=wide, device=x.device) for x in (q, k))
    for rows, sequences, length in equal_lengths(cu_seqlens, heads, blocked=True):
        gram = form == "gram" or (form == "auto" and length > crossover(d, d_teacher))
        q_, k_, p_, r_ = (heads_of(x, rows, len(sequences)).to(wide) for x in (q, k, p, r))
        part, dq_part, dk_part = (_gram if gram else _direct)(q_, k_, p_, r_, a, b)
        loss += part
        put(dq, rows, dq_part.mul_(2.0 * weight * a))
        put(dk, rows, dk_part.mul_(2.0 * weight * a))
    return loss.mul_(weight), dq, dk


def crossover(d: int, d_teacher: int) -> float:
    """The length above which the Gram form takes fewer multiplications than the direct one."""
    return (8 * d * d + 8 * d * d_teacher + 4 * d_teacher**2) / (6 * d + 2 * d_teacher)


def _gram(q, k, p, r, a, b):
    kk, qq = k.mT @ k, q.mT @ q  # (b, H, D, D)
    rk, pq = r.mT @ k, p.mT @ q  # (b, H, Dt, D)
    teacher = ((p.mT @ p) * (r.mT @ r)).sum()
    total = a * a * (qq * kk).sum() - 2 * a * b * (pq * rk).sum() + b * b * teacher
    dq = (q @ kk).mul_(a).sub_(p @ rk, alpha=b)
    dk = (k @ qq).mul_(a).sub_(r @ pq, alpha=b)
    return total.clamp_min(0.0), dq, dk


def _direct(q, k, p, r, a, b):
    total = q.new_zeros(())
    dq, dk = torch.empty_like(q), torch.empty_like(k)
    most = max(1, SCRATCH // (q.shape[0] * q.shape[2] ** 2))
    for first in range(0, q.shape[1], most):
        h = slice(first, first + most)
        error = (q[:, h] * a) @ k[:, h].mT - (p[:, h] * b) @ r[:, h].mT
        total += error.square().sum()
        dq[:, h] = error @ k[:, h]
        dk[:, h] = error.mT @ q[:, h]
    return total, dq, dk
