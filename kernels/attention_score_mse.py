"""w * sum((S - T)^2) with S = a Q K^T and T = b P R^T over the real pairs of each sequence, and its
gradients of Q and K: TinyBERT's attention loss (Jiao et al. 2020, arXiv:1909.10351, equation 7).

Gram form, one program for dQ of a (sequence, head), one for dK, which is the same with the operands
exchanged, and one for the teacher's own term. Each sums Gram matrices over the rows of one side,
then goes over those of the other:

    dQ = 2wa (a Q (K^T K) - b P (R^T K))
    sum = <a Q, a Q (K^T K) - 2b P (R^T K)> + <b P, b P (R^T R)>

Direct form, one program for a block of queries, then one for a block of keys, which is the same
with the operands exchanged; under a block mask, over the blocks that its lists name:

    E = S - T, 0 where the mask forbids,   dQ = 2wa E K,   dK = 2wa E^T Q

Shapes: q, k, dq, dk (T, H, D); p, r (T, H, Dt). Products of the operands, in the dtype of q,
accumulate in fp32 (fp32 operands: IEEE products, on no tensor core). What enters a second product,
a Gram matrix or E, is split into two numbers of the operands' dtype, hi + lo, which keep 16 bits or
more: rounded to one bf16, small differences of large Gram matrices would be lost. The gradients of
bf16 are bf16; those of fp16 stay in fp32, since a mean's are below what fp16 holds. Each program
writes its own rows and its own share of the loss: two runs give the same bits.
"""

import torch
import triton
import triton.language as tl

from tinybert_fast.kernels import configs
from tinybert_fast.kernels.attention.tiles import (
    FULL,
    PARTIAL,
    BlockList,
    Rows,
    alignment,
    allowed_cells,
    as_addressable,
    entry_of,
    live_scores,
    load_tile,
    position,
    segment,
    side_of,
    store_tile,
)

SEQUENCES = tl.constexpr(256)  # whose lengths are read at a time
SMALLEST = tl.constexpr(1e-30)  # error of a score that is not taken for none
WIDEST_BYTES = 16  # of a load
COUNTED = 64  # queries and keys of a tile whose pairs are counted: the smallest block of a mask


@triton.jit
def _product(a, b, acc):
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _split_product(a, b, acc):
    """a @ b + acc, where a is fp32 and b has the operands' dtype."""
    if b.dtype == tl.float32:
        return _product(a, b, acc)
    high = a.to(b.dtype)
    return _product(high, b, _product((a - high.to(tl.float32)).to(b.dtype), b, acc))


@triton.jit
def _largest(a, b):
    """The largest magnitude in two matrices; 1 if all is 0."""
    largest = tl.maximum(tl.max(tl.abs(a)), tl.max(tl.abs(b)))
    return tl.where(largest > 0.0, largest, 1.0)


@triton.jit
def _head(x, start, head, ALIGN: tl.constexpr):
    """Address of the row ``start`` of one head of ``x: Rows``."""
    return x.ptr + (start.to(tl.int64) * x.row + head.to(tl.int64) * x.head) * ALIGN


@triton.jit
def _lengths(cu_seqlens, first, sequences):
    """Of SEQUENCES sequences: (SEQUENCES,)."""
    at = first + tl.arange(0, SEQUENCES)
    live = at < sequences
    stop = tl.load(cu_seqlens + at + 1, mask=live, other=0)
    return stop - tl.load(cu_seqlens + at, mask=live, other=0)


@triton.jit
def _weight(cu_seqlens, lengths, pairs_ptr, sequences, heads):
    """w = 1 / (heads * pairs), of all sequences if ``pairs_ptr`` is None: known to the device, so
    that nobody waits for it. ``lengths``: of the first sequences, loaded long before.
    """
    if pairs_ptr is None:
        lengths = lengths.to(tl.int64)
        pairs = tl.sum(lengths * lengths)
        for first in range(SEQUENCES, sequences, SEQUENCES):
            lengths = _lengths(cu_seqlens, first, sequences).to(tl.int64)
            pairs += tl.sum(lengths * lengths)
    else:
        pairs = tl.load(pairs_ptr)
    return 1.0 / (tl.maximum(pairs, 1).to(tl.float32) * heads)


@triton.jit
def _load_head(
    x_ptr, row, first, length, D: tl.constexpr, WIDE: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """As load_tile, as wide as the strides allow: what stands in memory behind a head is loaded
    too, and set to 0.
    """
    tile = load_tile(x_ptr, row, first, length, WIDE, BLOCK_M, BLOCK_D, ALIGN)
    if WIDE > D:
        tile = tl.where(tl.arange(0, BLOCK_D)[None, :] < D, tile, 0.0)
    return tile


@triton.jit
def _tall(x):
    """Heads of 32 with as many zeros behind them: sm_90's and sm_100's products have 64 rows."""
    if x.shape[1] == 32:
        x = tl.permute(tl.join(x, tl.zeros_like(x)), (0, 2, 1)).reshape(x.shape[0], 64)
    return x


@triton.jit
def _split_gram(matrix, factor, like):
    """(hi, lo) of a matrix times ``factor``, in the dtype of ``like``."""
    matrix *= factor
    high = matrix.to(like.dtype.element_ty)
    return high, (matrix - high.to(tl.float32)).to(like.dtype.element_ty)


@triton.jit
def _times_gram(x, high, low):
    """x @ (high + low)."""
    product = tl.zeros((x.shape[0], high.shape[1]), tl.float32)
    if x.dtype != tl.float32:
        product = _product(x, low, product)
    return _product(x, high, product)


@triton.jit
def _student_part(
    x, y, u, v, dx, start, length, head, cu_seqlens, lengths, sequences, a, b,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DT: tl.constexpr, BLOCK_DT: tl.constexpr,
    BLOCK_M: tl.constexpr, ALIGN: tl.constexpr, ALIGN_T: tl.constexpr, ALIGN_G: tl.constexpr,
    WIDE: tl.constexpr, WIDE_T: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """dX = 2wa (a X (U^T U) - b Y (V^T U)), and w <a X, a X (U^T U) - 2b Y (V^T U)>."""
    x_ptr, u_ptr = _head(x, start, head, ALIGN), _head(u, start, head, ALIGN)
    y_ptr, v_ptr = _head(y, start, head, ALIGN_T), _head(v, start, head, ALIGN_T)
    TALL: tl.constexpr = 64 if BLOCK_D == 32 else BLOCK_D
    TALL_T: tl.constexpr = 64 if BLOCK_DT == 32 else BLOCK_DT
    uu = tl.zeros((TALL, BLOCK_D), tl.float32)
    vu = tl.zeros((TALL_T, BLOCK_D), tl.float32)
    for first in range(0, length, BLOCK_M):
        u_tile = _load_head(u_ptr, u.row, first, length, D, WIDE, BLOCK_D, BLOCK_M, ALIGN)
        v_tile = _load_head(v_ptr, v.row, first, length, DT, WIDE_T, BLOCK_DT, BLOCK_M, ALIGN_T)
        uu = _product(tl.trans(_tall(u_tile)), u_tile, uu)
        vu = _product(tl.trans(_tall(v_tile)), u_tile, vu)
    weight = _weight(cu_seqlens, lengths, None, sequences, HEADS)
    # Divided by the largest, so that fp16 holds them; it comes back with the factor.
    largest = _largest(a * uu, b * vu)
    uu, uu_low = _split_gram(uu, a / largest, x.ptr)
    vu, vu_low = _split_gram(vu, -b / largest, x.ptr)
    factor = weight * a * largest
    dx_ptr = _head(dx, start, head, ALIGN_G)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, length, BLOCK_M):
        x_tile = _load_head(x_ptr, x.row, first, length, D, WIDE, BLOCK_D, BLOCK_M, ALIGN)
        y_tile = _load_head(y_ptr, y.row, first, length, DT, WIDE_T, BLOCK_DT, BLOCK_M, ALIGN_T)
        of_teacher = _times_gram(_tall(y_tile), vu, vu_low)
        grad = _times_gram(_tall(x_tile), uu, uu_low) + of_teacher
        sums += tl.sum(x_tile.to(tl.float32) * (grad + of_teacher), 1)
        store_tile(
            dx_ptr, dx.row, first, length, grad * (2.0 * factor), D, BLOCK_M, BLOCK_D, ALIGN_G
        )
    return tl.sum(sums) * factor


@triton.jit
def _teacher_part(
    y, v, start, length, head, cu_seqlens, lengths, sequences, b,
    DT: tl.constexpr, BLOCK_DT: tl.constexpr, BLOCK_M: tl.constexpr, ALIGN_T: tl.constexpr,
    WIDE_T: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """w <b Y, b Y (V^T V)>, rounded as the student's part is: what is near in both cancels."""
    y_ptr, v_ptr = _head(y, start, head, ALIGN_T), _head(v, start, head, ALIGN_T)
    TALL_T: tl.constexpr = 64 if BLOCK_DT == 32 else BLOCK_DT
    vv = tl.zeros((TALL_T, BLOCK_DT), tl.float32)
    for first in range(0, length, BLOCK_M):
        v_tile = _load_head(v_ptr, v.row, first, length, DT, WIDE_T, BLOCK_DT, BLOCK_M, ALIGN_T)
        vv = _product(tl.trans(_tall(v_tile)), v_tile, vv)
    weight = _weight(cu_seqlens, lengths, None, sequences, HEADS)
    largest = _largest(vv, vv)
    vv, vv_low = _split_gram(vv, 1.0 / largest, y.ptr)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    for first in range(0, length, BLOCK_M):
        y_tile = _load_head(y_ptr, y.row, first, length, DT, WIDE_T, BLOCK_DT, BLOCK_M, ALIGN_T)
        sums += tl.sum(y_tile.to(tl.float32) * _times_gram(_tall(y_tile), vv, vv_low), 1)
    return tl.sum(sums) * (weight * b * b * largest)


@triton.jit(do_not_specialize=["sequences"])
def _gram_kernel(
    q, k, p, r, dq, dk, cu_seqlens, loss_ptr, sequences, a, b,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DT: tl.constexpr, BLOCK_DT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, ALIGN_T: tl.constexpr,
    ALIGN_G: tl.constexpr, WIDE: tl.constexpr, WIDE_T: tl.constexpr, HEADS: tl.constexpr,
    LOSS: tl.constexpr,
):  # fmt: skip
    PARTS: tl.constexpr = 3 if LOSS == "full" else 2
    # Parts of a head side by side: what the one reads first the other reads last, from the cache.
    part, program = tl.program_id(0) % PARTS, tl.program_id(0) // PARTS
    sequence, head = program // HEADS, program % HEADS
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    lengths = _lengths(cu_seqlens, 0, sequences)
    # Both of the student's parts find the same sum, from other roundings.
    if part == 0:
        total = 0.5 * _student_part(
            q, p, k, r, dq, start, length, head, cu_seqlens, lengths, sequences, a, b, D, BLOCK_D,
            DT, BLOCK_DT, BLOCK_M, ALIGN, ALIGN_T, ALIGN_G, WIDE, WIDE_T, HEADS,
        )  # fmt: skip
    elif part == 1:
        total = 0.5 * _student_part(
            k, r, q, p, dk, start, length, head, cu_seqlens, lengths, sequences, a, b, D, BLOCK_D,
            DT, BLOCK_DT, BLOCK_M, ALIGN, ALIGN_T, ALIGN_G, WIDE, WIDE_T, HEADS,
        )  # fmt: skip
    else:
        total = _teacher_part(
            p, r, start, length, head, cu_seqlens, lengths, sequences, b, DT, BLOCK_DT, BLOCK_M,
            ALIGN_T, WIDE_T, HEADS,
        )  # fmt: skip
    tl.store(loss_ptr + tl.program_id(0), total)


@triton.jit
def _add_block(
    grad, sums, peak, q_tile, p_tile, k_ptr, r_ptr, k_row, r_row, first_m, first_n, length, a, b,
    blocks, entry,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DT: tl.constexpr, BLOCK_DT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, ALIGN_T: tl.constexpr,
    LOSS: tl.constexpr, SIDE: tl.constexpr, CELLS: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """E K and, of each row, |E|^2 (or |E|^2 - |T|^2) with one more block of keys.

    In fp16 E K is relative to the row's largest error so far, ``peak``: small ones keep their bits.
    """
    k_tile = load_tile(k_ptr, k_row, first_n, length, D, BLOCK_N, BLOCK_D, ALIGN)
    r_tile = load_tile(r_ptr, r_row, first_n, length, DT, BLOCK_N, BLOCK_DT, ALIGN_T)
    # Rows beyond the sequence are zero, so their scores are.
    zero = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    teacher = b * _product(p_tile, tl.trans(r_tile), zero)
    error = a * _product(q_tile, tl.trans(k_tile), zero) - teacher
    if CELLS:
        if OF_KEYS:  # the operands are exchanged, the mask is not
            allowed = tl.trans(
                allowed_cells(blocks, entry, first_n, first_m, BLOCK_N, BLOCK_M, SIDE)
            )
        else:
            allowed = allowed_cells(blocks, entry, first_m, first_n, BLOCK_M, BLOCK_N, SIDE)
        error = tl.where(allowed, error, 0.0)
        teacher = tl.where(allowed, teacher, 0.0)
    if LOSS == "full":
        sums += tl.sum(error * error, 1)
    elif LOSS == "student":
        sums += tl.sum(error * error - teacher * teacher, 1)
    if k_tile.dtype == tl.float16:
        larger = tl.maximum(peak, tl.max(tl.abs(error), 1))
        grad *= (peak / larger)[:, None]
        error /= larger[:, None]
        peak = larger
    return _split_product(error, k_tile, grad), sums, peak


@triton.jit(do_not_specialize=["sequences", "max_length"])
def _direct_kernel(
    q, k, p, r, dq, cu_seqlens, pairs_ptr, loss_ptr, blocks, sequences, max_length, a, b,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DT: tl.constexpr, BLOCK_DT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ALIGN: tl.constexpr, ALIGN_T: tl.constexpr,
    LOSS: tl.constexpr, SIDE: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    rows = tl.cdiv(max_length, BLOCK_M)
    sequence, head = tl.program_id(0) // rows, tl.program_id(1)
    first_m = tl.program_id(0) % rows * BLOCK_M
    lengths = _lengths(cu_seqlens, 0, sequences)
    weight = _weight(cu_seqlens, lengths, pairs_ptr, sequences, tl.num_programs(1))
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    total = 0.0
    if first_m < length:
        low, high = 0, tl.cdiv(length, BLOCK_N)
        if SIDE > 0:
            low, high = segment(blocks, sequence, first_m, length, PARTIAL, SIDE, BLOCK_N)
        q_ptr, k_ptr = _head(q, start, head, ALIGN), _head(k, start, head, ALIGN)
        p_ptr, r_ptr = _head(p, start, head, ALIGN_T), _head(r, start, head, ALIGN_T)
        q_tile = load_tile(q_ptr, q.row, first_m, length, D, BLOCK_M, BLOCK_D, ALIGN)
        p_tile = load_tile(p_ptr, p.row, first_m, length, DT, BLOCK_M, BLOCK_DT, ALIGN_T)
        grad = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        sums = tl.zeros((BLOCK_M,), tl.float32)
        peak = tl.full((BLOCK_M,), SMALLEST if q_tile.dtype == tl.float16 else 1.0, tl.float32)
        if SIDE > 0:
            for step in range(low, high):
                grad, sums, peak = _add_block(
                    grad, sums, peak, q_tile, p_tile, k_ptr, r_ptr, k.row, r.row, first_m,
                    position(blocks, step, SIDE, BLOCK_N), length, a, b,
                    blocks, entry_of(step, SIDE, BLOCK_N), D, BLOCK_D, DT, BLOCK_DT,
                    BLOCK_M, BLOCK_N, ALIGN, ALIGN_T, LOSS, SIDE, True, OF_KEYS,
                )  # fmt: skip
            low, high = segment(blocks, sequence, first_m, length, FULL, SIDE, BLOCK_N)
        for step in range(low, high):
            first_n = position(blocks, step, SIDE, BLOCK_N) if SIDE > 0 else step * BLOCK_N
            grad, sums, peak = _add_block(
                grad, sums, peak, q_tile, p_tile, k_ptr, r_ptr, k.row, r.row, first_m,
                first_n, length, a, b, blocks, 0, D, BLOCK_D, DT, BLOCK_DT,
                BLOCK_M, BLOCK_N, ALIGN, ALIGN_T, LOSS, SIDE, False, OF_KEYS,
            )  # fmt: skip
        grad *= (2.0 * weight * a) * peak[:, None]
        dq_ptr = _head(dq, start, head, 1)
        store_tile(dq_ptr, dq.row, first_m, length, grad, D, BLOCK_M, BLOCK_D, 1)
        total = tl.sum(sums) * weight
    if LOSS != "none":
        tl.store(loss_ptr + tl.program_id(0) * tl.num_programs(1) + head, total)


@triton.jit(do_not_specialize=["max_length"])
def _pairs_kernel(
    cu_seqlens, pairs_ptr, blocks, max_length, BLOCK: tl.constexpr, SIDE: tl.constexpr
):
    """The pairs of a block of queries that the mask allows."""
    rows = tl.cdiv(max_length, BLOCK)
    sequence, first_m = tl.program_id(0) // rows, tl.program_id(0) % rows * BLOCK
    length = tl.load(cu_seqlens + sequence + 1) - tl.load(cu_seqlens + sequence)
    pairs = tl.zeros((), tl.int64)
    if first_m < length:
        low, high = segment(blocks, sequence, first_m, length, PARTIAL, SIDE, BLOCK)
        for step in range(low, high):
            first_n = position(blocks, step, SIDE, BLOCK)
            entry = entry_of(step, SIDE, BLOCK)
            live = allowed_cells(blocks, entry, first_m, first_n, BLOCK, BLOCK, SIDE)
            live = live & live_scores(first_m, first_n, length, BLOCK, BLOCK, "both")
            pairs += tl.sum(live.to(tl.int32))
        queries = tl.minimum(length - first_m, BLOCK)
        low, high = segment(blocks, sequence, first_m, length, FULL, SIDE, BLOCK)
        for step in range(low, high):
            pairs += queries * tl.minimum(length - position(blocks, step, SIDE, BLOCK), BLOCK)
    tl.store(pairs_ptr + tl.program_id(0), pairs)


def _loaded(x, align: int) -> int:
    """Numbers of a head's row that are loaded: whole loads of up to 16 bytes. One that is aligned
    and begins in memory ends in memory.
    """
    width, unit = x.shape[-1], min(align, WIDEST_BYTES // x.element_size())
    return min(configs.cdiv(width, unit) * unit, configs.head_block(width))


def forward(q, k, p, r, cu_seqlens, max_length, form, loss, block_mask):
    """(T, H, D) student and (T, H, Dt) teacher -> loss, dq and dk: fp32, but gradients of bf16."""
    k, p, r = (x.to(q.dtype) for x in (k, p, r))
    q, k, p, r = (as_addressable(x) for x in (q, k, p, r))
    heads, d, d_teacher = q.shape[1], q.shape[2], p.shape[2]
    sequences = len(cu_seqlens) - 1
    kept = q.dtype if q.dtype == torch.bfloat16 else torch.float32
    dq, dk = (torch.empty(x.shape, dtype=kept, device=x.device) for x in (q, k))
    if q.numel() == 0 or max_length == 0:
        return q.new_zeros((), dtype=torch.float32), dq, dk
    scales = d**-0.5, d_teacher**-0.5
    align, align_t = alignment(q, k), alignment(p, r)
    wider, its_align = (q, align) if d > d_teacher else (p, align_t)
    scores = configs.Scores.of(wider, its_align, max_length, 0.0, "both", block_mask)
    loaded = {"WIDE": _loaded(q, align), "WIDE_T": _loaded(p, align_t)}
    (q, k), (p, r) = [Rows.of(x, align) for x in (q, k)], [Rows.of(x, align_t) for x in (p, r)]
    constants = {
        "D": d,
        "BLOCK_D": configs.head_block(d),
        "DT": d_teacher,
        "BLOCK_DT": configs.head_block(d_teacher),
        "ALIGN": align,
        "ALIGN_T": align_t,
    }
    if form == "gram":
        setting = configs.attention("gram", scores)
        parts = 3 if loss == "full" else 2  # dq, dk, and the teacher's own term
        losses = torch.empty(sequences * heads * parts, dtype=torch.float32, device=dq.device)
        align_g = alignment(dq, dk)
        of_gradients = [Rows.of(x, align_g) for x in (dq, dk)]
        _gram_kernel[len(losses),](
            q, k, p, r, *of_gradients, cu_seqlens, losses, sequences, *scales, LOSS=loss,
            HEADS=heads, ALIGN_G=align_g, **loaded, **constants, **setting.launch(),
        )  # fmt: skip
        total = losses.sum()
        return total.clamp_min_(0.0) if loss == "full" else total, dq, dk
    setting = configs.attention("direct", scores)
    side, by_query = side_of(block_mask), BlockList.by_query(block_mask)
    pairs = None
    if side:
        counted = sequences * configs.cdiv(max_length, COUNTED)
        of_blocks = torch.empty(counted, dtype=torch.int64, device=dq.device)
        _pairs_kernel[counted,](
            cu_seqlens, of_blocks, by_query, max_length,
            BLOCK=COUNTED, SIDE=side, **configs.COMPILED,
        )  # fmt: skip
        pairs = of_blocks.sum()
    programs = sequences * configs.cdiv(max_length, setting.block_m)
    losses = torch.empty(programs, heads, dtype=torch.float32, device=dq.device)
    for operands, gradient, blocks, reported in (
        ((q, k, p, r), Rows.of(dq, 1), by_query, loss),
        ((k, q, r, p), Rows.of(dk, 1), BlockList.by_key(block_mask), "none"),
    ):
        _direct_kernel[programs, heads](
            *operands, gradient, cu_seqlens, pairs, losses, blocks, sequences, max_length, *scales,
            LOSS=reported, SIDE=side, OF_KEYS=reported == "none", **constants, **setting.launch(),
        )  # fmt: skip
    return losses.sum(), dq, dk
