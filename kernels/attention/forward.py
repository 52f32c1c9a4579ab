"""O and lse of attention: one program per block of queries, online softmax over blocks of keys."""

import torch
import triton
import triton.language as tl

from tinybert_fast.kernels import configs
from tinybert_fast.kernels.attention.tiles import (
    LOG2_E,
    Dropout,
    Rows,
    grid,
    head_of,
    key_ranges,
    live_scores,
    load_tile,
    neighbours,
    place,
    store_tile,
)
from tinybert_fast.kernels.philox import attention_keep, site_key


@triton.jit
def _step(
    acc, peak, total, q, k_ptr, v_ptr, k_row, v_row, first_n, offs_m, length, scale,
    key, sequence, head, threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    DIRECTION: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One more block of keys: the sums so far are rescaled to the new largest score."""
    offs_n = tl.multiple_of(first_n, BLOCK_N) + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, k_row, offs_n, length, D, BLOCK_D)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
    if MASKED:
        live = live_scores(offs_m, offs_n, length, DIRECTION)
        scores = tl.where(live, scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, 1) * scale)
    base = new_peak
    if MASKED:  # a query without a key so far: -inf - -inf is NaN
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    p = tl.exp2(scores * scale - base[:, None])
    fade = tl.exp2(peak - base)
    total = total * fade + tl.sum(p, 1)
    if DROPOUT:
        p = tl.where(attention_keep(key, sequence, head, offs_m, offs_n, threshold), p, 0.0)
    v = load_tile(v_ptr, v_row, offs_n, length, D, BLOCK_D)
    acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, new_peak, total


@triton.jit(do_not_specialize=["max_length", "site"])
def _forward_kernel(
    q, k, v, out, lse_ptr, cu_seqlens_ptr, max_length, scale, dropout, site,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DIRECTION: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    sequence, first, start, length = place(cu_seqlens_ptr, max_length, BLOCK_M)
    head, heads = tl.program_id(1), tl.num_programs(1)
    if first >= length:
        return
    k_ptr, v_ptr = head_of(k, start, head), head_of(v, start, head)
    offs_m = first + tl.arange(0, BLOCK_M)
    q_tile = load_tile(head_of(q, start, head), q.row, offs_m, length, D, BLOCK_D)
    key = site_key(dropout.seed, site) if DROPOUT else 0
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    low, full_low, full_high, high = key_ranges(first, length, BLOCK_M, BLOCK_N, DIRECTION)
    for first_n in range(low, full_low, BLOCK_N):
        acc, peak, total = _step(
            acc, peak, total, q_tile, k_ptr, v_ptr, k.row, v.row, first_n, offs_m, length, scale,
            key, sequence, head, dropout.threshold, D, BLOCK_D, BLOCK_N, DIRECTION, DROPOUT, True,
        )  # fmt: skip
    for first_n in range(full_low, full_high, BLOCK_N):
        acc, peak, total = _step(
            acc, peak, total, q_tile, k_ptr, v_ptr, k.row, v.row, first_n, offs_m, length, scale,
            key, sequence, head, dropout.threshold, D, BLOCK_D, BLOCK_N, DIRECTION, DROPOUT, False,
        )  # fmt: skip
    for first_n in range(full_high, high, BLOCK_N):
        acc, peak, total = _step(
            acc, peak, total, q_tile, k_ptr, v_ptr, k.row, v.row, first_n, offs_m, length, scale,
            key, sequence, head, dropout.threshold, D, BLOCK_D, BLOCK_N, DIRECTION, DROPOUT, True,
        )  # fmt: skip
    empty = total == 0.0
    acc = acc * (dropout.scale / tl.where(empty, 1.0, total))[:, None]
    store_tile(head_of(out, start, head), out.row, offs_m, length, acc, D, BLOCK_D)
    lse = tl.where(empty, float("-inf"), peak + tl.log2(total))
    tl.store(lse_ptr + (start + offs_m) * heads + head, lse, mask=offs_m < length)


def forward(q, k, v, cu_seqlens, max_length, scale, direction, dropout_p, seed, site, block_mask):
    """(T, H, D) operands -> out (T, H, D), lse (T, H) in base 2, and an rng state nobody reads."""
    q, k, v = (neighbours(x) for x in (q, k, v))
    tokens, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    rng = torch.zeros(2, dtype=torch.int64, device=q.device)
    if tokens == 0:
        return out, lse, rng
    setting = configs.attention("forward", q.dtype, width)
    _forward_kernel[grid(cu_seqlens, max_length, setting.block_m, heads)](
        *map(Rows.of, (q, k, v, out)), lse, cu_seqlens, max_length, scale * LOG2_E,
        Dropout.of(dropout_p, seed), site,
        D=width, BLOCK_D=configs.head_block(width),
        BLOCK_M=setting.block_m, BLOCK_N=setting.block_n,
        DIRECTION=direction, DROPOUT=dropout_p > 0.0,
        num_warps=setting.num_warps, num_stages=setting.num_stages,
    )  # fmt: skip
    return out, lse, rng
