"""Heads on packed rows, over the Parameters of Transformers' BERT heads."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.modules.encoder import is_erf_gelu
from tinybert_fast.modules.weights import is_plain
from tinybert_fast.ops.layout import SequenceLayout

HEAD_OPS = ("bias_gelu", "layer_norm", "linear_cross_entropy")  # of a masked-LM head
IGNORED = -100  # the label of a position that has none


def first_tokens(hidden: Tensor, layout: SequenceLayout) -> Tensor:
    """What a pooler reads, (T, C) -> (B, 1, C): first tokens, zeros for an empty sequence."""
    if layout.total == 0:
        return hidden.new_zeros(layout.batch_size, 1, hidden.shape[-1])
    return without_empty(hidden.index_select(0, layout.firsts), layout)


def without_empty(first: Tensor, layout: SequenceLayout) -> Tensor:
    """Rows of first tokens (B, C) -> (B, 1, C), zeros for an empty sequence."""
    if layout.may_be_empty:
        first = first * (layout.first_rows >= 0).unsqueeze(1)
    return first.unsqueeze(1)


def predict(predictions: Any, hidden: Tensor, *, impl: Any = "auto") -> Tensor:
    """Vocabulary logits (R, V) of rows (R, C)."""
    return predictions.decoder(_transform(predictions.transform, hidden, impl))


def vocabulary_loss(
    predictions: Any,
    hidden: Tensor,
    labels: Tensor,
    *,
    reduction: str = "mean",
    impl: Any = "auto",
) -> Tensor:
    """Cross-entropy of rows (R, C) with labels (R,): the mean, 0 if there is none, the sum, or each
    ("none").
    """
    hidden = _transform(predictions.transform, hidden, impl)
    decoder = predictions.decoder
    if is_plain(decoder):
        every = torch.arange(hidden.shape[0], device=hidden.device)
        return ops.linear_cross_entropy(
            hidden, decoder.weight, decoder.bias, every, labels, reduction=reduction, impl=impl
        )
    logits = decoder(hidden).float()
    if reduction == "mean":
        return F.cross_entropy(logits, labels, reduction="sum") / max(1, len(labels))
    return F.cross_entropy(logits, labels, reduction=reduction)


def _transform(transform: Any, hidden: Tensor, impl: Any) -> Tensor:
    """LN(gelu(hidden W + b)): (R, C) -> (R, C)."""
    dense, norm = transform.dense, transform.LayerNorm
    if is_erf_gelu(transform.transform_act_fn) and is_plain(dense):
        hidden = ops.bias_gelu(F.linear(hidden, dense.weight), dense.bias, impl=impl)
    else:
        hidden = transform.transform_act_fn(dense(hidden))
    return ops.layer_norm(hidden, norm.weight, norm.bias, eps=norm.eps, impl=impl)
