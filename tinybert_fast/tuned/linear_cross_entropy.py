"""Labelled rows only, in chunks: no (R, V) tensor is ever alive; gradients in the same pass.

For a row with upstream gradient u, smoothing s and z = softmax(logits) - (1 - s) onehot - s / V:

    loss = logsumexp(logits) - (1 - s) logits[label] - s mean(logits)
    dhidden = u z W,   dW = (u z)^T hidden,   dbias = u z                   summed over the rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinybert_fast.ops import native

CHUNK_CELLS = 1 << 24  # logits alive at a time: 64 MB in fp32, and as much beside them
# Rows of logits begin at multiples of 64 bytes: on a CPU an fp32 product whose output does not
# takes half as long again.
ALIGN = 16
PIECE = 1024  # words: on a CPU an fp32 product with the rows of a tall matrix is faster in pieces


def forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    upstream: Tensor | None,
    wanted: list[bool],
):
    """-> losses (R,); gradients of sum(upstream * losses), upstream 1 if None, with respect to
    hidden (T, C), weight (V, C) and bias (V,), empty unless wanted.
    """
    with_hidden, with_weight, with_bias = wanted
    narrow, wide = hidden.dtype, torch.promote_types(hidden.dtype, torch.float32)
    words = weight.shape[0]
    live, targets, scale = _targets(labels, ignore_index, words, upstream, wide)
    selected = hidden.index_select(0, rows)
    projection = weight.to(narrow)
    losses = hidden.new_empty(len(labels), dtype=wide)
    dselected = hidden.new_empty(selected.shape if with_hidden else (0,), dtype=wide)
    dweight = hidden.new_zeros(weight.shape if with_weight else (0,), dtype=wide)
    dbias = hidden.new_zeros(words if with_bias else 0, dtype=wide)

    size = _balanced(len(labels), max(1, CHUNK_CELLS // words))
    logits, log_probabilities = (
        hidden.new_empty(size, -(-words // ALIGN) * ALIGN, dtype=wide) for _ in range(2)
    )
    logits[:, words:] = -torch.inf
    for first in range(0, len(labels), size):
        chunk = slice(first, min(first + size, len(labels)))
        some, target, weights = selected[chunk], targets[chunk, None], scale[chunk, None]
        x, y = logits[: len(some)], log_probabilities[: len(some)]
        cells = x[:, :words]
        if narrow == wide:
            torch.mm(some, projection.mT, out=cells)
        else:
            cells.copy_(some @ projection.mT)
        if bias is not None:
            cells += bias
        torch.log_softmax(x, 1, out=y)
        loss = -y.gather(1, target).squeeze(1)
        if label_smoothing:
            loss = (1 - label_smoothing) * loss - label_smoothing * y[:, :words].mean(1)
        losses[chunk] = loss * live[chunk]
        if not any(wanted):
            continue
        z = y.exp_()[:, :words]
        if label_smoothing:
            z -= label_smoothing / words
        z.scatter_add_(1, target, z.new_full(target.shape, label_smoothing - 1.0))
        if with_bias:
            dbias += (weights.mT @ z).squeeze(0)
        z = z.to(narrow)
        if with_hidden:
            torch.mul(z @ projection, weights, out=dselected[chunk])
        if with_weight:
            weighted = (some * weights).to(narrow)
            if narrow == wide:
                torch.addmm(dweight, z.mT, weighted, out=dweight)  # FLOP counters miss addmm_
            else:
                dweight += z.mT @ weighted
    dhidden = dselected
    if with_hidden:
        dhidden = hidden.new_zeros(hidden.shape, dtype=wide).index_add_(0, rows, dselected)
    return losses, dhidden, dweight, dbias


def forward_native(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    upstream: Tensor | None,
    wanted: list[bool],
):
    """The same on a CPU, where the compiled module makes logits their gradients in one pass."""
    with_hidden, with_weight, with_bias = wanted
    narrow, words = hidden.dtype, weight.shape[0]
    if narrow not in (torch.float32, torch.bfloat16):
        return forward(
            hidden, weight, bias, rows, labels, ignore_index, label_smoothing, upstream, wanted
        )
    _, targets, scale = _targets(labels, ignore_index, words, upstream, torch.float32)
    selected = hidden.index_select(0, rows)
    projection = weight.to(narrow)
    losses = hidden.new_empty(len(labels), dtype=torch.float32)
    dselected = torch.empty_like(selected) if with_hidden else hidden.new_empty(0)
    dweight = hidden.new_empty(weight.shape if with_weight else (0,), dtype=torch.float32)
    dbias = hidden.new_zeros(words if with_bias else 0, dtype=torch.float32)
    added = None if bias is None else bias.float().contiguous()
    if not len(labels):
        dweight.zero_()
    size = _balanced(len(labels), max(1, 4 * CHUNK_CELLS // (words * narrow.itemsize)))
    cells = hidden.new_empty(size, -(-words // ALIGN) * ALIGN)[:, :words]
    for first in range(0, len(labels), size):
        chunk = slice(first, min(first + size, len(labels)))
        some = selected[chunk]
        z = cells[: len(some)]
        if narrow == torch.float32:
            for word in range(0, words, PIECE):
                piece = slice(word, word + PIECE)
                torch.mm(some, projection[piece].mT, out=z[:, piece])
        else:
            torch.mm(some, projection.mT, out=z)
        losses[chunk] = native.cross_entropy(
            z, added, targets[chunk], scale[chunk], label_smoothing, any(wanted),
            dbias if with_bias else None,
        )  # fmt: skip
        if with_hidden:
            torch.mm(z, projection, out=dselected[chunk])
        if with_weight and narrow == torch.float32:
            torch.addmm(dweight, z.mT, some, beta=min(first, 1), out=dweight)
        elif with_weight:
            product = z.mT @ some
            dweight = dweight.add_(product) if first else dweight.copy_(product)
    dhidden = dselected
    if with_hidden:
        dhidden = hidden.new_zeros(hidden.shape, dtype=torch.float32)
        dhidden.index_add_(0, rows, dselected.float())
    return losses, dhidden, dweight, dbias


def _balanced(count: int, most: int) -> int:
    """The size of the fewest chunks of at most ``most`` that ``count`` takes, each as long."""
    chunks = max(1, -(-count // most))
    return max(1, -(-count // chunks))


def _targets(labels: Tensor, ignore_index: int, words: int, upstream: Tensor | None, dtype):
    """-> whether a row counts; its label, 0 if not; its upstream gradient u, 0 if not: (R,) each.

    On a GPU nobody waits to look at labels; there PyTorch's own kernels stop.
    """
    live = labels != ignore_index
    targets = torch.where(live, labels, 0)
    if targets.device.type == "cpu" and targets.numel():
        low, high = torch.stack(targets.aminmax()).tolist()
        if low < 0 or high >= words:
            raise ValueError(
                f"linear_cross_entropy: label {low if low < 0 else high} is outside the vocabulary "
                f"of {words}; expected 0 to {words - 1}, or ignore_index"
            )
    return live, targets, live.to(dtype) if upstream is None else upstream.to(dtype) * live
