"""loss_r = CE(hidden[rows_r] W^T + bias, labels_r): the masked-token head, labelled rows only.

Shapes: hidden (T, C), weight (V, C), bias (V,), rows and labels (R,), loss (R,). A row whose label
is ``ignore_index`` has loss 0. Smoothing as in Szegedy et al. 2016, arXiv:1512.00567.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
) -> Tensor:
    """``F.cross_entropy(F.linear(hidden[rows], weight, bias), labels, reduction="none")``; softmax
    in fp32 or wider.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = F.linear(hidden[rows], weight.to(hidden.dtype)).to(wide)
    logits = logits if bias is None else logits + bias
    return F.cross_entropy(
        logits, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
