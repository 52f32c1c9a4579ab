"""w * sum KL(Q || P) over the rows of each relation, and its gradients of A and B: MiniLM's loss
(Wang et al. 2020, arXiv:2002.10957, equation 5; 2021, arXiv:2012.15828, equation 6).

    S = A B^T / sqrt(D),  T = C D^T / sqrt(Dt),  P = softmax(S) = exp(S - s),  Q = exp(T - t)
    KL = sum Q log(Q / P),   E = P - Q,   dA = w E B / sqrt(D),   dB = w E^T A / sqrt(D)

Where all scores of a head fit one tile, one kernel makes loss, dA and dB. Longer sequences take one
over blocks of rows for s, t and the loss, then one over blocks of rows for dA, and the same with
the operands exchanged for dB. Of a relation of A with itself dA = w (E + E^T) A / sqrt(D), and S is
symmetric, so E^T is P and Q by the statistics of columns and one kernel less is needed.

Shapes: a, b, da, db (T, R, D); c, d (T, R, Dt); s, t (T, R), base 2; work int32 (B, 4), as in
ops/layout.py. Products of the operands, in the dtype of a, with fp32 sums (fp32 operands: IEEE
products), softmax in fp32. E enters its product in that dtype, 2^SHIFT times larger, so that what
fp16 would flush to zero is a normal number. The gradients stay in fp32, since a mean's are below
what fp16 holds. Scores count from the largest of their row: s and t are large beside a small KL.
Rows beyond a sequence are zero in all operands, so their P and Q are equal, add nothing to the loss
and meet zeros.
"""

import math

import torch
import triton
import triton.language as tl

from tinybert_fast.kernels import configs
from tinybert_fast.kernels.attention.tiles import (
    LOG2_E,
    Rows,
    alignment,
    as_addressable,
    grid,
    head_of,
    load_tile,
    place,
    rows_at,
    statistics,
    store_tile,
    task_of,
)

LN_2 = math.log(2.0)
SHIFT = tl.constexpr(14)  # |E + E^T| <= 2 becomes 2^15 at most; fp16 ends below 2^16
LARGER = tl.constexpr(2.0**SHIFT.value)
LOWEST = tl.constexpr(-1e30)  # of no score; finite, since it is subtracted from itself


@triton.jit
def _scores(x, y, scale):
    return tl.dot(x, tl.trans(y), input_precision="ieee") * scale


@triton.jit
def _load(ptr, row, first, length, BLOCK: tl.constexpr):
    """A statistic, less SHIFT; +inf beyond the sequence, where P and Q are zero."""
    live = first + tl.arange(0, BLOCK) < length
    return tl.load(rows_at(ptr, row, first, BLOCK, 1), mask=live, other=float("inf")) - SHIFT


@triton.jit
def _store(ptr, row, first, length, tile, BLOCK: tl.constexpr):
    live = first + tl.arange(0, BLOCK) < length
    tl.store(rows_at(ptr, row, first, BLOCK, 1), tile, mask=live)


@triton.jit
def _one_tile_kernel(
    a, b, c, d, da, db, work, loss_ptr, weight, scale, scale_teacher, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DT: tl.constexpr, BLOCK_DT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, ALIGN_T: tl.constexpr,
    SELF: tl.constexpr,
):  # fmt: skip
    task, head = task_of(work, tl.program_id(0)), tl.program_id(1)
    length = tl.load(task + 1)
    loss_ptr += tl.program_id(0) * tl.num_programs(1) + head
    if length == 0:
        tl.store(loss_ptr, 0.0)
        return
    a_ptr = head_of(a, task, head, ALIGN)
    c_ptr = head_of(c, task, head, ALIGN_T)
    a_tile = load_tile(a_ptr, a.row, 0, length, D, BLOCK_M, BLOCK_D, ALIGN)
    c_tile = load_tile(c_ptr, c.row, 0, length, DT, BLOCK_M, BLOCK_DT, ALIGN_T)
    b_tile, d_tile = a_tile, c_tile
    if not SELF:
        b_ptr = head_of(b, task, head, ALIGN)
        d_ptr = head_of(d, task, head, ALIGN_T)
        b_tile = load_tile(b_ptr, b.row, 0, length, D, BLOCK_N, BLOCK_D, ALIGN)
        d_tile = load_tile(d_ptr, d.row, 0, length, DT, BLOCK_N, BLOCK_DT, ALIGN_T)
    live = (tl.arange(0, BLOCK_N) < length)[None, :]
    s = _scores(a_tile, b_tile, scale)
    t = _scores(c_tile, d_tile, scale_teacher)
    s -= tl.max(tl.where(live, s, float("-inf")), 1)[:, None]
    t -= tl.max(tl.where(live, t, float("-inf")), 1)[:, None]
    p, q = tl.where(live, tl.exp2(s), 0.0), tl.where(live, tl.exp2(t), 0.0)
    p_total, q_total = tl.sum(p, 1), tl.sum(q, 1)
    kl = tl.sum(q * (t - s), 1) / q_total + tl.log2(p_total) - tl.log2(q_total)
    tl.store(loss_ptr, tl.sum(kl) * weight)
    p, q = p * (1.0 / p_total)[:, None], q * (1.0 / q_total)[:, None]
    error = ((p - q) * LARGER).to(a_tile.dtype)
    grad = tl.dot(error, b_tile, input_precision="ieee")
    other = tl.dot(tl.trans(error), a_tile, input_precision="ieee")
    da_ptr = head_of(da, task, head, 1)
    if SELF:
        grad += other
    else:
        db_ptr = head_of(db, task, head, 1)
        store_tile(db_ptr, db.row, 0, length, other * factor, D, BLOCK_N, BLOCK_D, 1)
    store_tile(da_ptr, da.row, 0, length, grad * factor, D, BLOCK_M, BLOCK_D, 1)


@triton.jit
def _step(
    s_peak, s_total, t_peak, t_total, gain, a_tile, c_tile, b_ptr, d_ptr, b_row, d_row, first,
    length, scale, scale_teacher,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DT: tl.constexpr, BLOCK_DT: tl.constexpr,
    BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, ALIGN_T: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """One more block of columns: the sums so far are rescaled to the new largest scores."""
    b_tile = load_tile(b_ptr, b_row, first, length, D, BLOCK_N, BLOCK_D, ALIGN)
    d_tile = load_tile(d_ptr, d_row, first, length, DT, BLOCK_N, BLOCK_DT, ALIGN_T)
    s = _scores(a_tile, b_tile, scale)
    t = _scores(c_tile, d_tile, scale_teacher)
    if EDGE:
        live = (first + tl.arange(0, BLOCK_N) < length)[None, :]
        s, t = tl.where(live, s, LOWEST), tl.where(live, t, LOWEST)
    s_new, t_new = tl.maximum(s_peak, tl.max(s, 1)), tl.maximum(t_peak, tl.max(t, 1))
    s, t = s - s_new[:, None], t - t_new[:, None]
    p, q = tl.exp2(s), tl.exp2(t)
    s_rise, t_rise = s_new - s_peak, t_new - t_peak
    fade = tl.exp2(-t_rise)
    gain = (gain + t_total * (s_rise - t_rise)) * fade + tl.sum(q * (t - s), 1)
    s_total = s_total * tl.exp2(-s_rise) + tl.sum(p, 1)
    t_total = t_total * fade + tl.sum(q, 1)
    return s_new, s_total, t_new, t_total, gain


@triton.jit(do_not_specialize=["max_length"])
def _statistics_kernel(
    a, b, c, d, s, t, work, loss_ptr, max_length, weight, scale, scale_teacher,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DT: tl.constexpr, BLOCK_DT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, ALIGN_T: tl.constexpr,
):  # fmt: skip
    task, first = place(work, max_length, BLOCK_M)
    length, head = tl.load(task + 1), tl.program_id(1)
    loss_ptr += tl.program_id(0) * tl.num_programs(1) + head
    if first >= length:
        tl.store(loss_ptr, 0.0)
        return
    a_ptr = head_of(a, task, head, ALIGN)
    b_ptr = head_of(b, task, head, ALIGN)
    c_ptr = head_of(c, task, head, ALIGN_T)
    d_ptr = head_of(d, task, head, ALIGN_T)
    a_tile = load_tile(a_ptr, a.row, first, length, D, BLOCK_M, BLOCK_D, ALIGN)
    c_tile = load_tile(c_ptr, c.row, first, length, DT, BLOCK_M, BLOCK_DT, ALIGN_T)
    s_peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    t_peak = tl.full((BLOCK_M,), LOWEST, tl.float32)
    s_total = tl.zeros((BLOCK_M,), tl.float32)
    t_total = tl.zeros((BLOCK_M,), tl.float32)
    gain = tl.zeros((BLOCK_M,), tl.float32)
    full = length // BLOCK_N * BLOCK_N
    for first_n in range(0, full, BLOCK_N):
        s_peak, s_total, t_peak, t_total, gain = _step(
            s_peak, s_total, t_peak, t_total, gain, a_tile, c_tile, b_ptr, d_ptr, b.row, d.row,
            tl.multiple_of(first_n, BLOCK_N), length, scale, scale_teacher,
            D, BLOCK_D, DT, BLOCK_DT, BLOCK_N, ALIGN, ALIGN_T, False,
        )  # fmt: skip
    if full < length:
        s_peak, s_total, t_peak, t_total, gain = _step(
            s_peak, s_total, t_peak, t_total, gain, a_tile, c_tile, b_ptr, d_ptr, b.row, d.row,
            full, length, scale, scale_teacher,
            D, BLOCK_D, DT, BLOCK_DT, BLOCK_N, ALIGN, ALIGN_T, True,
        )  # fmt: skip
    s_tile, t_tile = s_peak + tl.log2(s_total), t_peak + tl.log2(t_total)
    _store(head_of(s, task, head, 1), s.row, first, length, s_tile, BLOCK_M)
    _store(head_of(t, task, head, 1), t.row, first, length, t_tile, BLOCK_M)
    kl = gain / t_total + tl.log2(s_total) - tl.log2(t_total)
    tl.store(loss_ptr, tl.sum(kl) * weight)


@triton.jit(do_not_specialize=["max_length"])
def _gradient_kernel(
    a, b, c, d, s, t, da, work, max_length, scale, scale_teacher, factor,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DT: tl.constexpr, BLOCK_DT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, ALIGN_T: tl.constexpr,
    OF: tl.constexpr,
):  # fmt: skip
    """dA: the softmax is over columns ("rows" have statistics), over rows ("columns" have them), or
    both are added.
    """
    task, first = place(work, max_length, BLOCK_M)
    length, head = tl.load(task + 1), tl.program_id(1)
    if first >= length:
        return
    a_ptr = head_of(a, task, head, ALIGN)
    b_ptr = head_of(b, task, head, ALIGN)
    c_ptr = head_of(c, task, head, ALIGN_T)
    d_ptr = head_of(d, task, head, ALIGN_T)
    s_ptr, t_ptr = head_of(s, task, head, 1), head_of(t, task, head, 1)
    a_tile = load_tile(a_ptr, a.row, first, length, D, BLOCK_M, BLOCK_D, ALIGN)
    c_tile = load_tile(c_ptr, c.row, first, length, DT, BLOCK_M, BLOCK_DT, ALIGN_T)
    s_rows = _load(s_ptr, s.row, first, length, BLOCK_M)[:, None]
    t_rows = _load(t_ptr, t.row, first, length, BLOCK_M)[:, None]
    grad = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for first_n in range(0, length, BLOCK_N):
        b_tile = load_tile(b_ptr, b.row, first_n, length, D, BLOCK_N, BLOCK_D, ALIGN)
        d_tile = load_tile(d_ptr, d.row, first_n, length, DT, BLOCK_N, BLOCK_DT, ALIGN_T)
        s_tile = _scores(a_tile, b_tile, scale)
        t_tile = _scores(c_tile, d_tile, scale_teacher)
        error = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if OF != "columns":
            live = (first_n + tl.arange(0, BLOCK_N) < length)[None, :]
            error += tl.where(live, tl.exp2(s_tile - s_rows) - tl.exp2(t_tile - t_rows), 0.0)
        if OF != "rows":
            s_columns = _load(s_ptr, s.row, first_n, length, BLOCK_N)[None, :]
            t_columns = _load(t_ptr, t.row, first_n, length, BLOCK_N)[None, :]
            error += tl.exp2(s_tile - s_columns) - tl.exp2(t_tile - t_columns)
        grad = tl.dot(error.to(b_tile.dtype), b_tile, grad, input_precision="ieee")
    da_ptr = head_of(da, task, head, 1)
    store_tile(da_ptr, da.row, first, length, grad * factor, D, BLOCK_M, BLOCK_D, 1)


def forward(a, b, c, d, cu_seqlens, work, max_length):
    """(T, R, D) student, (T, R, Dt) teacher -> loss, da, db in fp32; db is empty if b is None."""
    itself = b is None
    a, c = as_addressable(a), as_addressable(c.to(a.dtype))
    b, d = (a, c) if itself else (as_addressable(b.to(a.dtype)), as_addressable(d.to(a.dtype)))
    (tokens, heads, width), width_teacher = a.shape, c.shape[-1]
    da = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    db = torch.empty((0,) if itself else a.shape, dtype=torch.float32, device=a.device)
    if a.numel() == 0 or max_length == 0:
        return a.new_zeros((), dtype=torch.float32), da, db
    align, align_t = alignment(a, b), alignment(c, d)
    wider, its_align = (a, align) if width > width_teacher else (c, align_t)
    scores = configs.Scores.of(wider, its_align, max_length, 0.0, "both", [])
    operands = tuple(Rows.of(x, n) for x, n in ((a, align), (b, align), (c, align_t), (d, align_t)))
    da_, db_ = (Rows.of(x, 1) for x in (da, da if itself else db))
    weight = 1.0 / (tokens * heads)
    scales = (LOG2_E * width**-0.5, LOG2_E * width_teacher**-0.5)
    factor = weight * width**-0.5 / LARGER.value
    constants = {
        "D": width,
        "BLOCK_D": configs.head_block(width),
        "DT": width_teacher,
        "BLOCK_DT": configs.head_block(width_teacher),
        "ALIGN": align,
        "ALIGN_T": align_t,
    }

    def partial_losses(programs: int) -> torch.Tensor:
        return torch.empty(programs, heads, dtype=torch.float32, device=a.device)

    setting = configs.attention_if_served("relation_one_tile", scores)
    if setting is not None:
        loss = partial_losses(len(work))
        _one_tile_kernel[len(work), heads](
            *operands, da_, db_, work, loss, weight * LN_2, *scales, factor,
            SELF=itself, **constants, **setting.launch(),
        )  # fmt: skip
        return loss.sum(), da, db
    s, t = (Rows.of(statistics(x)[..., None], 1) for x in (a, c))
    setting = configs.attention("relation_statistics", scores)
    programs = grid(work, max_length, setting.block_m, heads)
    loss = partial_losses(programs[0])
    _statistics_kernel[programs](
        *operands, s, t, work, loss, max_length, weight * LN_2, *scales,
        **constants, **setting.launch(),
    )  # fmt: skip
    setting = configs.attention("relation_gradient", scores)
    programs = grid(work, max_length, setting.block_m, heads)
    a_, b_, c_, d_ = operands
    for of, exchanged, gradient in (
        ("both" if itself else "rows", operands, da_),
        ("columns", (b_, a_, d_, c_), db_),
    ):
        if not (itself and of == "columns"):
            _gradient_kernel[programs](
                *exchanged, s, t, gradient, work, max_length, *scales, factor,
                OF=of, **constants, **setting.launch(),
            )  # fmt: skip
    return loss.sum(), da, db
