"""y = LayerNorm(residual + dropout(x + bias)): what closes each half of a post-norm encoder layer.

Shapes: x, residual, y (..., C); bias, weight, ln_bias (C,); sequences, positions (rows,).
Devlin et al. 2018, arXiv:1810.04805 (BertSelfOutput and BertOutput).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinybert_fast.reference import philox


def dropout_add_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    sequences: Tensor,
    positions: Tensor,
) -> Tensor:
    """``F.layer_norm(residual + F.dropout(x + bias), (C,), weight, ln_bias, eps)``."""
    branch = x.to(torch.promote_types(x.dtype, torch.float32))
    if bias is not None:
        branch = branch + bias
    if seed is not None and dropout_p > 0.0:
        keep = philox.hidden_keep(seed, site, sequences, positions, x.shape[-1], dropout_p)
        branch = branch * keep.view(x.shape) * philox.keep_scale(dropout_p)
    total = branch + residual
    centred = total - total.mean(-1, keepdim=True)
    normal = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normal * weight + ln_bias).to(residual.dtype)
