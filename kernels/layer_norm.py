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
    add_partials,
    input_gradient,
    load_columns,
    load_normal,
    load_rows,
    normalise,
    partials,
    store_rows,
    store_sums,
)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, rows, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    left = load_rows(x_ptr, offs_m, rows, 0, LEFT, C)
    right = load_rows(x_ptr, offs_m, rows, LEFT, RIGHT, C)
    left, right, mean, rstd = normalise(left, right, eps, C, LEFT, RIGHT)
    left = left * load_columns(weight_ptr, 0, LEFT, C) + load_columns(bias_ptr, 0, LEFT, C)
    right = right * load_columns(weight_ptr, LEFT, RIGHT, C)
    right += load_columns(bias_ptr, LEFT, RIGHT, C)
    store_rows(y_ptr, offs_m, rows, left, 0, LEFT, C)
    store_rows(y_ptr, offs_m, rows, right, LEFT, RIGHT, C)
    tl.store(mean_ptr + offs_m[:, None], mean, mask=offs_m[:, None] < rows)
    tl.store(rstd_ptr + offs_m[:, None], rstd, mask=offs_m[:, None] < rows)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, partial_ptr, rows,
    C: tl.constexpr, BLOCK_M: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    weight_left = load_columns(weight_ptr, 0, LEFT, C)
    weight_right = load_columns(weight_ptr, LEFT, RIGHT, C)
    dweight_left, dweight_right = tl.zeros((LEFT,), tl.float32), tl.zeros((RIGHT,), tl.float32)
    dbias_left, dbias_right = tl.zeros((LEFT,), tl.float32), tl.zeros((RIGHT,), tl.float32)
    for first in range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M).to(tl.int64)
        mean = tl.load(mean_ptr + offs_m, mask=offs_m < rows, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_m, mask=offs_m < rows, other=0.0)[:, None]
        grad_left = load_rows(grad_ptr, offs_m, rows, 0, LEFT, C)
        grad_right = load_rows(grad_ptr, offs_m, rows, LEFT, RIGHT, C)
        z_left = load_normal(x_ptr, mean, rstd, offs_m, rows, 0, LEFT, C)
        z_right = load_normal(x_ptr, mean, rstd, offs_m, rows, LEFT, RIGHT, C)
        dx_left, dx_right = input_gradient(
            grad_left, z_left, weight_left, grad_right, z_right, weight_right, rstd, C
        )
        store_rows(dx_ptr, offs_m, rows, dx_left, 0, LEFT, C)
        store_rows(dx_ptr, offs_m, rows, dx_right, LEFT, RIGHT, C)
        dweight_left += tl.sum(grad_left * z_left, 0)
        dweight_right += tl.sum(grad_right * z_right, 0)
        dbias_left += tl.sum(grad_left, 0)
        dbias_right += tl.sum(grad_right, 0)
    store_sums(partial_ptr, 0, dweight_left, dweight_right, C, LEFT, RIGHT)
    store_sums(partial_ptr, 1, dbias_left, dbias_right, C, LEFT, RIGHT)


def forward(x, weight, bias, eps):
    """x (rows, C) -> y in x's dtype, mean and rstd (rows, 1) fp32."""
    rows, columns = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(rows, 1, dtype=torch.float32, device=x.device) for _ in range(2))
    if rows > 0:
        setting = configs.rows("forward", columns)
        _forward_kernel[(triton.cdiv(rows, setting.block_m),)](
            x.contiguous(), weight.contiguous(), bias.contiguous(), y, mean, rstd, rows, eps,
            C=columns, **setting.launch(),
        )  # fmt: skip
    return y, mean, rstd


def backward(grad, x, weight, mean, rstd):
    """Gradients of x (in its dtype), weight and bias (in the weight's)."""
    rows, columns = x.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    setting = configs.rows("backward", columns)
    partial = partials(2, rows, setting, x)
    if rows > 0:
        _backward_kernel[(partial.shape[1],)](
            grad.contiguous(), x.contiguous(), weight.contiguous(), mean, rstd, dx, partial, rows,
            C=columns, **setting.launch(),
        )  # fmt: skip
    add_partials(partial, dweight, dbias)
    return dx, dweight, dbias
