"""loss = mean KL(softmax(C D^T / sqrt(Dt)) || softmax(A B^T / sqrt(D))): MiniLM's relation loss.

Student a, b (T, R, D) against teacher c, d (T, R, Dt), R relation heads; a relation is among the
tokens of one sequence, and the mean is over the R T rows of all. With a and b queries and keys it
is Wang et al. 2020, arXiv:2002.10957, equation 5; with both the queries, the keys or the values
(b and d None) Wang et al. 2021, arXiv:2012.15828, equation 6. With P and Q the softmaxes of student
and teacher, the gradient of a student's score is dS = (P - Q) / (R T).
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_relation_kl(
    a: Tensor,
    b: Tensor | None,
    c: Tensor,
    d: Tensor | None,
    cu_seqlens: Tensor,
    work: Tensor,
    max_length: int,
) -> Tensor:
    """``F.kl_div(log_softmax(a @ b.mT / D**0.5), softmax(c @ d.mT / Dt**0.5), reduction="sum")
    / (T * R)``, a relation with itself if b and d are None.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    operands = (a, a if b is None else b, c.detach(), (c if d is None else d).detach())
    # A zero with a graph, if nothing follows.
    total = operands[0][:0].sum(dtype=wide) + operands[1][:0].sum(dtype=wide)
    for start, stop in pairwise(cu_seqlens.tolist()):
        a_, b_, c_, d_ = (x[start:stop].transpose(0, 1).to(wide) for x in operands)
        student = torch.log_softmax(a_ @ b_.mT * a_.shape[-1] ** -0.5, -1)  # (R, n, n)
        teacher = torch.log_softmax(c_ @ d_.mT * c_.shape[-1] ** -0.5, -1)
        total = total + F.kl_div(student, teacher, reduction="sum", log_target=True)
    return total / max(a.shape[0] * a.shape[1], 1)
