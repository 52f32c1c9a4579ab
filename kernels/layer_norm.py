"""y = z * weight + bias,   z = (x - mean) * rstd,   rstd = 1 / sqrt(var + eps), over the last axis.

Backward, g = dy * weight:   dx = rstd * (g - mean(g) - z * mean(g * z)),
    dweight = sum(dy * z),   dbias = sum(dy)   over all rows.

Shapes: x, y, dy, dx (rows, C), made contiguous; weight, bias (C,); mean, rstd (rows, 1) fp32.
Statistics and sums are fp32 for every dtype; each result is rounded once, to its operand's dtype.
Source: Ba et al. 2016, arXiv:1607.06450.
"""

import torch
import triton
import triton.language as tl

from tinybert_fast.kernels import configs
from tinybert_fast.kernels.rows import (
    add,
    add_partials,
    input_gradient,
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


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, rows, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x = load_rows(x_ptr, offs_m, rows, C, BLOCK_N)
    z, mean, rstd = normalise(x, eps, C, BLOCK_N)
    weight, bias = (
        load_vector(weight_ptr, C, BLOCK_M, BLOCK_N),
        load_vector(bias_ptr, C, BLOCK_M, BLOCK_N),
    )
    store_rows(y_ptr, offs_m, rows, add(multiply(z, weight), bias), C, BLOCK_N)
    store_statistic(mean_ptr, offs_m, rows, mean)
    store_statistic(rstd_ptr, offs_m, rows, rstd)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr, rows,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    weight = load_vector(weight_ptr, C, BLOCK_M, BLOCK_N)
    dweight, dbias = zeros(C, BLOCK_M, BLOCK_N), zeros(C, BLOCK_M, BLOCK_N)
    step = tl.num_programs(0) * BLOCK_M
    for first in tl.range(tl.program_id(0) * BLOCK_M, rows, step, num_stages=STAGES):
        offs_m = first + tl.arange(0, BLOCK_M).to(tl.int64)
        grad = load_rows(grad_ptr, offs_m, rows, C, BLOCK_N)
        x = load_rows(x_ptr, offs_m, rows, C, BLOCK_N)
        mean, rstd = load_statistic(mean_ptr, offs_m, rows), load_statistic(rstd_ptr, offs_m, rows)
        z = renormalise(x, mean, rstd)
        dweight, dbias = add(dweight, multiply(grad, z)), add(dbias, grad)
        dx = input_gradient(grad, z, weight, rstd, C)
        store_rows(dx_ptr, offs_m, rows, dx, C, BLOCK_N)
    store_sum(partial_ptr, 0, dweight, C, BLOCK_N)
    store_sum(partial_ptr, 1, dbias, C, BLOCK_N)


def forward(x, weight, bias, eps):
    """x (rows, C) -> y in x's dtype, mean and rstd (rows, 1) fp32."""
    rows, columns = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(rows, 1, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows > 0:
        setting = configs.rows("forward", columns)
        _forward_kernel[(configs.cdiv(rows, setting.block_m),)](
            x.contiguous(), weight.contiguous(), bias.contiguous(), y, mean, rstd, rows, eps,
            C=columns, **setting.launch(),
        )  # fmt: skip
    return y, mean, rstd


def backward(grad, x, weight, mean, rstd):
    """Gradients of x (in its dtype), weight and bias (in the weight's)."""
    rows, columns = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    setting = configs.rows("backward", columns, x.element_size())
    partial = partials(2, rows, setting, x)
    if rows > 0:
        _backward_kernel[(partial.shape[1],)](
            grad.contiguous(), x.contiguous(), weight.contiguous(), mean, rstd, dx, partial, rows,
            C=columns, **setting.launch(),
        )  # fmt: skip
    add_partials(partial, dweight, dbias)
    return dx, dweight, dbias
