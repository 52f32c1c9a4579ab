"""Labelled rows only, in chunks: no (R, V) tensor is ever alive; gradients in the same pass.

dlogits = softmax(logits) - onehot,  dhidden = dlogits W / R,  dW = dlogits^T hidden / R
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_CELLS = 1 << 23  # logits alive at a time: 32 MB in fp32


def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, labels: Tensor):
    """-> loss, and its gradients with respect to hidden (T, C), weight (V, C) and bias (V,)."""
    narrow, wide = hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)
    selected = hidden.index_select(0, rows)
    count = max(len(labels), 1)
    loss = hidden.new_zeros((), dtype=wide)
    dselected = torch.empty_like(selected, dtype=wide)
    dweight = torch.zeros_like(weight, dtype=wide)
    dbias = hidden.new_zeros(0 if bias is None else len(bias), dtype=wide)
    projection = weight.to(narrow)
    size = max(1, CHUNK_CELLS // weight.shape[0])
    for first in range(0, len(labels), size):
        some, target = selected[first : first + size], labels[first : first + size, None]
        logits = (some @ projection.mT).to(wide)
        if bias is not None:
            logits += bias
        log_probabilities = torch.log_softmax(logits, 1)
        loss -= log_probabilities.gather(1, target).sum()
        dlogits = log_probabilities.exp_()
        dlogits.scatter_add_(1, target, dlogits.new_full(target.shape, -1.0))
        if bias is not None:
            dbias += dlogits.sum(0)
        dlogits = dlogits.to(narrow)
        dselected[first : first + size] = dlogits @ projection
        if narrow == wide:
            dweight.addmm_(dlogits.mT, some, alpha=1.0 / count)
        else:
            dweight.add_(dlogits.mT @ some, alpha=1.0 / count)
    dselected.div_(count)
    dbias.div_(count)
    dhidden = torch.zeros_like(hidden, dtype=wide).index_add_(0, rows, dselected)
    return loss / count, dhidden, dweight, dbias
