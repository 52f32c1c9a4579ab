"""MiniLM's relation loss and its gradients, equal lengths batched, scores in blocks.

    S = A B^T / sqrt(D),  T = C D^T / sqrt(Dt),  P = softmax(S),  Q = softmax(T),  w = 1 / (R T)
    loss = w sum Q (log Q - log P),   E = P - Q,   dA = w E B / sqrt(D),   dB = w E^T A / sqrt(D)

Of a relation of A with itself dA is the sum of both, w (E + E^T) A / sqrt(D). ``native``, on a CPU,
is the compiled module, one sequence and head at a time, and this one in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinybert_fast.ops import native
from tinybert_fast.tuned.attention import SCRATCH, equal_lengths, heads_of, put, rows_together


def forward(
    a: Tensor,
    b: Tensor | None,
    c: Tensor,
    d: Tensor | None,
    cu_seqlens: Tensor,
    work: Tensor,
    max_length: int,
    wanted: list[bool],
):
    """(T, R, D) student, (T, R, Dt) teacher -> loss, da, db; db is empty if b is None, and both
    are if neither is wanted.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    tokens, heads, width = a.shape
    scale, scale_teacher = width**-0.5, c.shape[-1] ** -0.5
    weight = 1.0 / max(tokens * heads, 1)
    loss = a.new_zeros((), dtype=wide)
    gradients = any(wanted)
    da = torch.empty(a.shape if gradients else (0,), dtype=wide, device=a.device)
    db = torch.empty((0,) if b is None else da.shape, dtype=wide, device=a.device)
    for rows, sequences, _ in equal_lengths(cu_seqlens, heads, blocked=True):
        count = len(sequences)
        a_, c_ = heads_of(a, rows, count).to(wide), heads_of(c, rows, count).to(wide)
        b_ = a_ if b is None else heads_of(b, rows, count).to(wide)
        d_ = c_ if d is None else heads_of(d, rows, count).to(wide)
        scaled, scaled_teacher = a_ * scale, c_ * scale_teacher
        da_part, db_part = torch.empty_like(a_), torch.empty_like(b_)
        most = max(1, SCRATCH // (count * a_.shape[2] ** 2))
        for first in range(0, heads, most):
            h = slice(first, first + most)
            part, error = _rows(
                scaled[:, h] @ b_[:, h].mT, scaled_teacher[:, h] @ d_[:, h].mT
            )  # (b, h, n, n)
            loss += part
            if not gradients:
                continue
            if b is None:
                error = error + error.mT
            else:
                db_part[:, h] = error.mT @ a_[:, h]
            da_part[:, h] = error @ b_[:, h]
        if gradients:
            put(da, rows, da_part.mul_(weight * scale))
        if gradients and b is not None:
            put(db, rows, db_part.mul_(weight * scale))
    return loss.mul_(weight), da, db


def forward_native(
    a: Tensor,
    b: Tensor | None,
    c: Tensor,
    d: Tensor | None,
    cu_seqlens: Tensor,
    work: Tensor,
    max_length: int,
    wanted: list[bool],
):
    """``forward`` in the compiled module where that can: it knows fp32 at most."""
    given = [x for x in (a, b, c, d) if x is not None]
    dtypes = {x.dtype for x in given}
    if torch.float64 in dtypes:
        return forward(a, b, c, d, cu_seqlens, work, max_length, wanted)
    narrow = dtypes == {torch.bfloat16}
    a_, b_, c_, d_ = (
        None if x is None else rows_together(x if narrow else x.float()) for x in (a, b, c, d)
    )
    return native.attention_relation_kl(a_, b_, c_, d_, cu_seqlens, any(wanted))


def _rows(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of Q (log Q - log P), and P - Q, of scores (b, h, n, n), which are overwritten.

    Two exponentials a score: logarithms are scores, counted from the largest of their row, plus
    that of its probability.
    """
    student.sub_(student.amax(-1, keepdim=True))
    teacher.sub_(teacher.amax(-1, keepdim=True))
    p, q = student.softmax(-1), teacher.softmax(-1)
    largest = q.amax(-1).log_().sub_(p.amax(-1).log_())
    total = teacher.sub_(student).mul_(q).sum() + largest.sum()
    return total, p.sub_(q)
