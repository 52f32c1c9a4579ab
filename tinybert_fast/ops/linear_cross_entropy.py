"""The vocabulary projection and its cross-entropy, on the labelled rows alone."""

from __future__ import annotations

import torch
from torch import Tensor

from tinybert_fast.ops.dispatch import FLOATS_AND_DOUBLE, Impl, Limit, Limits, choose, define
from tinybert_fast.ops.layer_norm import check_columns
from tinybert_fast.ops.loss import ScalarLoss
from tinybert_fast.reference.linear_cross_entropy import linear_cross_entropy as reference

LIMITS = Limits("linear_cross_entropy", torch=Limit(FLOATS_AND_DOUBLE))


def _fake(hidden, weight, bias, rows, labels):
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return (
        hidden.new_empty((), dtype=wide),
        torch.empty_like(hidden),
        torch.empty_like(weight),
        hidden.new_empty(0, dtype=wide) if bias is None else torch.empty_like(bias),
    )


_forward = define(
    "linear_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor rows,"
    " Tensor labels) -> (Tensor loss, Tensor dhidden, Tensor dweight, Tensor dbias)",
    fake=_fake,
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
        Scalar, fp32 or wider: the mean over R; 0 with zero gradients where R = 0.

    Raises:
        ValueError: shapes or dtypes that disagree, or a named ``impl`` that cannot serve the call.
        IndexError or RuntimeError: a row or label out of range, from PyTorch.
    """
    impls = choose(impl, LIMITS, hidden)
    if hidden.dim() != 2:
        raise ValueError(f"linear_cross_entropy: hidden must be (T, C); got {tuple(hidden.shape)}")
    check_columns("linear_cross_entropy", hidden, weight=weight[0])
    if bias is not None:
        check_columns("linear_cross_entropy", weight.mT, bias=bias)
    integers = rows.dtype == labels.dtype == torch.int64
    if rows.dim() != 1 or rows.shape != labels.shape or not integers:
        raise ValueError(
            "linear_cross_entropy: rows and labels must both be int64 (R,); got "
            f"{rows.dtype} {tuple(rows.shape)} and {labels.dtype} {tuple(labels.shape)}"
        )
    operands = (hidden, weight, bias, rows, labels)
    if impls[0] == "reference":
        return reference(*operands)
    return ScalarLoss.apply(_forward, reference, impls, *operands)
