"""The vocabulary projection and its cross-entropy, on the labelled rows alone."""

from __future__ import annotations

import torch
from torch import Tensor

from tinybert_fast.ops.dispatch import (
    FLOATS_AND_DOUBLE,
    Impl,
    Limit,
    Limits,
    autocast,
    choose,
    define,
    without_autocast,
)
from tinybert_fast.ops.loss import ScalarLoss, in_fp32
from tinybert_fast.reference.linear_cross_entropy import linear_cross_entropy as reference

LIMITS = Limits("linear_cross_entropy", torch=Limit(FLOATS_AND_DOUBLE))


_forward = define(
    "linear_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor rows,"
    " Tensor labels) -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    fake=lambda hidden, weight, bias, *rest: (
        in_fp32(hidden, ()),
        in_fp32(hidden),
        in_fp32(hidden, weight.shape),
        in_fp32(hidden, (0,) if bias is None else bias.shape),
    ),
    torch="tinybert_fast.tuned.linear_cross_entropy:forward",
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """``F.cross_entropy(F.linear(hidden[rows], weight, bias), labels)``.

    Args:
        hidden: (T, C). weight: (V, C), the tied word embeddings. bias: (V,) or None.
        rows, labels: int64 (R,), which rows are labelled and with what, 0..V-1.

    Returns:
        Scalar, fp32 or wider: the mean over R; 0 with zero gradients where R = 0. The product runs
        in hidden's dtype, or in autocast's; the softmax in fp32 or wider.

    Raises:
        ValueError: shapes or dtypes that disagree, or a named ``impl`` that cannot serve the call.
        IndexError or RuntimeError: a row or label out of range, from PyTorch.
    """
    impls = choose(impl, LIMITS, hidden)
    if hidden.dim() != 2 or weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            "linear_cross_entropy: hidden must be (T, C) and weight (V, C); got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_cross_entropy: bias must be ({weight.shape[0]},), one per row of weight; got "
            f"{tuple(bias.shape)}"
        )
    integers = rows.dtype == labels.dtype == torch.int64
    if rows.dim() != 1 or rows.shape != labels.shape or not integers:
        raise ValueError(
            "linear_cross_entropy: rows and labels must both be int64 (R,); got "
            f"{rows.dtype} {tuple(rows.shape)} and {labels.dtype} {tuple(labels.shape)}"
        )
    operands = (autocast(hidden), weight, bias, rows, labels)
    if impls[0] == "reference":
        return without_autocast(reference, *operands)
    return ScalarLoss.apply(_forward, reference, impls, *operands)
