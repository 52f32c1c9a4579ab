"""dropout + add + layer norm: one in-place sum, then PyTorch's fused layer norm.

The forward keeps the sum, its statistics and, with dropout, the random byte of each cell.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from tinybert_fast.reference.philox import keep_scale
from tinybert_fast.tuned import philox, random

aten = torch.ops.aten


def _forward(
    drawn, x, bias, residual, weight, ln_bias, eps, dropout_p, seed, site, sequences, positions,
    keep,
):  # fmt: skip
    """(rows, C) operands -> y and the sum (empty unless ``keep``) in the residual's dtype, mean,
    rstd (wide), cells (uint8).
    """
    wide = torch.promote_types(residual.dtype, torch.float32)
    total = x.to(wide)
    if bias is not None:
        total = _add(total, bias, x)
    cells = torch.empty(0, dtype=torch.uint8, device=x.device)
    if dropout_p > 0.0:
        cells = drawn(seed, site).hidden(sequences, positions, x.shape[1])
        kept = random.keep_mask(cells, dropout_p, wide)
        total = torch.addcmul(residual.to(wide), total, kept, value=keep_scale(dropout_p))
    else:
        total = _add(total, residual, x)
    y, mean, rstd = torch.native_layer_norm(
        total, x.shape[-1:], weight.to(wide), ln_bias.to(wide), eps
    )
    total = total.to(residual.dtype) if keep else residual.new_empty(0)
    return y.to(residual.dtype), total, mean, rstd, cells


# The implementations: dropout of torch's own generator, and on a CPU that of the reference.
forward, forward_philox = (partial(_forward, cells) for cells in (random.Cells, philox.Cells))


def _add(total: Tensor, more: Tensor, x: Tensor) -> Tensor:
    """total + more, in place unless total is still the caller's x."""
    return total + more if total is x else total.add_(more)


def backward(
    grad, total, mean, rstd, cells, weight, dropout_p, seed, site, sequences, positions, x_dtype,
    with_bias,
):  # fmt: skip
    """Gradients of x (in ``x_dtype``; empty where it equals the sum's), sum, bias, weight, ln_bias.

    ``cells`` holds the mask, so nothing is drawn from the seed again.
    """
    wide = mean.dtype
    dtotal, dweight, dln_bias = aten.native_layer_norm_backward(
        grad.to(wide).contiguous(), total.to(wide), total.shape[-1:], mean, rstd, weight.to(wide),
        weight.to(wide), (True, True, True),
    )  # fmt: skip
    dx = dtotal
    if dropout_p > 0.0:
        dx = random.keep_mask(cells, dropout_p, wide).mul_(keep_scale(dropout_p)).mul_(dtotal)
    dbias = dx.sum(0) if with_bias else dtotal.new_empty(0)
    own = dropout_p > 0.0 or x_dtype != total.dtype
    return (
        dx.to(x_dtype) if own else dtotal.new_empty(0, dtype=x_dtype), dtotal.to(total.dtype),
        dbias.to(weight.dtype), dweight.to(weight.dtype), dln_bias.to(weight.dtype),
    )  # fmt: skip
