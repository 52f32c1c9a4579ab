"""The vocabulary projection and its cross-entropy, on the labelled rows alone."""

from __future__ import annotations

import torch
from torch import Tensor

from tinybert_fast.ops.dispatch import (
    FLOATS,
    FLOATS_AND_DOUBLE,
    TRITON_DEVICES,
    Impl,
    Limit,
    Limits,
    apply,
    autocast,
    check_devices,
    choose,
    define,
    reference_gradient,
    without_autocast,
)
from tinybert_fast.ops.loss import in_fp32, scalar_loss
from tinybert_fast.reference.linear_cross_entropy import linear_cross_entropy as reference

LIMITS = Limits(
    "linear_cross_entropy",
    torch=Limit(FLOATS_AND_DOUBLE),
    native=Limit(FLOATS_AND_DOUBLE, ("cpu",)),  # in fp64 and fp16: PyTorch
    triton=Limit(FLOATS, TRITON_DEVICES),
)
REDUCTIONS = ("mean", "sum", "none")


def _fake(hidden, weight, bias, rows, labels, *options):
    dbias = in_fp32(hidden, (0,) if bias is None else bias.shape)
    return in_fp32(hidden, labels.shape), in_fp32(hidden), in_fp32(hidden, weight.shape), dbias


def _flops(hidden, weight, bias, rows, *rest):
    return 2 * len(rows) * weight.numel() * (1 + sum(rest[-1][:2]))


_forward = define(
    "linear_cross_entropy_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor rows,"
    " Tensor labels, int ignore_index, float label_smoothing, Tensor? upstream)"
    " -> (Tensor losses, Tensor dhidden, Tensor dweight, Tensor dbias)",
    fake=_fake,
    sparing=("torch", "native", "triton"),
    flops=_flops,
    torch="tinybert_fast.tuned.linear_cross_entropy:forward",
    native="tinybert_fast.tuned.linear_cross_entropy:forward_native",
    triton="tinybert_fast.kernels.linear_cross_entropy:forward",
)


def _sum(*arguments):
    *operands, wanted, impl = arguments
    losses, *gradients = _forward(*operands, None, wanted, impl)
    return losses.sum(), *gradients


def _reference_sum(*operands):
    return reference(*operands).sum()


class _Losses(torch.autograd.Function):
    """One loss for each row. What each gradient is multiplied by is known in the backward alone,
    which therefore computes the logits again.
    """

    @staticmethod
    def forward(ctx, impls, *operands) -> Tensor:
        losses, *_ = _forward(*operands, None, [False] * 3, impls[0])
        ctx.save_for_backward(*operands[:5])
        ctx.options, ctx.impl = operands[5:], impls[1]
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        operands, needs = (*ctx.saved_tensors, *ctx.options), ctx.needs_input_grad[1:]
        if ctx.impl == "reference":
            return (None, *reference_gradient(reference, operands, needs, upstream))
        # Of order 1 inside, where fp16 does not hold a loss scale.
        largest = upstream.new_ones(())
        if len(upstream):
            largest = upstream.abs().amax().clamp_min(torch.finfo(upstream.dtype).tiny)
        _, *gradients = _forward(*operands, upstream / largest, list(needs[:3]), ctx.impl)
        rest = [None] * (len(needs) - len(gradients))
        return None, *(
            (g * largest).to(x.dtype) if need else None
            for g, x, need in zip((*gradients, *rest), operands, needs, strict=True)
        )


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    impl: Impl = "auto",
) -> Tensor:
    """``F.cross_entropy(F.linear(hidden[rows], weight, bias), labels)``: the masked-token head
    (Devlin et al. 2018, arXiv:1810.04805, section 3.1).

    Args:
        hidden: (T, C). weight: (V, C), the tied word embeddings. bias: (V,) or None. fp16, bf16,
            fp32 or fp64 each (``triton``: no fp64 hidden); any strides.
        rows, labels: int64 (R,), which rows are labelled and with what, 0..V-1. Of a row that is
            named several times a GPU adds up the gradients in no fixed order, fp32's last bits.
        ignore_index: a label that has no loss and does not count, as behind what ``mlm_mask`` has
            masked when it is given a capacity.
        label_smoothing, reduction: as ``F.cross_entropy`` takes them.
        impl: "auto", a name, or one for each pass: ``ops/dispatch.py``.

    Returns:
        Fp32 or wider: a scalar, or (R,) for "none". No labelled row: loss 0 with zero gradients.
        The product runs in hidden's dtype, or in autocast's; the softmax in fp32 or wider.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, numbers out of range, or a named
            ``impl`` that cannot serve the call. On a GPU nobody waits to look at labels: one out of
            range makes its loss NaN (triton) or stops PyTorch's kernel (torch).
        IndexError or RuntimeError: a row out of range, from PyTorch.
    """
    impls = choose(impl, LIMITS, hidden)
    _check(hidden, weight, bias, rows, labels)
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(
            f"linear_cross_entropy: label_smoothing={label_smoothing}; expected 0 to 1"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"linear_cross_entropy: reduction={reduction!r} is not one of {', '.join(REDUCTIONS)}"
        )
    operands = (
        autocast(hidden), weight, bias, rows, labels, ignore_index, float(label_smoothing),
    )  # fmt: skip
    if impls[0] == "reference":
        losses = without_autocast(reference, *operands)
        total = losses.sum()
    elif reduction == "none":
        losses = apply(_Losses, impls, *operands)
    else:
        total = scalar_loss(_sum, _reference_sum, impls, 3, *operands)
    if reduction == "none":
        return losses
    return total if reduction == "sum" else total / (labels != ignore_index).sum().clamp_min(1)


def _check(hidden, weight, bias, rows, labels) -> None:
    check_devices(
        "linear_cross_entropy", hidden.device, weight=weight, bias=bias, rows=rows, labels=labels
    )
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
