"""Gradients of attention: one kernel over blocks of queries for dQ and delta, one over blocks of
keys for dK and dV. Each recomputes the scores; neither adds to what another program wrote.
"""

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
def _load_lse(at, live):
    """+inf where P is zero: beyond the sequence, and for queries without a key."""
    lse = tl.load(at, mask=live, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _step(
    q, k, v, grad, lse, delta, offs_m, offs_n, length, scale,
    key, sequence, head, dropout,
    DIRECTION: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """P * M / keep scale, and dS, of a tile (BLOCK_M, BLOCK_N)."""
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
    if MASKED:
        p = tl.where(live_scores(offs_m, offs_n, length, DIRECTION), p, 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
    kept = p
    if DROPOUT:
        keep = attention_keep(key, sequence, head, offs_m, offs_n, dropout.threshold)
        kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * dropout.scale, 0.0)
    return kept, p * (dp - delta[:, None])


@triton.jit(do_not_specialize=["max_length", "site"])
def _dq_kernel(
    q, k, v, grad, out, dq, lse_ptr, delta_ptr, cu_seqlens_ptr, max_length, scale, factor, dropout,
    site,
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
    do = load_tile(head_of(grad, start, head), grad.row, offs_m, length, D, BLOCK_D)
    o = load_tile(head_of(out, start, head), out.row, offs_m, length, D, BLOCK_D)
    at = (start + offs_m) * heads + head
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + at, delta, mask=offs_m < length)
    lse = _load_lse(lse_ptr + at, offs_m < length)
    key = site_key(dropout.seed, site) if DROPOUT else 0
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    low, full_low, full_high, high = key_ranges(first, length, BLOCK_M, BLOCK_N, DIRECTION)
    for first_n in range(low, full_low, BLOCK_N):
        acc = _add_dq(
            acc, q_tile, k_ptr, v_ptr, k.row, v.row, do, lse, delta, first_n, offs_m, length, scale,
            key, sequence, head, dropout, D, BLOCK_D, BLOCK_N, DIRECTION, DROPOUT, True,
        )  # fmt: skip
    for first_n in range(full_low, full_high, BLOCK_N):
        acc = _add_dq(
            acc, q_tile, k_ptr, v_ptr, k.row, v.row, do, lse, delta, first_n, offs_m, length, scale,
            key, sequence, head, dropout, D, BLOCK_D, BLOCK_N, DIRECTION, DROPOUT, False,
        )  # fmt: skip
    for first_n in range(full_high, high, BLOCK_N):
        acc = _add_dq(
            acc, q_tile, k_ptr, v_ptr, k.row, v.row, do, lse, delta, first_n, offs_m, length, scale,
            key, sequence, head, dropout, D, BLOCK_D, BLOCK_N, DIRECTION, DROPOUT, True,
        )  # fmt: skip
    store_tile(head_of(dq, start, head), dq.row, offs_m, length, acc * factor, D, BLOCK_D)


@triton.jit
def _add_dq(
    acc, q, k_ptr, v_ptr, k_row, v_row, do, lse, delta, first_n, offs_m, length, scale,
    key, sequence, head, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    DIRECTION: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dQ / scale with one more block of keys."""
    offs_n = tl.multiple_of(first_n, BLOCK_N) + tl.arange(0, BLOCK_N)
    k = load_tile(k_ptr, k_row, offs_n, length, D, BLOCK_D)
    v = load_tile(v_ptr, v_row, offs_n, length, D, BLOCK_D)
    _, ds = _step(
        q, k, v, do, lse, delta, offs_m, offs_n, length, scale, key, sequence, head, dropout,
        DIRECTION, DROPOUT, MASKED,
    )  # fmt: skip
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["max_length", "site"])
def _dkdv_kernel(
    q, k, v, grad, dk, dv, lse_ptr, delta_ptr, cu_seqlens_ptr, max_length, scale, factor, dropout,
    site,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DIRECTION: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    sequence, first, start, length = place(cu_seqlens_ptr, max_length, BLOCK_N)
    head, heads = tl.program_id(1), tl.num_programs(1)
    if first >= length:
        return
    q_ptr, grad_ptr = head_of(q, start, head), head_of(grad, start, head)
    lse_ptr += start * heads + head
    delta_ptr += start * heads + head
    offs_n = first + tl.arange(0, BLOCK_N)
    k_tile = load_tile(head_of(k, start, head), k.row, offs_n, length, D, BLOCK_D)
    v_tile = load_tile(head_of(v, start, head), v.row, offs_n, length, D, BLOCK_D)
    key = site_key(dropout.seed, site) if DROPOUT else 0
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    low, high = 0, length
    if DIRECTION == "causal":
        low = first // BLOCK_M * BLOCK_M
    elif DIRECTION == "anti_causal":
        high = tl.minimum(first + BLOCK_N, length)
    for first_m in range(low, high, BLOCK_M):
        offs_m = tl.multiple_of(first_m, BLOCK_M) + tl.arange(0, BLOCK_M)
        live = offs_m < length
        q_tile = load_tile(q_ptr, q.row, offs_m, length, D, BLOCK_D)
        do = load_tile(grad_ptr, grad.row, offs_m, length, D, BLOCK_D)
        lse = _load_lse(lse_ptr + offs_m * heads, live)
        delta = tl.load(delta_ptr + offs_m * heads, mask=live, other=0.0)
        # No mask for lengths: a dead query's lse makes P zero, a dead key's row is not stored.
        # Scores stay (queries, keys): transposed, a thread would draw 4 times as many numbers.
        kept, ds = _step(
            q_tile, k_tile, v_tile, do, lse, delta, offs_m, offs_n, length, scale,
            key, sequence, head, dropout, DIRECTION, DROPOUT, DIRECTION != "both",
        )  # fmt: skip
        dv_tile = tl.dot(tl.trans(kept.to(do.dtype)), do, dv_tile, input_precision="ieee")
        dk_tile = tl.dot(tl.trans(ds.to(do.dtype)), q_tile, dk_tile, input_precision="ieee")
    store_tile(head_of(dk, start, head), dk.row, offs_n, length, dk_tile * factor, D, BLOCK_D)
    dv_tile = dv_tile * dropout.scale
    store_tile(head_of(dv, start, head), dv.row, offs_n, length, dv_tile, D, BLOCK_D)


def backward(
    grad, q, k, v, out, lse, rng, cu_seqlens, max_length, scale, direction, dropout_p, seed, site,
    block_mask,
):  # fmt: skip
    """Gradients of q, k and v (T, H, D)."""
    grad, q, k, v = (neighbours(x) for x in (grad, q, k, v))
    tokens, heads, width = q.shape
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    if tokens == 0:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    dropout = Dropout.of(dropout_p, seed)
    same = {
        "D": width,
        "BLOCK_D": configs.head_block(width),
        "DIRECTION": direction,
        "DROPOUT": dropout_p > 0.0,
    }
    call = (cu_seqlens, max_length, scale * LOG2_E, scale, dropout, site)
    setting = configs.attention("dq", q.dtype, width)
    _dq_kernel[grid(cu_seqlens, max_length, setting.block_m, heads)](
        *map(Rows.of, (q, k, v, grad, out, dq)), lse, delta, *call,
        BLOCK_M=setting.block_m, BLOCK_N=setting.block_n,
        num_warps=setting.num_warps, num_stages=setting.num_stages, **same,
    )  # fmt: skip
    setting = configs.attention("dkdv", q.dtype, width)
    _dkdv_kernel[grid(cu_seqlens, max_length, setting.block_n, heads)](
        *map(Rows.of, (q, k, v, grad, dk, dv)), lse, delta, *call,
        BLOCK_M=setting.block_m, BLOCK_N=setting.block_n,
        num_warps=setting.num_warps, num_stages=setting.num_stages, **same,
    )  # fmt: skip
    return dq, dk, dv
