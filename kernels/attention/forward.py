"""O and lse of attention: one program per block of queries, online softmax over blocks of keys."""

import torch
import triton
import triton.language as tl

from tinybert_fast.kernels import configs
from tinybert_fast.kernels.attention.tiles import (
    FULL,
    LOG2_E,
    PARTIAL,
    BlockList,
    Rows,
    alignment,
    allowed_cells,
    as_addressable,
    entry_of,
    fresh_like,
    grid,
    head_of,
    key_ranges,
    live_scores,
    load_tile,
    place,
    position,
    rows_at,
    segment,
    side_of,
    statistics,
    store_tile,
)
from tinybert_fast.kernels.philox import Dropout, attention_keep, site_key


@triton.jit
def _step(
    acc, peak, total, q, k_ptr, v_ptr, k_row, v_row, first_m, first_n, length, scale,
    blocks, step, key, sequence, head, threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, DIRECTION: tl.constexpr, DROPOUT: tl.constexpr, MASK: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    """One more block of keys: the sums so far are rescaled to the new largest score."""
    k = load_tile(k_ptr, k_row, first_n, length, D, BLOCK_N, BLOCK_D, ALIGN)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
    if MASK != "none":
        live = live_scores(first_m, first_n, length, BLOCK_M, BLOCK_N, DIRECTION)
        if MASK == "cells":
            entry = entry_of(step, SIDE, BLOCK_N)
            live = live & allowed_cells(blocks, entry, first_m, first_n, BLOCK_M, BLOCK_N, SIDE)
        scores = tl.where(live, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    base = new_peak
    if MASK != "none":  # a query without a key so far: -inf - -inf is NaN
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(scores * scale - base[:, None])
    fade = tl.exp2(peak - base)
    total = total * fade + tl.sum(p, 1)
    if DROPOUT:
        keep = attention_keep(key, sequence, head, first_m, first_n, threshold, BLOCK_M, BLOCK_N)
        p = tl.where(keep, p, 0.0)
    v = load_tile(v_ptr, v_row, first_n, length, D, BLOCK_N, BLOCK_D, ALIGN)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit(do_not_specialize=["max_length", "site"])
def _forward_kernel(
    q, k, v, out, lse, work, blocks, max_length, scale, dropout, site,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, DIRECTION: tl.constexpr, DROPOUT: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    task, first = place(work, max_length, BLOCK_M)
    sequence, length, head = tl.load(task), tl.load(task + 1), tl.program_id(1)
    if first >= length:
        return
    if SIDE > 0:
        low, high = segment(blocks, sequence, first, length, PARTIAL, SIDE, BLOCK_N)
    k_ptr = head_of(k, task, head, ALIGN)
    v_ptr = head_of(v, task, head, ALIGN)
    q_ptr = head_of(q, task, head, ALIGN)
    q_tile = load_tile(q_ptr, q.row, first, length, D, BLOCK_M, BLOCK_D, ALIGN)
    key = site_key(dropout.seed, site) if DROPOUT else 0
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if SIDE > 0:
        for step in range(low, high):
            acc, peak, total = _step(
                acc, peak, total, q_tile, k_ptr, v_ptr, k.row, v.row, first,
                position(blocks, step, SIDE, BLOCK_N), length, scale, blocks, step,
                key, sequence, head, dropout.threshold,
                D, BLOCK_D, BLOCK_M, BLOCK_N, ALIGN, DIRECTION, DROPOUT, "cells", SIDE,
            )  # fmt: skip
        low, high = segment(blocks, sequence, first, length, FULL, SIDE, BLOCK_N)
        for step in range(low, high):
            acc, peak, total = _step(
                acc, peak, total, q_tile, k_ptr, v_ptr, k.row, v.row, first,
                position(blocks, step, SIDE, BLOCK_N), length, scale, blocks, step,
                key, sequence, head, dropout.threshold,
                D, BLOCK_D, BLOCK_M, BLOCK_N, ALIGN, DIRECTION, DROPOUT, "edges", SIDE,
            )  # fmt: skip
    else:
        low, full_low, full_high, high = key_ranges(first, length, BLOCK_M, BLOCK_N, DIRECTION)
        if DIRECTION == "anti_causal":
            for first_n in range(low, full_low, BLOCK_N):
                acc, peak, total = _step(
                    acc, peak, total, q_tile, k_ptr, v_ptr, k.row, v.row, first,
                    tl.multiple_of(first_n, BLOCK_N), length, scale, blocks, 0,
                    key, sequence, head, dropout.threshold,
                    D, BLOCK_D, BLOCK_M, BLOCK_N, ALIGN, DIRECTION, DROPOUT, "edges", SIDE,
                )  # fmt: skip
        for first_n in range(full_low, full_high, BLOCK_N):
            acc, peak, total = _step(
                acc, peak, total, q_tile, k_ptr, v_ptr, k.row, v.row, first,
                tl.multiple_of(first_n, BLOCK_N), length, scale, blocks, 0,
                key, sequence, head, dropout.threshold,
                D, BLOCK_D, BLOCK_M, BLOCK_N, ALIGN, DIRECTION, DROPOUT, "none", SIDE,
            )  # fmt: skip
        for first_n in range(full_high, high, BLOCK_N):
            acc, peak, total = _step(
                acc, peak, total, q_tile, k_ptr, v_ptr, k.row, v.row, first,
                tl.multiple_of(first_n, BLOCK_N), length, scale, blocks, 0,
                key, sequence, head, dropout.threshold,
                D, BLOCK_D, BLOCK_M, BLOCK_N, ALIGN, DIRECTION, DROPOUT, "edges", SIDE,
            )  # fmt: skip
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    acc = acc * (dropout.scale / total)[:, None]
    out_ptr = head_of(out, task, head, ALIGN)
    store_tile(out_ptr, out.row, first, length, acc, D, BLOCK_M, BLOCK_D, ALIGN)
    lse_tile = tl.where(empty, float("-inf"), peak + tl.log2(total))
    at = rows_at(head_of(lse, task, head, 1), lse.row, first, BLOCK_M, 1)
    tl.store(at, lse_tile, mask=first + tl.arange(0, BLOCK_M) < length)


def forward(
    q, k, v, cu_seqlens, work, max_length, scale, direction, dropout_p, seed, site, block_mask,
):  # fmt: skip
    """(T, H, D) or (B, N, H, D) operands -> out, lse in base 2, and an rng state nobody reads."""
    q, k, v = (as_addressable(x) for x in (q, k, v))
    heads, width = q.shape[-2:]
    out, lse = fresh_like(q), statistics(q)
    rng = torch.empty(2, dtype=torch.int64, device=q.device)  # nobody reads it
    if q.numel() == 0 or max_length == 0:
        return out, lse, rng
    align = alignment(q, k, v, out)
    scores = configs.Scores.of(q, align, max_length, dropout_p, direction, block_mask)
    setting = configs.attention("forward", scores)
    _forward_kernel[grid(work, max_length, setting.block_m, heads)](
        *(Rows.of(x, align) for x in (q, k, v, out)), Rows.of(lse[..., None], 1),
        work, BlockList.by_query(block_mask), max_length, scale * LOG2_E,
        Dropout.of(dropout_p, seed), site,
        D=width, BLOCK_D=configs.head_block(width), ALIGN=align,
        DIRECTION=direction, DROPOUT=dropout_p > 0.0, SIDE=side_of(block_mask), **setting.launch(),
    )  # fmt: skip
    return out, lse, rng
