"""loss = mean_r CE(hidden[rows_r] W^T + bias, labels_r): the masked-token head, labelled rows only.

Shapes: hidden (T, C), weight (V, C), bias (V,), rows and labels (R,). No row at all: loss 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, labels: Tensor
) -> Tensor:
    """``F.cross_entropy(F.linear(hidden[rows], weight, bias), labels)``; softmax fp32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden[rows], weight.to(hidden.dtype)).to(wide)
    logits = logits if bias is None else logits + bias
    return -logits.log_softmax(-1).gather(1, labels[:, None]).sum() / max(len(labels), 1)
