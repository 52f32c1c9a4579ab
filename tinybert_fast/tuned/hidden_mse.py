"""Projection + MSE, gradients in the same pass: no (rows, Ct) tensor waits for a backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    student: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    teacher: Tensor,
    wanted: list[bool],
    dead: Tensor | None = None,
    n: int | None = None,
):
    """-> loss, and its gradients with respect to student, weight and bias, empty unless wanted.

    E = S W^T + b - T,  dS = 2/n E W,  dW = 2/n E^T S,  db = 2/n sum E      (n entries of T)

    E is 0 in rows that are ``dead``, bool (rows,); with another ``n`` it is no mean.
    """
    narrow, wide = student.dtype, torch.promote_types(student.dtype, torch.float32)
    if weight is None:
        error = student.to(wide) - teacher
    else:
        weight = weight.to(narrow)
        error = F.linear(student, weight, None if bias is None else bias.to(narrow)).to(wide)
        error.sub_(teacher)
    if dead is not None:
        error.masked_fill_(dead[:, None], 0.0)
    n = max(error.numel(), 1) if n is None else n
    # By rows: one dot product over millions of numbers would lose five digits of fp32.
    loss = torch.linalg.vector_norm(error, dim=1).square_().sum() / n
    dstudent, dweight, dbias = (error.new_empty(0) for _ in range(3))
    if not any(wanted):
        return loss, dstudent, dweight, dbias
    if weight is None:
        return loss, error.mul_(2.0 / n), dweight, dbias
    factor = 2.0 / n
    if narrow == torch.float16:
        # E is O(1) and 2 / n may be 1e-6: fp16 holds the products of E over the root of its rows.
        root = max(len(error), 1) ** 0.5
        error, factor = error.div_(root), factor * root
    if wanted[2]:
        dbias = error.sum(0).mul_(factor)
    error = error.to(narrow)
    if wanted[0]:
        dstudent = (error @ weight).to(wide).mul_(factor)
    if wanted[1]:
        dweight = (error.mT @ student).to(wide).mul_(factor)
    return loss, dstudent, dweight, dbias
