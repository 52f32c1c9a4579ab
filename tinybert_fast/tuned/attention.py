"""Attention over packed sequences: equal lengths run as one batch, no padding, no mask.

Without dropout each batch is one fused scaled-dot-product attention. With dropout PyTorch would
fall to a path that holds the N x N tensors of the whole batch, so scores are computed in blocks of
at most SCRATCH cells, in the forward and again in the backward, and none outlives its block.

    P = softmax(scale * Q K^T),  dV = (P * M)^T dO,  dP = (dO V^T) * M,
    dS = P * (dP - rowsum(P * dP)),  dQ = scale * dS K,  dK = scale * dS^T Q

with M = keep / keep_rate; the factor is applied to V and dO, which are smaller than P. On a GPU in
fp16 and bf16, FlashAttention-2 in its varlen form serves calls without a block mask, head dims
padded to a multiple of 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast.reference.philox import keep_scale
from tinybert_fast.tuned import philox, random

SCRATCH = 1 << 20  # scores alive at a time: 4 MB in fp32, inside an L2 + L3 share
FLASH_ALIGNMENT = 8  # head dims of FlashAttention-2

aten = torch.ops.aten


def forward(
    q, k, v, cu_seqlens, first_columns, max_length, scale, direction, dropout_p, seed, site, masks
):
    """(T, H, D) operands -> out (T, H, D), lse (T, H) and the rng state that fused kernels return.

    Blocked scores leave lse at 0: their backward computes the softmax again and does not read it.
    """
    return _forward(
        random.Cells, q, k, v, cu_seqlens, max_length, scale, direction, dropout_p, seed, site,
        masks,
    )  # fmt: skip


def forward_philox(
    q, k, v, cu_seqlens, first_columns, max_length, scale, direction, dropout_p, seed, site, masks
):
    """The same, on a CPU, with the dropout of the reference."""
    return _forward(
        philox.Cells, q, k, v, cu_seqlens, max_length, scale, direction, dropout_p, seed, site,
        masks,
    )  # fmt: skip


def _forward(
    cells, q, k, v, cu_seqlens, max_length, scale, direction, dropout_p, seed, site, masks
):
    q, k, v = (_rows_together(x) for x in (q, k, v))
    block_mask = masks[0] if masks else None
    if _fused_on_gpu(q, direction, block_mask):
        return _flash_forward(q, k, v, cu_seqlens, max_length, scale, direction, dropout_p)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    lse = q.new_zeros(q.shape[:2], dtype=_wide(q))
    drawn = cells(seed, site) if dropout_p > 0.0 else None
    blocked = not _fused_on_cpu(q, dropout_p, block_mask)
    for rows, sequences, length in equal_lengths(cu_seqlens, q.shape[1], blocked):
        queries, keys, values = (heads_of(x, rows, length) for x in (q, k, v))  # (b, H, n, D)
        mask = _additive_mask(length, direction, block_mask, sequences, queries)
        if not blocked:
            o, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(
                queries, keys, values, attn_mask=mask, scale=scale
            )
            put(lse, rows, log_sum)
        else:
            o = _blocked_forward(queries, keys, values, mask, scale, dropout_p, drawn, sequences)
        put(out, rows, o)
    return out, lse, torch.zeros(2, dtype=torch.int64, device=q.device)


def backward(
    grad, q, k, v, out, lse, rng, cu_seqlens, first_columns, max_length, scale, direction,
    dropout_p, seed, site, masks,
):  # fmt: skip
    """Gradients of q, k, v (T, H, D); dropout masks are drawn again, in the forward's order."""
    return _backward(
        random.Cells, grad, q, k, v, out, lse, rng, cu_seqlens, max_length, scale, direction,
        dropout_p, seed, site, masks,
    )  # fmt: skip


def backward_philox(
    grad, q, k, v, out, lse, rng, cu_seqlens, first_columns, max_length, scale, direction,
    dropout_p, seed, site, masks,
):  # fmt: skip
    """The same for forward_philox."""
    return _backward(
        philox.Cells, grad, q, k, v, out, lse, rng, cu_seqlens, max_length, scale, direction,
        dropout_p, seed, site, masks,
    )  # fmt: skip


def _backward(
    cells, grad, q, k, v, out, lse, rng, cu_seqlens, max_length, scale, direction, dropout_p,
    seed, site, masks,
):  # fmt: skip
    grad, q, k, v = (_rows_together(x) for x in (grad, q, k, v))
    block_mask = masks[0] if masks else None
    if _fused_on_gpu(q, direction, block_mask):
        return _flash_backward(
            grad, q, k, v, out, lse, rng, cu_seqlens, max_length, scale, direction, dropout_p
        )
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    drawn = cells(seed, site) if dropout_p > 0.0 else None
    blocked = not _fused_on_cpu(q, dropout_p, block_mask)
    for rows, sequences, length in equal_lengths(cu_seqlens, q.shape[1], blocked):
        queries, keys, values, do = (heads_of(x, rows, length) for x in (q, k, v, grad))
        mask = _additive_mask(length, direction, block_mask, sequences, queries)
        if not blocked:
            o = heads_of(out, rows, length)
            log_sum = heads_of(lse[..., None], rows, length)[..., 0]  # (b, H, n)
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, queries, keys, values, o, log_sum, 0.0, False, attn_mask=mask, scale=scale
            )
        else:
            grads = _blocked_backward(
                queries, keys, values, do, mask, scale, dropout_p, drawn, sequences
            )
        for whole, part in zip((dq, dk, dv), grads, strict=True):
            put(whole, rows, part)
    return dq, dk, dv


def equal_lengths(
    cu_seqlens: Tensor, heads: int, blocked: bool
) -> Iterator[tuple[Tensor | slice, list[int], int]]:
    """Batches of sequences of one length: (their rows, their numbers, the length).

    With ``blocked``, as many as keep heads * length^2 scores each within SCRATCH.
    """
    bounds = cu_seqlens.tolist()
    by_length: dict[int, list[int]] = {}
    for b, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            by_length.setdefault(stop - start, []).append(b)
    for length, numbers in by_length.items():
        most = max(1, SCRATCH // (heads * length * length)) if blocked else len(numbers)
        for first in range(0, len(numbers), most):
            some = numbers[first : first + most]
            starts = [bounds[b] for b in some]
            if starts[-1] - starts[0] == length * (len(some) - 1):  # adjacent: no gather
                yield slice(starts[0], starts[0] + length * len(some)), some, length
            else:
                offsets = torch.tensor(starts, device=cu_seqlens.device)[:, None]
                rows = offsets + torch.arange(length, device=cu_seqlens.device)
                yield rows.flatten(), some, length


def _rows_together(x: Tensor) -> Tensor:
    """The fused kernels read the D numbers of a row as neighbours, whatever the strides say."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_of(x: Tensor, rows: Tensor | slice, length: int) -> Tensor:
    """Rows of (T, H, D) -> (b, H, n, D), a view where the rows are adjacent."""
    return x[rows].unflatten(0, (-1, length)).transpose(1, 2)


def put(whole: Tensor, rows: Tensor | slice, part: Tensor) -> None:
    """(b, H, n[, D]) -> rows of ``whole`` (T, H[, D])."""
    whole[rows] = part.transpose(1, 2).flatten(0, 1).to(whole.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _additive_mask(length, direction, block_mask, sequences, like) -> Tensor | None:
    """0 where attention is allowed, -inf elsewhere: (1 or b, 1, n, n), or None."""
    if direction == "both" and block_mask is None:
        return None
    forbidden = torch.zeros(1, length, length, dtype=torch.bool, device=like.device)
    if block_mask is not None:
        chosen = block_mask[None] if block_mask.dim() == 2 else block_mask[sequences]
        forbidden = ~chosen[:, :length, :length]
    order = torch.arange(length, device=like.device)
    if direction == "causal":
        forbidden = forbidden | (order[:, None] < order)
    elif direction == "anti_causal":
        forbidden = forbidden | (order[:, None] > order)
    dtype = like.dtype if block_mask is None else _wide(like)
    zero = torch.zeros(forbidden.shape, dtype=dtype, device=like.device)
    return zero.masked_fill_(forbidden, -torch.inf)[:, None]


def _head_blocks(batch: int, heads: int, length: int) -> Iterator[slice]:
    """Slices of the heads, so that batch * heads * length^2 scores stay within SCRATCH."""
    most = max(1, SCRATCH // (batch * length * length))
    for first in range(0, heads, most):
        yield slice(first, min(first + most, heads))


def _blocked_forward(q, k, v, mask, scale, dropout_p, drawn, sequences):
    """(b, H, n, D) -> the output; scores, probabilities and mask live for one block of heads."""
    q, k, v = (x.to(_wide(x)) for x in (q * scale, k, _undropped(v, dropout_p)))
    out = torch.empty_like(v)
    for h in _head_blocks(*q.shape[:3]):
        probabilities = _softmax(q[:, h] @ k[:, h].mT, mask)
        if dropout_p > 0.0:
            keep = drawn.attention_keep(sequences, h, q.shape[2], dropout_p, q.dtype)
            probabilities.mul_(keep)
        out[:, h] = probabilities @ v[:, h]
    return out


def _blocked_backward(q, k, v, grad, mask, scale, dropout_p, drawn, sequences):
    q, k, v, grad = (x.to(_wide(x)) for x in (q * scale, k, v, _undropped(grad, dropout_p)))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for h in _head_blocks(*q.shape[:3]):
        probabilities = _softmax(q[:, h] @ k[:, h].mT, mask)
        dp = grad[:, h] @ v[:, h].mT
        dropped = probabilities
        if dropout_p > 0.0:
            keep = drawn.attention_keep(sequences, h, q.shape[2], dropout_p, q.dtype)
            dp.mul_(keep)
            dropped = keep.mul_(probabilities)
        dv[:, h] = dropped.mT @ grad[:, h]
        ds = aten._softmax_backward_data(dp, probabilities, -1, dp.dtype)
        dq[:, h] = ds @ k[:, h]
        dk[:, h] = ds.mT @ q[:, h]
    return dq.mul_(scale), dk, dv


def _undropped(x: Tensor, dropout_p: float) -> Tensor:
    return x * keep_scale(dropout_p) if dropout_p > 0.0 else x


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Over the last axis; a query with no key gets zeros."""
    if mask is None:
        return torch.softmax(scores, -1)
    probabilities = torch.softmax(scores.add_(mask), -1)
    return probabilities.masked_fill_((mask == -torch.inf).all(-1, keepdim=True), 0.0)


def _fused_on_cpu(q: Tensor, dropout_p: float, block_mask: Tensor | None) -> bool:
    return q.device.type == "cpu" and dropout_p == 0.0 and block_mask is None


def _fused_on_gpu(q: Tensor, direction: str, block_mask: Tensor | None) -> bool:
    half = q.dtype in (torch.float16, torch.bfloat16)
    return q.is_cuda and half and block_mask is None and direction != "anti_causal"


def _aligned(x: Tensor) -> Tensor:
    return F.pad(x, (0, -x.shape[-1] % FLASH_ALIGNMENT))


def _flash_forward(q, k, v, cu_seqlens, max_length, scale, direction, dropout_p):
    out, lse, rng, _, _ = aten._flash_attention_forward(
        _aligned(q), _aligned(k), _aligned(v), cu_seqlens, cu_seqlens, max_length, max_length,
        dropout_p, direction == "causal", False, scale=scale,
    )  # fmt: skip
    return out[..., : v.shape[-1]].contiguous(), lse.mT.contiguous(), rng.view(torch.int64)


def _flash_backward(
    grad, q, k, v, out, lse, rng, cu_seqlens, max_length, scale, direction, dropout_p
):
    unused = torch.empty(0, device=q.device)
    grads = aten._flash_attention_backward(
        _aligned(grad), _aligned(q), _aligned(k), _aligned(v), _aligned(out),
        lse.mT.contiguous(), cu_seqlens, cu_seqlens, max_length, max_length, dropout_p,
        direction == "causal", rng.view(torch.uint64), unused, scale=scale,
    )  # fmt: skip
    return tuple(g[..., : x.shape[-1]].contiguous() for g, x in zip(grads, (q, k, v), strict=True))
