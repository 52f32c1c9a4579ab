"""Gradients of attention; every kernel recomputes the scores and adds to no other program's sums.

Where all scores of a head fit one tile (configs.py), one program finishes dQ, dK and dV: 5
products and one exponential a score, delta = rowsum(P * dP * M) from registers. It may walk several
heads, which changes no bit: operands of the next but one are copied to shared memory, at 3 stages,
while a head is computed (at 2 Triton waits for what it has just asked for). Longer sequences and
block masks take two kernels, one over blocks of queries for dQ and delta, one over blocks of
keys for dK and dV: 7 products and two exponentials.

What others found of the same gradient, ``more``, is added in fp32 to a tile before it is stored.
"""

import torch
import triton
import triton.language as tl

from tinybert_fast.kernels import configs
from tinybert_fast.kernels.attention.tiles import (
    FULL,
    LOG2_E,
    NO_ROWS,
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
    task_of,
)
from tinybert_fast.kernels.philox import Dropout, attention_keep, site_key


@triton.jit
def _load_lse(ptr, row, first, length, BLOCK: tl.constexpr):
    """+inf where P is zero: beyond the sequence, and for queries without a key."""
    live = first + tl.arange(0, BLOCK) < length
    lse = tl.load(rows_at(ptr, row, first, BLOCK, 1), mask=live, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def _plus(
    tile, more, task, head, first, length, D: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """``tile`` and the same rows of ``more: Rows``, if there is any."""
    if more.ptr is not None:
        ptr = head_of(more, task, head, ALIGN)
        tile += load_tile(ptr, more.row, first, length, D, BLOCK, BLOCK_D, ALIGN).to(tl.float32)
    return tile


@triton.jit
def _probabilities(
    q, k, v, grad, lse, first_m, first_n, length, scale, blocks, entry,
    key, sequence, head, dropout,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DIRECTION: tl.constexpr, DROPOUT: tl.constexpr, MASK: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    """P, P * M / keep scale and dP * M of a tile, each (BLOCK_M, BLOCK_N)."""
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None])
    if MASK != "none":
        live = live_scores(first_m, first_n, length, BLOCK_M, BLOCK_N, DIRECTION)
        if MASK == "cells":
            live = live & allowed_cells(blocks, entry, first_m, first_n, BLOCK_M, BLOCK_N, SIDE)
        p = tl.where(live, p, 0.0)
    dp = tl.dot(grad, tl.trans(v), input_precision="ieee")
    kept = p
    if DROPOUT:
        keep = attention_keep(
            key, sequence, head, first_m, first_n, dropout.threshold, BLOCK_M, BLOCK_N
        )
        kept = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * dropout.scale, 0.0)
    return p, kept, dp


@triton.jit(do_not_specialize=["site"])
def _one_tile_kernel(
    q, k, v, grad, dq, dk, dv, more_q, more_k, more_v, lse, work, scale, factor, dropout, site,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, D_MORE: tl.constexpr, ALIGN_MORE: tl.constexpr,
    DIRECTION: tl.constexpr, DROPOUT: tl.constexpr, HEADS_EACH: tl.constexpr,
):  # fmt: skip
    task = task_of(work, tl.program_id(0))
    sequence, length, first = tl.load(task), tl.load(task + 1), tl.program_id(1) * HEADS_EACH
    if length == 0:
        return
    # Not in the loop: what is fetched ahead would wait for the task.
    q_ptr = head_of(q, task, first, ALIGN)
    k_ptr = head_of(k, task, first, ALIGN)
    v_ptr = head_of(v, task, first, ALIGN)
    grad_ptr = head_of(grad, task, first, ALIGN)
    lse_ptr = head_of(lse, task, first, 1)
    key = site_key(dropout.seed, site) if DROPOUT else 0
    # Addresses and masks kept from one head to the next would cost more registers than there are.
    for step in tl.range(HEADS_EACH, disable_licm=True):
        head = first + step
        q_tile = load_tile(q_ptr, q.row, 0, length, D, BLOCK_M, BLOCK_D, ALIGN)
        k_tile = load_tile(k_ptr, k.row, 0, length, D, BLOCK_N, BLOCK_D, ALIGN)
        v_tile = load_tile(v_ptr, v.row, 0, length, D, BLOCK_N, BLOCK_D, ALIGN)
        do = load_tile(grad_ptr, grad.row, 0, length, D, BLOCK_M, BLOCK_D, ALIGN)
        lse_tile = _load_lse(lse_ptr, lse.row, 0, length, BLOCK_M)
        q_ptr += q.head * ALIGN
        k_ptr += k.head * ALIGN
        v_ptr += v.head * ALIGN
        grad_ptr += grad.head * ALIGN
        lse_ptr += lse.head
        p = tl.exp2(
            tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale - lse_tile[:, None]
        )
        if DIRECTION == "both" and HEADS_EACH > 1:  # a dead query's lse has made P zero
            live = (tl.arange(0, BLOCK_N) < length)[None, :]  # in fewer registers than below
        else:
            live = live_scores(0, 0, length, BLOCK_M, BLOCK_N, DIRECTION)
        p = tl.where(live, p, 0.0)
        if DROPOUT:  # the mask is P's sign from here on, which costs no register
            keep = attention_keep(key, sequence, head, 0, 0, dropout.threshold, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p, -p)
        kept = tl.maximum(p, 0.0, propagate_nan=tl.PropagateNan.ALL) if DROPOUT else p
        dv_tile = tl.dot(tl.trans(kept.to(do.dtype)), do, input_precision="ieee") * dropout.scale
        dv_tile = _plus(
            dv_tile, more_v, task, head, 0, length, D_MORE, BLOCK_N, BLOCK_D, ALIGN_MORE
        )
        dv_ptr = head_of(dv, task, head, ALIGN)
        store_tile(dv_ptr, dv.row, 0, length, dv_tile, D, BLOCK_N, BLOCK_D, ALIGN)
        dp = tl.dot(do, tl.trans(v_tile), input_precision="ieee")
        if DROPOUT:
            dp = tl.where(p > 0.0, dp * dropout.scale, 0.0)
            p = tl.abs(p)
        ds = (p * (dp - tl.sum(p * dp, 1)[:, None])).to(do.dtype)
        dk_tile = tl.dot(tl.trans(ds), q_tile, input_precision="ieee") * factor
        dk_tile = _plus(
            dk_tile, more_k, task, head, 0, length, D_MORE, BLOCK_N, BLOCK_D, ALIGN_MORE
        )
        dk_ptr = head_of(dk, task, head, ALIGN)
        store_tile(dk_ptr, dk.row, 0, length, dk_tile, D, BLOCK_N, BLOCK_D, ALIGN)
        dq_tile = tl.dot(ds, k_tile, input_precision="ieee") * factor
        dq_tile = _plus(
            dq_tile, more_q, task, head, 0, length, D_MORE, BLOCK_M, BLOCK_D, ALIGN_MORE
        )
        dq_ptr = head_of(dq, task, head, ALIGN)
        store_tile(dq_ptr, dq.row, 0, length, dq_tile, D, BLOCK_M, BLOCK_D, ALIGN)


@triton.jit
def _add_dq(
    acc, q, k_ptr, v_ptr, k_row, v_row, do, lse, delta, first_m, first_n, length, scale,
    blocks, step, key, sequence, head, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, DIRECTION: tl.constexpr, DROPOUT: tl.constexpr, MASK: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    """dQ / scale with one more block of keys."""
    k = load_tile(k_ptr, k_row, first_n, length, D, BLOCK_N, BLOCK_D, ALIGN)
    v = load_tile(v_ptr, v_row, first_n, length, D, BLOCK_N, BLOCK_D, ALIGN)
    entry = entry_of(step, SIDE, BLOCK_N) if MASK == "cells" else 0
    p, _, dp = _probabilities(
        q, k, v, do, lse, first_m, first_n, length, scale, blocks, entry,
        key, sequence, head, dropout, BLOCK_M, BLOCK_N, DIRECTION, DROPOUT, MASK, SIDE,
    )  # fmt: skip
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["max_length", "site"])
def _dq_kernel(
    q, k, v, grad, out, dq, more, lse, delta, work, blocks, max_length, scale, factor, dropout,
    site,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, D_MORE: tl.constexpr, ALIGN_MORE: tl.constexpr,
    DIRECTION: tl.constexpr, DROPOUT: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    task, first = place(work, max_length, BLOCK_M)
    sequence, length, head = tl.load(task), tl.load(task + 1), tl.program_id(1)
    if first >= length:
        return
    if SIDE > 0:
        low, high = segment(blocks, sequence, first, length, PARTIAL, SIDE, BLOCK_N)
        full_low, full_high = segment(blocks, sequence, first, length, FULL, SIDE, BLOCK_N)
    k_ptr = head_of(k, task, head, ALIGN)
    v_ptr = head_of(v, task, head, ALIGN)
    q_ptr = head_of(q, task, head, ALIGN)
    grad_ptr = head_of(grad, task, head, ALIGN)
    out_ptr = head_of(out, task, head, ALIGN)
    q_tile = load_tile(q_ptr, q.row, first, length, D, BLOCK_M, BLOCK_D, ALIGN)
    do = load_tile(grad_ptr, grad.row, first, length, D, BLOCK_M, BLOCK_D, ALIGN)
    o = load_tile(out_ptr, out.row, first, length, D, BLOCK_M, BLOCK_D, ALIGN)
    delta_tile = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    at = rows_at(head_of(delta, task, head, 1), delta.row, first, BLOCK_M, 1)
    tl.store(at, delta_tile, mask=first + tl.arange(0, BLOCK_M) < length)
    lse_ptr = head_of(lse, task, head, 1)
    lse_tile = _load_lse(lse_ptr, lse.row, first, length, BLOCK_M)
    key = site_key(dropout.seed, site) if DROPOUT else 0
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if SIDE > 0:
        for step in range(low, high):
            acc = _add_dq(
                acc, q_tile, k_ptr, v_ptr, k.row, v.row, do, lse_tile, delta_tile, first,
                position(blocks, step, SIDE, BLOCK_N), length, scale, blocks, step,
                key, sequence, head, dropout,
                D, BLOCK_D, BLOCK_M, BLOCK_N, ALIGN, DIRECTION, DROPOUT, "cells", SIDE,
            )  # fmt: skip
        for step in range(full_low, full_high):
            acc = _add_dq(
                acc, q_tile, k_ptr, v_ptr, k.row, v.row, do, lse_tile, delta_tile, first,
                position(blocks, step, SIDE, BLOCK_N), length, scale, blocks, step,
                key, sequence, head, dropout,
                D, BLOCK_D, BLOCK_M, BLOCK_N, ALIGN, DIRECTION, DROPOUT, "edges", SIDE,
            )  # fmt: skip
    else:
        low, full_low, full_high, high = key_ranges(first, length, BLOCK_M, BLOCK_N, DIRECTION)
        if DIRECTION == "anti_causal":
            for first_n in range(low, full_low, BLOCK_N):
                acc = _add_dq(
                    acc, q_tile, k_ptr, v_ptr, k.row, v.row, do, lse_tile, delta_tile, first,
                    tl.multiple_of(first_n, BLOCK_N), length, scale, blocks, 0,
                    key, sequence, head, dropout,
                    D, BLOCK_D, BLOCK_M, BLOCK_N, ALIGN, DIRECTION, DROPOUT, "edges", SIDE,
                )  # fmt: skip
        for first_n in range(full_low, full_high, BLOCK_N):
            acc = _add_dq(
                acc, q_tile, k_ptr, v_ptr, k.row, v.row, do, lse_tile, delta_tile, first,
                tl.multiple_of(first_n, BLOCK_N), length, scale, blocks, 0,
                key, sequence, head, dropout,
                D, BLOCK_D, BLOCK_M, BLOCK_N, ALIGN, DIRECTION, DROPOUT, "none", SIDE,
            )  # fmt: skip
        for first_n in range(full_high, high, BLOCK_N):
            acc = _add_dq(
                acc, q_tile, k_ptr, v_ptr, k.row, v.row, do, lse_tile, delta_tile, first,
                tl.multiple_of(first_n, BLOCK_N), length, scale, blocks, 0,
                key, sequence, head, dropout,
                D, BLOCK_D, BLOCK_M, BLOCK_N, ALIGN, DIRECTION, DROPOUT, "edges", SIDE,
            )  # fmt: skip
    acc = _plus(acc * factor, more, task, head, first, length, D_MORE, BLOCK_M, BLOCK_D, ALIGN_MORE)
    dq_ptr = head_of(dq, task, head, ALIGN)
    store_tile(dq_ptr, dq.row, first, length, acc, D, BLOCK_M, BLOCK_D, ALIGN)


@triton.jit
def _add_dkdv(
    dk, dv, k, v, q_ptr, grad_ptr, q_row, grad_row, lse_ptr, delta_ptr, stat_row,
    first_m, first_n, length, scale, blocks, step, key, sequence, head, dropout,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, DIRECTION: tl.constexpr, DROPOUT: tl.constexpr, MASK: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    """dK / scale and dV / keep scale with one more block of queries."""
    q = load_tile(q_ptr, q_row, first_m, length, D, BLOCK_M, BLOCK_D, ALIGN)
    do = load_tile(grad_ptr, grad_row, first_m, length, D, BLOCK_M, BLOCK_D, ALIGN)
    live = first_m + tl.arange(0, BLOCK_M) < length
    lse = _load_lse(lse_ptr, stat_row, first_m, length, BLOCK_M)
    delta = tl.load(rows_at(delta_ptr, stat_row, first_m, BLOCK_M, 1), mask=live, other=0.0)
    entry = entry_of(step, SIDE, BLOCK_M) if MASK == "cells" else 0
    # Scores stay (queries, keys): transposed, a thread would draw 4 times as many numbers.
    p, kept, dp = _probabilities(
        q, k, v, do, lse, first_m, first_n, length, scale, blocks, entry,
        key, sequence, head, dropout, BLOCK_M, BLOCK_N, DIRECTION, DROPOUT, MASK, SIDE,
    )  # fmt: skip
    ds = p * (dp - delta[:, None])
    dv = tl.dot(tl.trans(kept.to(do.dtype)), do, dv, input_precision="ieee")
    dk = tl.dot(tl.trans(ds.to(do.dtype)), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["max_length", "site"])
def _dkdv_kernel(
    q, k, v, grad, dk, dv, more_k, more_v, lse, delta, work, blocks, max_length, scale, factor,
    dropout, site,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    ALIGN: tl.constexpr, D_MORE: tl.constexpr, ALIGN_MORE: tl.constexpr,
    DIRECTION: tl.constexpr, DROPOUT: tl.constexpr, SIDE: tl.constexpr,
):  # fmt: skip
    task, first = place(work, max_length, BLOCK_N)
    sequence, length, head = tl.load(task), tl.load(task + 1), tl.program_id(1)
    if first >= length:
        return
    if SIDE > 0:
        low, high = segment(blocks, sequence, first, length, PARTIAL, SIDE, BLOCK_M)
        full_low, full_high = segment(blocks, sequence, first, length, FULL, SIDE, BLOCK_M)
    q_ptr = head_of(q, task, head, ALIGN)
    grad_ptr = head_of(grad, task, head, ALIGN)
    lse_ptr = head_of(lse, task, head, 1)
    delta_ptr = head_of(delta, task, head, 1)
    k_ptr = head_of(k, task, head, ALIGN)
    v_ptr = head_of(v, task, head, ALIGN)
    k_tile = load_tile(k_ptr, k.row, first, length, D, BLOCK_N, BLOCK_D, ALIGN)
    v_tile = load_tile(v_ptr, v.row, first, length, D, BLOCK_N, BLOCK_D, ALIGN)
    key = site_key(dropout.seed, site) if DROPOUT else 0
    dk_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv_tile = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if SIDE > 0:
        for step in range(low, high):
            dk_tile, dv_tile = _add_dkdv(
                dk_tile, dv_tile, k_tile, v_tile, q_ptr, grad_ptr, q.row, grad.row,
                lse_ptr, delta_ptr, lse.row, position(blocks, step, SIDE, BLOCK_M), first,
                length, scale, blocks, step, key, sequence, head, dropout,
                D, BLOCK_D, BLOCK_M, BLOCK_N, ALIGN, DIRECTION, DROPOUT, "cells", SIDE,
            )  # fmt: skip
        low, high = full_low, full_high
    else:
        low, high = 0, tl.cdiv(length, BLOCK_M)
        if DIRECTION == "causal":
            low = first // BLOCK_M
        elif DIRECTION == "anti_causal":
            high = tl.cdiv(tl.minimum(first + BLOCK_N, length), BLOCK_M)
    # No mask for lengths: a dead query's lse makes P zero, a dead key's row is not stored.
    for step in range(low, high):
        first_m = position(blocks, step, SIDE, BLOCK_M) if SIDE > 0 else step * BLOCK_M
        dk_tile, dv_tile = _add_dkdv(
            dk_tile, dv_tile, k_tile, v_tile, q_ptr, grad_ptr, q.row, grad.row,
            lse_ptr, delta_ptr, lse.row, first_m, first,
            length, scale, blocks, step, key, sequence, head, dropout,
            D, BLOCK_D, BLOCK_M, BLOCK_N, ALIGN, DIRECTION, DROPOUT,
            "none" if DIRECTION == "both" else "edges", SIDE,
        )  # fmt: skip
    dk_ptr = head_of(dk, task, head, ALIGN)
    dv_ptr = head_of(dv, task, head, ALIGN)
    dk_tile = _plus(
        dk_tile * factor, more_k, task, head, first, length, D_MORE, BLOCK_N, BLOCK_D, ALIGN_MORE
    )
    store_tile(dk_ptr, dk.row, first, length, dk_tile, D, BLOCK_N, BLOCK_D, ALIGN)
    dv_tile = _plus(
        dv_tile * dropout.scale, more_v, task, head, first, length, D_MORE, BLOCK_N, BLOCK_D,
        ALIGN_MORE,
    )  # fmt: skip
    store_tile(dv_ptr, dv.row, first, length, dv_tile, D, BLOCK_N, BLOCK_D, ALIGN)


def backward(grad, q, k, v, *rest):
    """Gradients of q, k and v, (T, H, D) or (B, N, H, D)."""
    gradients = tuple(fresh_like(x) for x in (q, k, v))
    _run(gradients, (None, None, None), grad, q, k, v, *rest)
    return gradients


def backward_of_stack(grad, stack, dq, dk, dv, *rest):
    """The gradient of q, k and v in one tensor, (T, 3, H, D), together with what others found of
    it: dq, dk, dv (T, H, up to D) or None."""
    gradient = torch.empty_like(stack)
    _run(gradient.unbind(1), (dq, dk, dv), grad, *stack.unbind(1), *rest)
    return gradient


def _run(
    gradients, more, grad, q, k, v, out, lse, rng, cu_seqlens, work, max_length, scale, direction,
    dropout_p, seed, site, block_mask,
):  # fmt: skip
    """Fills ``gradients``; ``more``: what is added to each, or None."""
    grad, q, k, v = (as_addressable(x) for x in (grad, q, k, v))
    heads, width = q.shape[-2:]
    if q.numel() == 0 or max_length == 0:
        return
    align = alignment(grad, q, k, v, out, *gradients)
    q_, k_, v_, grad_, out_, dq_, dk_, dv_ = (
        Rows.of(x, align) for x in (q, k, v, grad, out, *gradients)
    )
    more = [x if x is None else as_addressable(x) for x in more]
    some = [x for x in more if x is not None]
    align_more = alignment(*some)
    more_q, more_k, more_v = (NO_ROWS if x is None else Rows.of(x, align_more) for x in more)
    lse_ = Rows.of(lse[..., None], 1)
    call = (max_length, scale * LOG2_E, scale, Dropout.of(dropout_p, seed), site)
    same = {
        "D": width,
        "BLOCK_D": configs.head_block(width),
        "ALIGN": align,
        "D_MORE": some[0].shape[-1] if some else 0,
        "ALIGN_MORE": align_more,
        "DIRECTION": direction,
        "DROPOUT": dropout_p > 0.0,
    }
    scores = configs.Scores.of(q, align, max_length, dropout_p, direction, block_mask)
    setting = configs.attention_if_served("one_tile", scores)
    if setting is not None and not block_mask:
        setting = configs.filling(setting, len(work), heads, q.device)
        _one_tile_kernel[len(work), heads // setting.heads_each](
            q_, k_, v_, grad_, dq_, dk_, dv_, more_q, more_k, more_v, lse_, work, *call[1:],
            HEADS_EACH=setting.heads_each, **same, **setting.launch(),
        )  # fmt: skip
        return
    delta = statistics(q)
    delta_ = Rows.of(delta[..., None], 1)
    setting = configs.attention("dq", scores)
    _dq_kernel[grid(work, max_length, setting.block_m, heads)](
        q_, k_, v_, grad_, out_, dq_, more_q, lse_, delta_, work, BlockList.by_query(block_mask),
        *call, SIDE=side_of(block_mask), **same, **setting.launch(),
    )  # fmt: skip
    setting = configs.attention("dkdv", scores)
    _dkdv_kernel[grid(work, max_length, setting.block_n, heads)](
        q_, k_, v_, grad_, dk_, dv_, more_k, more_v, lse_, delta_, work,
        BlockList.by_key(block_mask), *call, SIDE=side_of(block_mask), **same, **setting.launch(),
    )  # fmt: skip
