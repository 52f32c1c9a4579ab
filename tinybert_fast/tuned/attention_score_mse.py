"""TinyBERT's attention loss and its gradients, equal lengths batched, scores in blocks or none.

With a = D**-0.5, b = Dt**-0.5, X = [a Q, -b P] and Y = [K, R], both (n, D + Dt), the errors of the
scores are one product, E = S - T = X Y^T. With w = 1 / (H * pairs), L = w |E|^2,

    dQ = 2wa E K,   dK = 2w E^T (a Q)

    direct   E as it stands, in blocks                                               O(n^2 D)
    gram     |E|^2 = <X^T X, Y^T Y>,  E K = X (Y^T K),  E^T (a Q) = Y (X^T (a Q))    O(n D^2)

Under a block mask E is 0 where it forbids, of the blocks that it lists. ``native``, on a CPU, is
the compiled module, one sequence and head at a time, and this one under masks and in fp64.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tinybert_fast.ops import native
from tinybert_fast.tuned.attention import (
    add,
    head_blocks,
    heads_of,
    parts,
    put,
    rows_together,
)


def forward(
    q: Tensor, k: Tensor, p: Tensor, r: Tensor, cu_seqlens: Tensor, max_length: int, form: str,
    loss: str, block_mask: list[Tensor], wanted: list[bool],
):  # fmt: skip
    """(T, H, D) student, (T, H, Dt) teacher -> loss, dq, dk; empty if neither is wanted."""
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, p, r = (x if x.dtype == wide else x.to(wide) for x in (q, k, p, r))
    d, d_teacher = q.shape[2], p.shape[2]
    a, b = d**-0.5, d_teacher**-0.5
    # Beside scores, the operands, X and Y: beyond a CPU's cache they would take longer than E.
    call = (cu_seqlens, "both", block_mask, q, False, 4 * (d + d_teacher))
    weight = 1.0 / max(q.shape[1] * _pairs(*call), 1)
    gradients = any(wanted)
    dq = torch.empty(q.shape if gradients else (0,), dtype=wide, device=q.device)
    by_blocks = len(block_mask) > 1  # a key is met by several rows of them
    dk = (torch.zeros if by_blocks else torch.empty)(dq.shape, dtype=wide, device=k.device)
    totals = []
    for part in parts(*call):
        count = len(part.sequences)
        q_, p_ = (heads_of(x, part.rows, count) for x in (q, p))
        k_, r_ = (heads_of(x, part.keys, count) for x in (k, r))
        x = q_.new_empty(*q_.shape[:3], d + d_teacher)
        torch.mul(q_, a, out=x[..., :d])
        torch.mul(p_, -b, out=x[..., d:])
        y = torch.cat([k_, r_], -1)
        gram = form == "gram" or (form == "auto" and x.shape[2] > crossover(d, d_teacher))
        body: Any = _gram if gram else _direct
        total, dq_part, dk_part = body(x, y, d, loss, part.mask, gradients)
        totals.append(total)
        if not gradients:
            continue
        _put_scaled(dq, part.rows, dq_part, 2.0 * weight * a)
        if by_blocks:
            add(dk, part.keys, dk_part.mul_(2.0 * weight))
        else:
            _put_scaled(dk, part.keys, dk_part, 2.0 * weight)
    if len(totals) == 1:  # short sequences, whose products take no longer than an operator's call
        return totals[0].mul_(weight), dq, dk
    return q.new_zeros((), dtype=wide).add_(sum(totals), alpha=weight), dq, dk


def forward_native(
    q: Tensor, k: Tensor, p: Tensor, r: Tensor, cu_seqlens: Tensor, max_length: int, form: str,
    loss: str, block_mask: list[Tensor], wanted: list[bool],
):  # fmt: skip
    """``forward`` in the compiled module where that can: it knows no masks, and fp32 at most. Of
    bf16 operands, gradients in bf16.
    """
    dtypes = {x.dtype for x in (q, k, p, r)}
    if block_mask or torch.float64 in dtypes:
        rest = (cu_seqlens, max_length, form, loss, block_mask, wanted)
        total, dq, dk = forward(q, k, p, r, *rest)
    else:
        wide = (q, k, p, r) if dtypes == {torch.bfloat16} else (x.float() for x in (q, k, p, r))
        cheaper = int(crossover(q.shape[2], p.shape[2]))
        direct_up_to = {"direct": max_length, "gram": 0, "auto": cheaper}[form]
        a, b, c, d = (rows_together(x) for x in wide)
        total, dq, dk = native.attention_score_mse(
            a, b, c, d, cu_seqlens, direct_up_to, loss, any(wanted)
        )
    dq, dk = (g.bfloat16() if x.dtype == torch.bfloat16 else g for g, x in ((dq, q), (dk, k)))
    return total, dq, dk


def crossover(d: int, d_teacher: int) -> float:
    """The length above which the Gram form takes fewer multiplications than the direct one."""
    return (8 * d * d + 8 * d * d_teacher + 4 * d_teacher**2) / (6 * d + 2 * d_teacher)


def _gram(x: Tensor, y: Tensor, d: int, loss: str, mask: Tensor | None, gradients: bool):
    xq, yk = x.mT @ x[..., :d], y.mT @ y[..., :d]  # (b, H, D + Dt, D)
    products = xq * yk
    total = 2.0 * products.sum() - products[..., :d, :].sum()  # the rows of P and R count twice
    if loss == "full":
        p, r = x[..., d:], y[..., d:]
        total = (total + ((p.mT @ p) * (r.mT @ r)).sum()).clamp_min(0.0)
    return (total, x @ yk, y @ xq) if gradients else (total, None, None)


def _direct(x: Tensor, y: Tensor, d: int, loss: str, mask: Tensor | None, gradients: bool):
    blocks = list(head_blocks(x, y))
    if len(blocks) == 1:
        return _block(x, y, d, loss, mask, gradients)
    found = (_block(x[:, h], y[:, h], d, loss, mask, gradients) for h in blocks)
    totals, dq, dk = zip(*found, strict=True)
    if not gradients:
        return sum(totals), None, None
    return sum(totals), torch.cat(dq, 1), torch.cat(dk, 1)


def _block(x: Tensor, y: Tensor, d: int, loss: str, mask: Tensor | None, gradients: bool):
    batch, (x, y) = x.shape[:2], (z.flatten(0, 1) for z in (x, y))  # bmm: `@` takes longer to call
    error = _scores(x, y, batch, mask)
    total = error.square().sum()
    if loss == "student":
        total = total - _scores(x[..., d:], y[..., d:], batch, mask).square().sum()
    if not gradients:
        return total, None, None
    dq, dk = torch.bmm(error, y[..., :d]), torch.bmm(error.mT, x[..., :d])
    return total, dq.view(*batch, -1, d), dk.view(*batch, -1, d)


def _scores(x: Tensor, y: Tensor, batch: torch.Size, mask: Tensor | None) -> Tensor:
    scores = torch.bmm(x, y.mT)
    if mask is not None:
        scores.view(*batch, *scores.shape[1:]).masked_fill_(mask != 0, 0.0)
    return scores


def _pairs(cu_seqlens: Tensor, direction: str, block_mask: list[Tensor], q: Tensor, *rest) -> int:
    """How many pairs of a query and a key count in a head."""
    if not block_mask:
        return sum((stop - start) ** 2 for start, stop in pairwise(cu_seqlens.tolist()))
    pairs = 0
    for part in parts(cu_seqlens, direction, block_mask, q, *rest):
        sequences = len(part.sequences)
        if part.mask is None:
            pairs += len(q[part.rows]) * len(q[part.keys]) // sequences
        else:
            pairs += int((part.mask == 0).sum()) * sequences // len(part.mask)
    return pairs


def _put_scaled(whole: Tensor, rows: Tensor | slice, part: Tensor, scale: float) -> None:
    """As ``put``, times ``scale``, in one pass where rows are adjacent."""
    if isinstance(rows, slice):
        torch.mul(part, scale, out=heads_of(whole, rows, len(part)))
    else:
        put(whole, rows, part.mul_(scale))
