"""y = z * weight + ln_bias,   z = (s - mean) * rstd,   s = residual + M * (x + bias).

M is keep / keep rate of reference/philox.py, drawn anew by the backward: no mask is stored.
Backward, g = dy * weight:   ds = rstd * (g - mean(g) - z * mean(g * z)),   dx = M * ds,
    dbias = sum(dx),   dweight = sum(dy * z),   dln_bias = sum(dy)   over all rows.

Shapes: x, residual, y, s and their gradients (rows, C), made contiguous; bias, weight, ln_bias
(C,); mean, rstd (rows, 1) fp32; sequences, positions int32 (rows,). y and the s that is kept for
the backward have the residual's dtype. Statistics and sums over rows are fp32 for every dtype; y
comes from s before it is rounded.
Sources: Ba et al. 2016, arXiv:1607.06450; Devlin et al. 2018, arXiv:1810.04805.
"""

import torch
import triton
import triton.language as tl

from tinybert_fast.kernels import configs
from tinybert_fast.kernels.philox import Dropout, drop, site_key
from tinybert_fast.kernels.rows import (
    add,
    add_partials,
    input_gradient,
    load_place,
    load_rows,
    load_statistic,
    load_vector,
    multiply,
    normalise,
    partials,
    renormalise,
    store_rows,
    store_statistic,
    store_sum,
    zeros,
)


@triton.jit(do_not_specialize=["rows", "site"])
def _forward_kernel(
    x_ptr, bias_ptr, residual_ptr, weight_ptr, ln_bias_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    rows, eps, dropout, site, sequences_ptr, positions_ptr,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = load_rows(x_ptr, offs_m, rows, C, BLOCK_N)
    residual = load_rows(residual_ptr, offs_m, rows, C, BLOCK_N)
    if HAS_BIAS:
        total = add(total, load_vector(bias_ptr, C, BLOCK_M, BLOCK_N))
    if DROPOUT:
        sequence, position = load_place(sequences_ptr, positions_ptr, offs_m, rows)
        total = drop(total, site_key(dropout.seed, site), sequence, position, dropout, BLOCK_N)
    total = add(total, residual)
    if KEEP:
        store_rows(total_ptr, offs_m, rows, total, C, BLOCK_N)
    z, mean, rstd = normalise(total, eps, C, BLOCK_N)
    weight, ln_bias = (
        load_vector(weight_ptr, C, BLOCK_M, BLOCK_N),
        load_vector(ln_bias_ptr, C, BLOCK_M, BLOCK_N),
    )
    store_rows(y_ptr, offs_m, rows, add(multiply(z, weight), ln_bias), C, BLOCK_N)
    store_statistic(mean_ptr, offs_m, rows, mean)
    store_statistic(rstd_ptr, offs_m, rows, rstd)


@triton.jit(do_not_specialize=["rows", "site"])
def _backward_kernel(
    grad_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dtotal_ptr, partial_ptr,
    rows, dropout, site, sequences_ptr, positions_ptr,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr, WRITES_DX: tl.constexpr,
):  # fmt: skip
    key = site_key(dropout.seed, site) if DROPOUT else 0
    weight = load_vector(weight_ptr, C, BLOCK_M, BLOCK_N)
    dweight, dln_bias = zeros(C, BLOCK_M, BLOCK_N), zeros(C, BLOCK_M, BLOCK_N)
    dbias = zeros(C, BLOCK_M, BLOCK_N)
    step = tl.num_programs(0) * BLOCK_M
    for first in tl.range(tl.program_id(0) * BLOCK_M, rows, step, num_stages=STAGES):
        offs_m = first + tl.arange(0, BLOCK_M).to(tl.int64)
        grad = load_rows(grad_ptr, offs_m, rows, C, BLOCK_N)
        total = load_rows(total_ptr, offs_m, rows, C, BLOCK_N)
        mean, rstd = load_statistic(mean_ptr, offs_m, rows), load_statistic(rstd_ptr, offs_m, rows)
        z = renormalise(total, mean, rstd)
        dweight, dln_bias = add(dweight, multiply(grad, z)), add(dln_bias, grad)
        dx = input_gradient(grad, z, weight, rstd, C)
        store_rows(dtotal_ptr, offs_m, rows, dx, C, BLOCK_N)
        if DROPOUT:
            sequence, position = load_place(sequences_ptr, positions_ptr, offs_m, rows)
            dx = drop(dx, key, sequence, position, dropout, BLOCK_N)
        if WRITES_DX:
            store_rows(dx_ptr, offs_m, rows, dx, C, BLOCK_N)
        if HAS_BIAS:
            dbias = add(dbias, dx)
    store_sum(partial_ptr, 0, dweight, C, BLOCK_N)
    store_sum(partial_ptr, 1, dln_bias, C, BLOCK_N)
    if HAS_BIAS:
        store_sum(partial_ptr, 2, dbias, C, BLOCK_N)


def forward(
    x, bias, residual, weight, ln_bias, eps, dropout_p, seed, site, sequences, positions, keep
):
    """(rows, C) operands -> y, s in the residual's dtype (empty unless ``keep``), mean, rstd
    (rows, 1), no stored cells.
    """
    rows, columns = x.shape
    shapes = x.shape, x.shape if keep else (0,)
    y, total = (torch.empty(s, dtype=residual.dtype, device=x.device) for s in shapes)
    mean, rstd = (torch.empty(rows, 1, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows > 0:
        setting = configs.rows("forward", columns)
        vectors = (None if v is None else v.contiguous() for v in (bias, weight, ln_bias))
        bias, weight, ln_bias = vectors
        _forward_kernel[(configs.cdiv(rows, setting.block_m),)](
            x.contiguous(), bias, residual.contiguous(), weight, ln_bias, y, total, mean, rstd,
            rows, eps, Dropout.of(dropout_p, seed), site, sequences, positions,
            C=columns, HAS_BIAS=bias is not None, DROPOUT=dropout_p > 0.0, KEEP=keep,
            **setting.launch(),
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
    setting = configs.rows("backward", columns, total.element_size())
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
