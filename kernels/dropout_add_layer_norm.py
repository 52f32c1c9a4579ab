"""y = z * weight + ln_bias,   z = (s - mean) * rstd,   s = residual + M * (x + bias).

M is keep / keep rate of reference/philox.py, drawn anew by the backward: no mask is stored.
Backward, g = dy * weight:   ds = rstd * (g - mean(g) - z * mean(g * z)),   dx = M * ds,
    dbias = sum(dx),   dweight = sum(dy * z),   dln_bias = sum(dy)   over all rows.

Shapes: x, residual, y, s and their gradients (rows, C), made contiguous; bias, weight, ln_bias
(C,); mean, rstd (rows, 1) fp32; sequences, positions int32 (rows,). y and the stored s have the
residual's dtype. Statistics and sums are fp32 for every dtype; y comes from s before it is rounded.
Sources: Ba et al. 2016, arXiv:1607.06450; Devlin et al. 2018, arXiv:1810.04805.
"""

import torch
import triton
import triton.language as tl

from tinybert_fast.kernels import configs
from tinybert_fast.kernels.philox import Dropout, hidden_keep, site_key
from tinybert_fast.kernels.rows import (
    add_partials,
    input_gradient,
    load_columns,
    load_normal,
    load_places,
    load_rows,
    normalise,
    partials,
    store_rows,
    store_sums,
)


@triton.jit
def _sum_block(
    x_ptr, bias_ptr, residual_ptr, offs_m, rows, key, sequence, position, dropout,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    """s of the columns from FIRST on, zero beyond C: (BLOCK_M, BLOCK)."""
    branch = load_rows(x_ptr, offs_m, rows, FIRST, BLOCK, C)
    if HAS_BIAS:
        branch += load_columns(bias_ptr, FIRST, BLOCK, C)
    if DROPOUT:
        keep = hidden_keep(key, sequence, position, FIRST, dropout.threshold, BLOCK)
        branch = tl.where(keep, branch * dropout.scale, 0.0)
    return branch + load_rows(residual_ptr, offs_m, rows, FIRST, BLOCK, C)


@triton.jit(do_not_specialize=["rows", "site"])
def _forward_kernel(
    x_ptr, bias_ptr, residual_ptr, weight_ptr, ln_bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    rows, eps, dropout, site, sequences_ptr, positions_ptr,
    C: tl.constexpr, BLOCK_M: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    key = site_key(dropout.seed, site) if DROPOUT else 0
    sequence, position = load_places(sequences_ptr, positions_ptr, offs_m, rows)
    left = _sum_block(
        x_ptr, bias_ptr, residual_ptr, offs_m, rows, key, sequence, position, dropout,
        0, LEFT, C, HAS_BIAS, DROPOUT,
    )  # fmt: skip
    right = _sum_block(
        x_ptr, bias_ptr, residual_ptr, offs_m, rows, key, sequence, position, dropout,
        LEFT, RIGHT, C, HAS_BIAS, DROPOUT,
    )  # fmt: skip
    store_rows(total_ptr, offs_m, rows, left, 0, LEFT, C)
    store_rows(total_ptr, offs_m, rows, right, LEFT, RIGHT, C)
    left, right, mean, rstd = normalise(left, right, eps, C, LEFT, RIGHT)
    left = left * load_columns(weight_ptr, 0, LEFT, C) + load_columns(ln_bias_ptr, 0, LEFT, C)
    right = right * load_columns(weight_ptr, LEFT, RIGHT, C)
    right += load_columns(ln_bias_ptr, LEFT, RIGHT, C)
    store_rows(y_ptr, offs_m, rows, left, 0, LEFT, C)
    store_rows(y_ptr, offs_m, rows, right, LEFT, RIGHT, C)
    tl.store(mean_ptr + offs_m[:, None], mean, mask=offs_m[:, None] < rows)
    tl.store(rstd_ptr + offs_m[:, None], rstd, mask=offs_m[:, None] < rows)


@triton.jit
def _branch_block(
    dtotal, dx_ptr, offs_m, rows, key, sequence, position, dropout,
    FIRST: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
    DROPOUT: tl.constexpr, WRITES_DX: tl.constexpr,
):  # fmt: skip
    """dx of the columns from FIRST on, written where it is not dtotal itself."""
    dx = dtotal
    if DROPOUT:
        keep = hidden_keep(key, sequence, position, FIRST, dropout.threshold, BLOCK)
        dx = tl.where(keep, dx * dropout.scale, 0.0)
    if WRITES_DX:
        store_rows(dx_ptr, offs_m, rows, dx, FIRST, BLOCK, C)
    return dx


@triton.jit(do_not_specialize=["rows", "site"])
def _backward_kernel(
    grad_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dtotal_ptr, partial_ptr,
    rows, dropout, site, sequences_ptr, positions_ptr,
    C: tl.constexpr, BLOCK_M: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, WRITES_DX: tl.constexpr,
):  # fmt: skip
    weight_left = load_columns(weight_ptr, 0, LEFT, C)
    weight_right = load_columns(weight_ptr, LEFT, RIGHT, C)
    dweight_left, dweight_right = tl.zeros((LEFT,), tl.float32), tl.zeros((RIGHT,), tl.float32)
    dln_left, dln_right = tl.zeros((LEFT,), tl.float32), tl.zeros((RIGHT,), tl.float32)
    dbias_left, dbias_right = tl.zeros((LEFT,), tl.float32), tl.zeros((RIGHT,), tl.float32)
    key = site_key(dropout.seed, site) if DROPOUT else 0
    for first in range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M).to(tl.int64)
        mean = tl.load(mean_ptr + offs_m, mask=offs_m < rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < rows, other=0.0)[:, None]
        grad_left = load_rows(grad_ptr, offs_m, rows, 0, LEFT, C)
        grad_right = load_rows(grad_ptr, offs_m, rows, LEFT, RIGHT, C)
        z_left = load_normal(total_ptr, mean, rstd, offs_m, rows, 0, LEFT, C)
        z_right = load_normal(total_ptr, mean, rstd, offs_m, rows, LEFT, RIGHT, C)
        dweight_left += tl.sum(grad_left * z_left, 0)
        dweight_right += tl.sum(grad_right * z_right, 0)
        dln_left += tl.sum(grad_left, 0)
        dln_right += tl.sum(grad_right, 0)
        left, right = input_gradient(
            grad_left, z_left, weight_left, grad_right, z_right, weight_right, rstd, C
        )
        store_rows(dtotal_ptr, offs_m, rows, left, 0, LEFT, C)
        store_rows(dtotal_ptr, offs_m, rows, right, LEFT, RIGHT, C)
        sequence, position = load_places(sequences_ptr, positions_ptr, offs_m, rows)
        left = _branch_block(
            left, dx_ptr, offs_m, rows, key, sequence, position, dropout,
            0, LEFT, C, DROPOUT, WRITES_DX,
        )  # fmt: skip
        right = _branch_block(
            right, dx_ptr, offs_m, rows, key, sequence, position, dropout,
            LEFT, RIGHT, C, DROPOUT, WRITES_DX,
        )  # fmt: skip
        if HAS_BIAS:
            dbias_left += tl.sum(left, 0)
            dbias_right += tl.sum(right, 0)
    store_sums(partial_ptr, 0, dweight_left, dweight_right, C, LEFT, RIGHT)
    store_sums(partial_ptr, 1, dln_left, dln_right, C, LEFT, RIGHT)
    if HAS_BIAS:
        store_sums(partial_ptr, 2, dbias_left, dbias_right, C, LEFT, RIGHT)


def forward(x, bias, residual, weight, ln_bias, eps, dropout_p, seed, site, sequences, positions):
    """(rows, C) operands -> y, s in the residual's dtype, mean, rstd (rows, 1), no stored cells."""
    rows, columns = x.shape
    y, total = (torch.empty(x.shape, dtype=residual.dtype, device=x.device) for _ in range(2))
    mean, rstd = (torch.empty(rows, 1, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows > 0:
        setting = configs.rows("forward", columns)
        vectors = (None if v is None else v.contiguous() for v in (bias, weight, ln_bias))
        bias, weight, ln_bias = vectors
        _forward_kernel[(triton.cdiv(rows, setting.block_m),)](
            x.contiguous(), bias, residual.contiguous(), weight, ln_bias, y, total, mean, rstd,
            rows, eps, Dropout.of(dropout_p, seed), site, sequences, positions,
            C=columns, HAS_BIAS=bias is not None, DROPOUT=dropout_p > 0.0, **setting.launch(),
        )  # fmt: skip
    return y, total, mean, rstd, torch.empty(0, dtype=torch.uint8, device=x.device)


def backward(
    grad, total, mean, rstd, cells, weight, dropout_p, seed, site, sequences, positions, x_dtype,
    with_bias,
):  # fmt: skip
    """Gradients of x (in ``x_dtype``; empty where it equals the sum's), sum, bias, weight, ln_bias.

    The mask is drawn again; ``cells`` is empty.
    """
    rows, columns = total.shape
    own = dropout_p > 0.0 or x_dtype != total.dtype
    dx = torch.empty(total.shape if own else (0,), dtype=x_dtype, device=total.device)
    dtotal = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    dweight, dln_bias = torch.empty_like(weight), torch.empty_like(weight)
    dbias = torch.empty_like(weight) if with_bias else weight.new_empty(0)
    sums = (dweight, dln_bias, dbias) if with_bias else (dweight, dln_bias)
    setting = configs.rows("backward", columns)
    partial = partials(len(sums), rows, setting, total)
    if rows > 0:
        _backward_kernel[(partial.shape[1],)](
            grad.contiguous(), total, weight.contiguous(), mean, rstd, dx, dtotal, partial,
            rows, Dropout.of(dropout_p, seed), site, sequences, positions,
            C=columns, HAS_BIAS=with_bias, DROPOUT=dropout_p > 0.0, WRITES_DX=own,
            **setting.launch(),
        )  # fmt: skip
    add_partials(partial, *sums)
    return dx, dtotal, dbias, dweight, dln_bias
