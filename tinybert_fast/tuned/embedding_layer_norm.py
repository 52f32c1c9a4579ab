"""Embedding sum, layer norm and dropout with PyTorch's embedding and layer-norm kernels."""

from __future__ import annotations

from functools import partial

import torch

from tinybert_fast.reference.philox import keep_scale
from tinybert_fast.tuned import philox, random

aten = torch.ops.aten


def _forward(
    drawn, word, position, token_type, weight, bias, input_ids, position_ids, token_type_ids,
    padding_idx, eps, dropout_p, seed, site, sequences, positions,
):  # fmt: skip
    """Tables and (T,) ids -> y in the tables' dtype, sum, mean, rstd (wide), cells (uint8)."""
    wide = torch.promote_types(word.dtype, torch.float32)
    total = word.index_select(0, input_ids).to(wide)
    total = total.add_(position.index_select(0, position_ids))
    total = total.add_(token_type.index_select(0, token_type_ids))
    y, mean, rstd = torch.native_layer_norm(
        total, total.shape[-1:], weight.to(wide), bias.to(wide), eps
    )
    cells = torch.empty(0, dtype=torch.uint8, device=word.device)
    if dropout_p > 0.0:
        cells = drawn(seed, site).hidden(sequences, positions, y.shape[1])
        y = y.mul_(random.keep_mask(cells, dropout_p, wide)).mul_(keep_scale(dropout_p))
    return y.to(word.dtype), total.to(word.dtype), mean, rstd, cells


# The implementations: dropout of torch's own generator, and on a CPU that of the reference.
forward, forward_philox = (partial(_forward, cells) for cells in (random.Cells, philox.Cells))


def backward(
    grad, total, mean, rstd, cells, weight, input_ids, position_ids, token_type_ids, seed, site,
    sequences, positions, words, position_rows, types, padding_idx, dropout_p, wanted,
):  # fmt: skip
    """Gradients of the three tables (words, position_rows, types rows), weight and bias; what is
    not wanted is empty.

    ``cells`` holds the mask, so nothing is drawn from the seed again.
    """
    wide = mean.dtype
    grad = grad.to(wide)
    if dropout_p > 0.0:
        grad = random.keep_mask(cells, dropout_p, wide).mul_(keep_scale(dropout_p)).mul_(grad)
    dtotal, dweight, dbias = aten.native_layer_norm_backward(
        grad.contiguous(), total.to(wide), total.shape[-1:], mean, rstd, weight.to(wide),
        weight.to(wide), (True, True, True),
    )  # fmt: skip
    dtotal = dtotal.to(total.dtype)
    tables = (
        aten.embedding_dense_backward(dtotal, ids, rows, padding, False)
        if want
        else dtotal.new_empty(0)
        for want, ids, rows, padding in zip(
            wanted,
            (input_ids, position_ids, token_type_ids),
            (words, position_rows, types),
            (padding_idx, -1, -1),
        )
    )
    return (*tables, dweight.to(weight.dtype), dbias.to(weight.dtype))
