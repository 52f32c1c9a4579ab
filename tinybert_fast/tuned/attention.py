"""Attention over packed sequences in PyTorch: equal lengths run as one batch, no padding, no mask.

Without dropout each batch is one fused scaled-dot-product attention. With dropout PyTorch would
fall to a path that holds the N x N tensors of the whole batch, so scores are computed in blocks of
at most SCRATCH cells, in the forward and again in the backward, and none outlives its block.

    P = softmax(scale * Q K^T),  dV = (P * M)^T dO,  dP = (dO V^T) * M,
    dS = P * (dP - rowsum(P * dP)),  dQ = scale * dS K,  dK = scale * dS^T Q

with M = keep / keep_rate; the factor is applied to V and dO, which are smaller than P. Under a
BlockMask the queries of one row of its blocks meet the keys of the blocks that it lists, and no
others are computed. On a GPU in fp16 and bf16, FlashAttention-2 in its varlen form serves calls
without a block mask, head dims padded to a multiple of 8. ``native``, on a CPU, is the compiled
module's attention, and this one with the reference's dropout where there are masks, or fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast.ops import native
from tinybert_fast.reference.block_mask import tiles_of
from tinybert_fast.reference.philox import keep_scale, threshold
from tinybert_fast.tuned import philox, random

SCRATCH = 1 << 20  # scores alive at a time: 4 MB in fp32, inside an L2 + L3 share
FLASH_ALIGNMENT = 8  # head dims of FlashAttention-2
FLASH_WIDEST, FLASH_SM = 256, (8, 0)  # numbers of a head; the least compute capability

aten = torch.ops.aten


class Part(NamedTuple):
    """Queries that meet the same keys: all tokens of some sequences of one length, or one row of
    blocks of one sequence.

    sequences: their numbers. rows, keys: packed rows of the queries and of the keys, those of each
    sequence as many as the others'. mask: additive (1 or b, 1, n, m), or None. first, tiles: where
    the n x m cells lie in the sequence's: the first query, and the numbers of the 32 columns that
    each 32 of the keys are, None if they are all.
    """

    sequences: list[int]
    rows: Tensor | slice
    keys: Tensor | slice
    mask: Tensor | None
    first: int = 0
    tiles: Tensor | None = None


def _forward(
    cells, q, k, v, cu_seqlens, work, max_length, scale, direction, dropout_p, seed, site, masks,
):  # fmt: skip
    """(T, H, D) operands -> out (T, H, D), lse (T, H) and the rng state that fused kernels return.

    Blocked scores leave lse at 0: their backward computes the softmax again and does not read it.
    """
    q, k, v = (rows_together(x) for x in (q, k, v))
    if _fused_on_gpu(q, direction, masks):
        return _flash_forward(q, k, v, cu_seqlens, max_length, scale, direction, dropout_p)
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    lse = q.new_zeros(q.shape[:2], dtype=_wide(q))
    drawn = cells(seed, site) if dropout_p > 0.0 else None
    fused = _fused_on_cpu(q, dropout_p, masks)
    for part in parts(cu_seqlens, direction, masks, q, fused):
        count = len(part.sequences)
        queries, keys, values = (
            heads_of(x, at, count) for x, at in ((q, part.rows), (k, part.keys), (v, part.keys))
        )
        if fused:
            o, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(
                queries, keys, values, attn_mask=part.mask, scale=scale
            )
            put(lse, part.rows, log_sum)
        else:
            o = _blocked_forward(queries, keys, values, part, scale, dropout_p, drawn)
        put(out, part.rows, o)
    return out, lse, torch.zeros(2, dtype=torch.int64, device=q.device)


def _backward(
    cells, grad, q, k, v, out, lse, rng, cu_seqlens, work, max_length, scale, direction, dropout_p,
    seed, site, masks,
):  # fmt: skip
    """Gradients of q, k, v (T, H, D); dropout masks are drawn again, in the forward's order."""
    grad, q, k, v = (rows_together(x) for x in (grad, q, k, v))
    if _fused_on_gpu(q, direction, masks):
        return _flash_backward(
            grad, q, k, v, out, lse, rng, cu_seqlens, max_length, scale, direction, dropout_p
        )
    by_blocks = len(masks) > 1
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    # A key of blocks is met by several rows of them: their sum is kept wide.
    new = torch.zeros if by_blocks else torch.empty
    dk, dv = (
        new(x.shape, dtype=_wide(x) if by_blocks else x.dtype, device=x.device) for x in (k, v)
    )
    drawn = cells(seed, site) if dropout_p > 0.0 else None
    fused = _fused_on_cpu(q, dropout_p, masks)
    for part in parts(cu_seqlens, direction, masks, q, fused):
        count = len(part.sequences)
        queries, do = (heads_of(x, part.rows, count) for x in (q, grad))
        keys, values = (heads_of(x, part.keys, count) for x in (k, v))
        if fused:
            o = heads_of(out, part.rows, count)
            log_sum = heads_of(lse[..., None], part.rows, count)[..., 0]  # (b, H, n)
            grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                do, queries, keys, values, o, log_sum, 0.0, False, attn_mask=part.mask, scale=scale
            )
        else:
            grads = _blocked_backward(queries, keys, values, do, part, scale, dropout_p, drawn)
        put(dq, part.rows, grads[0])
        for whole, own in ((dk, grads[1]), (dv, grads[2])):
            (add if by_blocks else put)(whole, part.keys, own)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


forward, backward = (partial(f, random.Cells) for f in (_forward, _backward))


def forward_native(
    q, k, v, cu_seqlens, work, max_length, scale, direction, dropout_p, seed, site, masks
):
    """``forward`` with the dropout of the reference, and in the compiled module where that can."""
    call = (cu_seqlens, work, max_length, scale, direction, dropout_p, seed, site, masks)
    if not _compiled(q, masks):
        return _forward(philox.Cells, q, k, v, *call)
    dtype, bound = q.dtype, threshold(dropout_p) if dropout_p > 0.0 else 0
    q, k, v = (rows_together(_widened(x)) for x in (q, k, v))
    out, lse = native.attention_forward(q, k, v, cu_seqlens, scale, direction, bound, seed, site)
    return out.to(dtype), lse, torch.zeros(2, dtype=torch.int64, device=q.device)


def backward_native(
    grad, q, k, v, out, lse, rng, cu_seqlens, work, max_length, scale, direction, dropout_p, seed,
    site, masks,
):  # fmt: skip
    call = (cu_seqlens, work, max_length, scale, direction, dropout_p, seed, site, masks)
    if not _compiled(q, masks):
        return _backward(philox.Cells, grad, q, k, v, out, lse, rng, *call)
    dtype, bound = q.dtype, threshold(dropout_p) if dropout_p > 0.0 else 0
    grad, q, k, v, out = (rows_together(_widened(x)) for x in (grad, q, k, v, out))
    grads = native.attention_backward(
        grad, q, k, v, out, lse, cu_seqlens, scale, direction, bound, seed, site
    )
    return tuple(x.to(dtype) for x in grads)


def _compiled(q: Tensor, masks: list[Tensor]) -> bool:
    """Whether csrc/attention.cpp serves the call: it knows no masks, and fp32 at most."""
    return not masks and q.dtype != torch.float64


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.dtype == torch.float16 else x  # csrc reads fp32 and bf16


def parts(
    cu_seqlens: Tensor, direction: str, masks: list[Tensor], q: Tensor, fused: bool, beside: int = 0
) -> Iterator[Part]:
    """All queries, each once. ``masks``: nothing, one dense mask, or the lists of a BlockMask;
    ``beside``: as ``equal_lengths`` takes it.
    """
    if len(masks) > 1:
        yield from _rows_of_blocks(cu_seqlens, direction, masks, q)
        return
    block_mask = masks[0] if masks else None
    for rows, sequences, length in equal_lengths(cu_seqlens, q.shape[1], not fused, beside):
        dtype = q.dtype if block_mask is None else _wide(q)
        mask = _additive_mask(length, direction, block_mask, sequences, dtype, q.device)
        yield Part(sequences, rows, rows, mask)


def _rows_of_blocks(
    cu_seqlens: Tensor, direction: str, masks: list[Tensor], q: Tensor
) -> Iterator[Part]:
    offsets, blocks, tile_of_entry, *_, cells = masks
    side = cells.shape[1]
    bounds, segments = cu_seqlens.tolist(), offsets.tolist()
    pairs = tiles_of(cells)  # (P + 1, side, side), the last of a full block
    within = torch.arange(side, device=q.device)
    for b, (start, stop) in enumerate(pairwise(bounds)):
        of_mask = segments[b if len(segments) > 1 else 0]
        for first in range(0, stop - start, side):
            row = first // side
            entries = slice(of_mask[2 * row], of_mask[2 * row + 2])
            met, increasing = blocks[entries].long().sort()
            tile = tile_of_entry[entries].long()[increasing]
            inside = met * side < stop - start
            if direction == "causal":
                inside &= met <= row
            elif direction == "anti_causal":
                inside &= met >= row
            met, tile = met[inside], tile[inside]
            ranks = (met[:, None] * side + within).flatten()
            ranks = ranks[ranks < stop - start]  # the last block may end early
            queries = min(side, stop - start - first)
            allowed = pairs[tile].transpose(0, 1).flatten(1)[:queries, : len(ranks)]
            if direction != "both":
                own = first + within[:queries, None]
                allowed = allowed & (ranks <= own if direction == "causal" else ranks >= own)
            mask = None
            if not len(ranks) or not allowed.all():
                mask = _minus_infinity(~allowed[None], _wide(q))
            tiles = (met[:, None] * (side // 32) + within[: side // 32]).flatten()
            rows = slice(start + first, start + first + queries)
            yield Part([b], rows, start + ranks, mask, first, tiles)


def equal_lengths(
    cu_seqlens: Tensor, heads: int, blocked: bool, beside: int = 0
) -> Iterator[tuple[Tensor | slice, list[int], int]]:
    """Batches of sequences of one length: (their rows, their numbers, the length).

    With ``blocked``, as many as keep heads * length * (length + beside) numbers within SCRATCH:
    scores, and what there is ``beside`` them for a token and head.
    """
    bounds = cu_seqlens.tolist()
    by_length: dict[int, list[int]] = {}
    for b, (start, stop) in enumerate(pairwise(bounds)):
        if stop > start:
            by_length.setdefault(stop - start, []).append(b)
    for length, numbers in by_length.items():
        most = max(1, SCRATCH // (heads * length * (length + beside))) if blocked else len(numbers)
        for first in range(0, len(numbers), most):
            some = numbers[first : first + most]
            starts = [bounds[b] for b in some]
            if starts[-1] - starts[0] == length * (len(some) - 1):  # adjacent: no gather
                yield slice(starts[0], starts[0] + length * len(some)), some, length
            else:
                offsets = torch.tensor(starts, device=cu_seqlens.device)[:, None]
                rows = offsets + torch.arange(length, device=cu_seqlens.device)
                yield rows.flatten(), some, length


def rows_together(x: Tensor) -> Tensor:
    """The fused kernels read the D numbers of a row as neighbours, whatever the strides say."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_of(x: Tensor, rows: Tensor | slice, count: int) -> Tensor:
    """Rows of (T, H, D), of ``count`` sequences -> (b, H, n, D), a view of adjacent rows."""
    return x[rows].view(count, -1, *x.shape[1:]).transpose(1, 2)


def put(whole: Tensor, rows: Tensor | slice, part: Tensor) -> None:
    """(b, H, n[, D]) -> rows of ``whole`` (T, H[, D])."""
    if isinstance(rows, slice):  # one copy, where the index would take two
        heads_of(whole, rows, len(part)).copy_(part)
    else:
        whole[rows] = part.transpose(1, 2).flatten(0, 1).to(whole.dtype)


def add(whole: Tensor, rows: Tensor | slice, part: Tensor) -> None:
    """(b, H, n, D) is added to rows of ``whole`` (T, H, D), no row twice."""
    whole[rows] += part.transpose(1, 2).flatten(0, 1).to(whole.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _additive_mask(length, direction, block_mask, sequences, dtype, device) -> Tensor | None:
    """0 where attention is allowed, -inf elsewhere: (1 or b, 1, n, n), or None."""
    if direction == "both" and block_mask is None:
        return None
    forbidden = torch.zeros(1, length, length, dtype=torch.bool, device=device)
    if block_mask is not None:
        chosen = block_mask[None] if block_mask.dim() == 2 else block_mask[sequences]
        forbidden = ~chosen[:, :length, :length]
    order = torch.arange(length, device=device)
    if direction == "causal":
        forbidden = forbidden | (order[:, None] < order)
    elif direction == "anti_causal":
        forbidden = forbidden | (order[:, None] > order)
    return _minus_infinity(forbidden, dtype)


def _minus_infinity(forbidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool (b, n, m) -> (b, 1, n, m)."""
    zero = torch.zeros(forbidden.shape, dtype=dtype, device=forbidden.device)
    return zero.masked_fill_(forbidden, -torch.inf)[:, None]


def head_blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Slices of the heads of (b, H, n, D) and (b, H, m, D), so that scores stay within SCRATCH."""
    batch, heads, queries, _ = q.shape
    most = max(1, SCRATCH // max(1, batch * queries * k.shape[2]))
    for first in range(0, heads, most):
        yield slice(first, min(first + most, heads))


def _blocked_forward(q, k, v, part, scale, dropout_p, drawn):
    """(b, H, n, D) and (b, H, m, D) -> the output; scores, probabilities and mask live for one
    block of heads.
    """
    q, k, v = (x.to(_wide(x)) for x in (q, k, v))
    q, v = q * scale, _undropped(v, dropout_p)
    out = torch.empty_like(q)
    for h in head_blocks(q, k):
        probabilities = _softmax(q[:, h] @ k[:, h].mT, part.mask)
        if dropout_p > 0.0:
            probabilities.mul_(_keep(part, h, probabilities, dropout_p, drawn))
        out[:, h] = probabilities @ v[:, h]
    return out


def _blocked_backward(q, k, v, grad, part, scale, dropout_p, drawn):
    q, k, v, grad = (x.to(_wide(x)) for x in (q, k, v, grad))
    q, grad = q * scale, _undropped(grad, dropout_p)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for h in head_blocks(q, k):
        probabilities = _softmax(q[:, h] @ k[:, h].mT, part.mask)
        dp = grad[:, h] @ v[:, h].mT
        dropped = probabilities
        if dropout_p > 0.0:
            keep = _keep(part, h, probabilities, dropout_p, drawn)
            dp.mul_(keep)
            dropped = keep.mul_(probabilities)
        dv[:, h] = dropped.mT @ grad[:, h]
        ds = aten._softmax_backward_data(dp, probabilities, -1, dp.dtype)
        dq[:, h] = ds @ k[:, h]
        dk[:, h] = ds.mT @ q[:, h]
    return dq.mul_(scale), dk, dv


def _keep(part: Part, heads: slice, like: Tensor, dropout_p: float, drawn) -> Tensor:
    """1 or 0 for every cell of ``like`` (b, heads, n, m)."""
    place = (part.sequences, heads, part.first, part.tiles)
    return drawn.attention_keep(*place, *like.shape[2:], dropout_p, like.dtype)


def _undropped(x: Tensor, dropout_p: float) -> Tensor:
    return x * keep_scale(dropout_p) if dropout_p > 0.0 else x


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Over the last axis; a query with no key gets zeros."""
    if mask is None:
        return torch.softmax(scores, -1)
    probabilities = torch.softmax(scores.add_(mask), -1)
    dead = (mask == -torch.inf).all(-1, keepdim=True)
    if dead.device.type == "cpu" and not dead.any():  # saves a pass over the scores
        return probabilities
    return probabilities.masked_fill_(dead, 0.0)


def _fused_on_cpu(q: Tensor, dropout_p: float, masks: list[Tensor]) -> bool:
    return q.device.type == "cpu" and dropout_p == 0.0 and not masks


def _fused_on_gpu(q: Tensor, direction: str, masks: list[Tensor]) -> bool:
    """FlashAttention-2, as PyTorch has it."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16):
        return False
    served = q.shape[-1] <= FLASH_WIDEST and torch.cuda.get_device_capability(q.device) >= FLASH_SM
    return served and not masks and direction != "anti_causal"


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
