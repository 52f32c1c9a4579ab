"""The feed-forward block of a frozen layer, both of its products of 8-bit floats."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinybert_fast.ops.dispatch import (
    FLOATS,
    Impl,
    Limit,
    Limits,
    autocast,
    check_devices,
    choose,
    define,
    wanted_gradients,
    without_autocast,
)
from tinybert_fast.reference.feed_forward_fp8 import E4M3, rounded
from tinybert_fast.reference.feed_forward_fp8 import feed_forward_fp8 as reference

DTYPES = dict.fromkeys(("inner", "outer"), E4M3) | dict.fromkeys(
    ("inner_scale", "outer_scale", "reach"), torch.float32
)
UNIT = 16  # numbers of e4m3 that TMA loads at a time
FAMILIES = (9, 10)  # of GPUs: their tensor cores multiply e4m3, and TMA loads it


def why_not(device: torch.device) -> str | None:
    """Why no kernel here multiplies e4m3 on a device, or None."""
    if device.type != "cuda":
        return f"8-bit floats are multiplied on GPUs, not on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major in FAMILIES:
        return None
    return f"8-bit floats are multiplied on sm_90 and sm_100, and this GPU is sm_{major}{minor}"


def _refuses(widths: tuple[int, ...] = ()) -> str | None:
    whole = not any(width % UNIT for width in widths)
    return None if whole else f"widths {widths} are not all multiples of {UNIT}"


LIMITS = Limits(
    "feed_forward_fp8",
    torch=None,
    triton=Limit(FLOATS, ("cuda",), _refuses, why_not),
)

_forward = define(
    "feed_forward_fp8_fwd(Tensor x, Tensor inner, Tensor inner_scale, Tensor inner_bias,"
    " Tensor outer, Tensor outer_scale, Tensor outer_bias, Tensor reach) -> Tensor y",
    fake=lambda x, *weights: x.new_empty((x.shape[0], weights[3].shape[0])),
    flops=lambda x, *weights: 2 * x.shape[0] * (weights[0].numel() + weights[3].numel()),
    triton="tinybert_fast.kernels.feed_forward_fp8:forward",
)


class Fp8Weights(NamedTuple):
    """Rows of W1 (F, K), W2 (C, F) in e4m3, each with an fp32 scale: W = values * scale[:, None].

    Biases b1 (F,) and b2 (C,) as they were; ``reach`` fp32 (2,): the length of the longest row of
    W1 and the largest |b1|, by which the rows between the products are scaled.
    """

    inner: Tensor
    inner_scale: Tensor
    inner_bias: Tensor
    outer: Tensor
    outer_scale: Tensor
    outer_bias: Tensor
    reach: Tensor

    @classmethod
    def of(cls, inner: Tensor, inner_bias: Tensor, outer: Tensor, outer_bias: Tensor) -> Fp8Weights:
        """Those of ``F.linear(F.gelu(F.linear(x, inner, inner_bias)), outer, outer_bias)``."""
        first, first_scale = rounded(inner.detach().float())
        second, second_scale = rounded(outer.detach().float())
        longest = (first.float().norm(dim=1) * first_scale).amax()
        reach = torch.stack((longest, inner_bias.detach().float().abs().amax()))
        biases = inner_bias.detach(), outer_bias.detach()
        return cls(first, first_scale, biases[0], second, second_scale, biases[1], reach)


def feed_forward_fp8(x: Tensor, weights: Fp8Weights, *, impl: Impl = "auto") -> Tensor:
    """``F.linear(F.gelu(F.linear(x, W1, b1)), W2, b2)`` with both operands of both products rounded
    to e4m3 (Micikevicius et al. 2022, arXiv:2209.05433), a scale for each row: (..., K) -> (..., C)
    in x's dtype, in autocast's where autocast is on. Without a gradient.

    What rounding changes is a few percent of y, whatever the sizes. ``triton`` adds less than a
    tenth of that: tensor cores sum products of e4m3 to about 14 bits, and y comes out in bf16.

    Args:
        x: fp16, bf16, fp32 or fp64 (``triton``: not fp64); any strides.
        weights: of ``Fp8Weights.of``, on x's device.
        impl: "auto" or a name: ``ops/dispatch.py``. ``triton``: on sm_90 and sm_100, for K, F and C
            that are multiples of 16; ``reference``, everywhere, multiplies e4m3 in fp32.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, a gradient that autograd wants, or a
            named ``impl`` that cannot serve the call.
    """
    x = autocast(x)
    widths = (x.shape[-1], *weights.outer.shape[::-1])
    name, _ = choose(impl, LIMITS, x, widths=widths)
    _check(x, weights)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y = (
        without_autocast(reference, rows, *weights)
        if name == "reference"
        else _forward(rows, *weights, name)
    )
    return y.view(*x.shape[:-1], y.shape[-1])


def _check(x: Tensor, weights: Fp8Weights) -> None:
    op = "feed_forward_fp8"
    if any(wanted_gradients(x, *weights)):
        raise ValueError(
            f"{op} has no gradient, and an operand requires one; call it under torch.no_grad()"
        )
    check_devices(op, x.device, **weights._asdict())
    (width, hidden), outputs = (x.shape[-1], weights.inner.shape[0]), weights.outer.shape[0]
    expected: dict[str, tuple[Any, ...]] = {
        "inner": (hidden, width),
        "inner_scale": (hidden,),
        "inner_bias": (hidden,),
        "outer": (outputs, hidden),
        "outer_scale": (outputs,),
        "outer_bias": (outputs,),
        "reach": (2,),
    }
    for name, tensor in weights._asdict().items():
        wanted = DTYPES.get(name)
        if tensor.shape != expected[name] or wanted not in (None, tensor.dtype):
            raise ValueError(
                f"{op}: {name} must be {expected[name]}{f' in {wanted}' if wanted else ''} for x "
                f"{tuple(x.shape)}; got {tuple(tensor.shape)} in {tensor.dtype}"
            )
