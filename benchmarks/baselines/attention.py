"""Attention in PyTorch as it is installed: SDPA under each of its backends, FlashAttention-2 on
packed rows, FlexAttention; and xformers.

Padded q, k, v are (B, H, N, D) with ``mask``, bool (B, 1, 1, N), True where a key is real, or None;
packed ones are (T, H, D).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tinybert_fast.benchmarks.op_call import OpCall

ALIGNED = 32  # a multiple of 8, as fused kernels want heads, and the first that FlashAttention has
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def sdpa(mask: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float) -> Tensor:
    """As it comes: PyTorch chooses."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p)


class Sdpa(OpCall):
    """``sdpa``, whose setting is the backend that PyTorch chooses."""

    def __init__(self, mask: Tensor | None, *arguments: Any, **options: Any) -> None:
        name, role, *rest = arguments
        super().__init__(name, role, partial(sdpa, mask), *rest, **options)
        self.mask = mask

    def setting(self, dtype: str) -> str:
        q, k, v = self._sets(dtype)[0]
        chosen = torch._fused_sdp_choice(
            q, k, v, attn_mask=self.mask, dropout_p=self.dropout or 0.0
        )
        return SDPBackend(chosen).name.lower()


def with_backend(
    backend: SDPBackend,
    mask: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float,
    scale: float | None = None,
) -> Tensor:
    """RuntimeError if it does not serve the call."""
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale
        )


def flash_varlen(
    cu_seqlens: Tensor,
    longest: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float,
    scale: float | None = None,
) -> Tensor:
    """FlashAttention-2 on packed rows, as jagged tensors call it; fp16 and bf16 on a GPU alone."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, dropout_p, False, False, scale=scale
    )[0]


def flex(
    attend: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dropout_p: float,
    scale: float | None = None,
) -> Tensor:
    """``attend`` is flex_attention compiled."""
    if dropout_p:
        raise ValueError(f"FlexAttention has no dropout; got dropout_p={dropout_p}")
    return attend(q, k, v, scale=scale)


class Xformers:
    """memory_efficient_attention on packed rows, by the kernel that it chooses. The package loads
    at the first call, so that what it raises then is this provider's and no other's."""

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        self.lengths, self.device = lengths, device

    @cached_property
    def mask(self) -> Any:
        from xformers.ops.fmha import BlockDiagonalMask

        return BlockDiagonalMask.from_seqlens(list(self.lengths), device=self.device)

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, scale: float | None = None
    ) -> Tensor:
        from xformers.ops import memory_efficient_attention

        rows = (x.unsqueeze(0) for x in (q, k, v))  # (1, T, H, D)
        return memory_efficient_attention(
            *rows, attn_bias=self.mask, p=dropout_p, scale=scale
        ).squeeze(0)


def padded_heads(
    attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, **options: Any
) -> Tensor:
    """``attend`` on heads that zeros have made ALIGNED wide, which leaves the scores as they are
    under the scale of the narrow ones."""
    width = q.shape[-1]
    q, k, v = (F.pad(x, (0, ALIGNED - width)) for x in (q, k, v))
    return attend(q, k, v, scale=width**-0.5, **options)[..., :width]


def with_any_heads(attend: Callable[..., Tensor], width: int) -> dict[str, Callable[..., Tensor]]:
    """Settings: heads as they are and, where that is no multiple of 8, padded."""
    if width % 8 == 0:
        return {"": attend}
    return {"": attend, f"heads of {ALIGNED}": partial(padded_heads, attend)}
