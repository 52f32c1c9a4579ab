"""TinyBERT's attention loss and its gradients, equal lengths batched, scores in blocks or none.

With a = D**-0.5, b = Dt**-0.5, X = [a Q, -b P] and Y = [K, R], both (n, D + Dt), the errors of the
scores are one product, E = S - T = X Y^T. With w = 1 / (H * pairs), L = w |E|^2,

    dQ = 2wa E K,   dK = 2w E^T (a Q)

    direct   E as it stands, in blocks                                               O(n^2 D)
    gram     |E|^2 = <X^T X, Y^T Y>,  E K = X (Y^T K),  E^T (a Q) = Y (X^T (a Q))    O(n D^2)

Under a block mask E is 0 where it forbids, of the blocks that it lists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinybert_fast.tuned.attention import Part, add, head_blocks, heads_of, parts, put


def forward(
    q: Tensor, k: Tensor, p: Tensor, r: Tensor, cu_seqlens: Tensor, max_length: int, form: str,
    loss: str, block_mask: list[Tensor],
):  # fmt: skip
    """(T, H, D) student, (T, H, Dt) teacher -> loss, dq, dk."""
    wide = torch.promote_types(q.dtype, torch.float32)
    d, d_teacher = q.shape[2], p.shape[2]
    a, b = d**-0.5, d_teacher**-0.5
    total, pairs = q.new_zeros((), dtype=wide), 0
    dq = torch.empty(q.shape, dtype=wide, device=q.device)
    # A key of blocks is met by several rows of them.
    by_blocks = len(block_mask) > 1
    dk = (torch.zeros if by_blocks else torch.empty)(k.shape, dtype=wide, device=k.device)
    for part in parts(cu_seqlens, "both", block_mask, q, fused=False):
        count = len(part.sequences)
        q_, p_ = (heads_of(x, part.rows, count).to(wide) for x in (q, p))
        k_, r_ = (heads_of(x, part.keys, count).to(wide) for x in (k, r))
        x, y = torch.cat([q_ * a, p_ * -b], -1), torch.cat([k_, r_], -1)  # (b, H, n, D + Dt)
        gram = form == "gram" or (form == "auto" and x.shape[2] > crossover(d, d_teacher))
        squares, dq_part, dk_part = (_gram if gram else _direct)(x, y, d, loss, part)
        total += squares
        pairs += _allowed(part, x, y)
        put(dq, part.rows, dq_part)
        (add if by_blocks else put)(dk, part.keys, dk_part)
    weight = 1.0 / max(q.shape[1] * pairs, 1)
    return total.mul_(weight), dq.mul_(2.0 * weight * a), dk.mul_(2.0 * weight)


def crossover(d: int, d_teacher: int) -> float:
    """The length above which the Gram form takes fewer multiplications than the direct one."""
    return (8 * d * d + 8 * d * d_teacher + 4 * d_teacher**2) / (6 * d + 2 * d_teacher)


def _gram(x: Tensor, y: Tensor, d: int, loss: str, part: Part):
    xq, yk = x.mT @ x[..., :d], y.mT @ y[..., :d]  # (b, H, D + Dt, D)
    products = xq * yk
    total = 2.0 * products.sum() - products[..., :d, :].sum()  # the rows of P and R count twice
    if loss == "full":
        p, r = x[..., d:], y[..., d:]
        total = (total + ((p.mT @ p) * (r.mT @ r)).sum()).clamp_min(0.0)
    return total, x @ yk, y @ xq


def _direct(x: Tensor, y: Tensor, d: int, loss: str, part: Part):
    total = x.new_zeros(())
    dq, dk = (torch.empty(*z.shape[:3], d, dtype=z.dtype, device=z.device) for z in (x, y))
    for h in head_blocks(x, y):
        error = x[:, h] @ y[:, h].mT
        if part.mask is not None:
            error.masked_fill_(part.mask != 0, 0.0)
        total += error.square().sum()
        if loss == "student":
            teacher = x[:, h, :, d:] @ y[:, h, :, d:].mT
            if part.mask is not None:
                teacher.masked_fill_(part.mask != 0, 0.0)
            total -= teacher.square().sum()
        dq[:, h] = error @ y[:, h, :, :d]
        dk[:, h] = error.mT @ x[:, h, :, :d]
    return total, dq, dk


def _allowed(part: Part, x: Tensor, y: Tensor) -> int:
    """The pairs of a head that count."""
    if part.mask is None:
        return len(x) * x.shape[2] * y.shape[2]
    return int((part.mask == 0).sum()) * len(x) // len(part.mask)
