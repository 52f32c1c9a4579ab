"""Projection + MSE, gradients in the same pass, so that no (rows, Ct) tensor waits for a backward."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(student: Tensor, weight: Tensor | None, bias: Tensor | None, teacher: Tensor):
    """-> loss, and its gradients with respect to student, weight and bias.

    E = S W^T + b - T,  dS = 2/n E W,  dW = 2/n E^T S,  db = 2/n sum E      (n entries of T)
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    if weight is None:
        error = student.to(wide) - teacher
    elif bias is None:
        error = (student @ weight.mT).to(wide) - teacher
    else:
        error = torch.addmm(bias, student, weight.mT).to(wide) - teacher
    n = max(error.numel(), 1)
    loss = error.flatten().dot(error.flatten()) / n
    error = error.mul_(2.0 / n)
    none = student.new_empty(0)
    dbias = none if bias is None else error.sum(0).to(bias.dtype)
    if weight is None:
        return loss, error.to(student.dtype), none, dbias
    narrow = error.to(student.dtype)
    return loss, narrow @ weight, narrow.mT @ student, dbias
