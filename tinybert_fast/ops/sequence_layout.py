"""The device's part of a SequenceLayout."""

from __future__ import annotations

import torch
from torch import Tensor

from tinybert_fast.ops.dispatch import (
    NATIVE_DEVICES,
    Limit,
    Limits,
    check_devices,
    choose,
    define,
)

LIMITS = Limits(
    "sequence_layout",
    torch=None,
    native=Limit((torch.bool,), NATIVE_DEVICES),
    reference=Limit((torch.bool,), ("cpu", "cuda", "meta")),
)

_extents = define(
    "sequence_extents(Tensor real) -> Tensor",
    fake=lambda real: real.new_empty((3, real.shape[0]), dtype=torch.int64),
    reference="tinybert_fast.reference.sequence_layout:extents",
    native="tinybert_fast.ops.native:sequence_extents",
)
_layout = define(
    "sequence_layout(Tensor real, Tensor cu_seqlens, SymInt total)"
    " -> (Tensor rows, Tensor sequences, Tensor positions)",
    fake=lambda real, cu_seqlens, total: (
        real.new_empty(total, dtype=torch.int64),
        real.new_empty(total, dtype=torch.int32),
        real.new_empty(total, dtype=torch.int32),
    ),
    reference="tinybert_fast.reference.sequence_layout:sequence_layout",
    native="tinybert_fast.ops.native:sequence_layout",
)


def sequence_extents(real: Tensor, impl: str = "auto") -> Tensor:
    """Bool (B, N) -> int64 (3, B): real tokens of a row, column of the first, one past that of the
    last; 0 where there is none.
    """
    choice, _ = choose(impl, LIMITS, real)
    _check(real)
    return _extents(real, choice)


def sequence_layout(
    real: Tensor, cu_seqlens: Tensor, total: int, impl: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """``real.flatten().nonzero()`` and, of each token, its sequence and its rank there: (T,) each.

    Args:
        real: bool (B, N), True where a token is real.
        cu_seqlens: int32 (B + 1,), running sum of the lengths, on the same device.
        total: T, its last number, known on the host.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    choice, _ = choose(impl, LIMITS, real)
    _check(real)
    fits = cu_seqlens.dtype == torch.int32 and cu_seqlens.shape == (len(real) + 1,)
    if not fits or not cu_seqlens.is_contiguous() or not 0 <= total <= real.numel():
        raise ValueError(
            f"sequence_layout: cu_seqlens must be int32 ({len(real) + 1},), contiguous, and total "
            f"0 to {real.numel()}; got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} and {total}"
        )
    check_devices("sequence_layout", real.device, cu_seqlens=cu_seqlens)
    return _layout(real, cu_seqlens, total, choice)


def _check(real: Tensor) -> None:
    if real.dim() != 2 or not real.is_contiguous():
        raise ValueError(
            f"sequence_layout: real must be bool (B, N), contiguous; got {tuple(real.shape)}, "
            f"strides {real.stride()}"
        )
