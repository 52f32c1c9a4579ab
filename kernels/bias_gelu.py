"""y = u Phi(u),   u = x + bias,   Phi(u) = (1 + erf(u / sqrt 2)) / 2: the erf GELU behind a linear.

Backward:   dx = dy (Phi(u) + u phi(u)),   phi(u) = exp(-u^2 / 2) / sqrt(2 pi),
    dbias = sum(dx)   over all rows.

Shapes: x, y, dy, dx (rows, C), made contiguous; bias, dbias (C,). The sum u is formed again in the
backward, so nothing but x and bias is kept. Everything between load and store is fp32; each result
is rounded once, to its operand's dtype.
Source: Hendrycks & Gimpel 2016, arXiv:1606.08415.
"""

import math

import torch
import triton
import triton.language as tl

from tinybert_fast.kernels import configs
from tinybert_fast.kernels.attention.tiles import LOG2_E
from tinybert_fast.kernels.rows import add_partials

SQRT_HALF = tl.constexpr(math.sqrt(0.5))
MINUS_HALF_LOG2_E = tl.constexpr(-0.5 * LOG2_E)
PEAK = tl.constexpr(1.0 / math.sqrt(2.0 * math.pi))  # phi(0)
FAR = tl.constexpr(64.0)  # z whose Phi(-z) is 0


@triton.jit
def gelu(u, HALF: tl.constexpr):
    """u Phi(u); in half precision max(u, 0) - |u| Phi(-|u|), which chooses no side of 0."""
    if not HALF:
        return u * _normal_distribution(u, HALF)
    z = tl.minimum(tl.abs(u), FAR, propagate_nan=tl.PropagateNan.ALL)  # inf * 0 would be NaN
    return tl.maximum(u, 0.0) - z * _lower_tail(z)


@triton.jit
def _normal_distribution(u, HALF: tl.constexpr):
    """Phi(u)."""
    if not HALF:
        return 0.5 + 0.5 * tl.erf(u * SQRT_HALF)
    below = _lower_tail(tl.abs(u))
    return tl.where(u > 0.0, 1.0 - below, below)


@triton.jit
def _lower_tail(z):
    """Phi(-z) of z >= 0, for operands in half precision, by its log2, which is nearly a parabola: a
    polynomial fitted on 0 <= z <= 6 gives Phi(-z) to 8e-6 of itself, a hundredth of their rounding,
    in a third of erf's instructions. Beyond it falls to 0 faster than Phi(-z), which is below 1e-9.
    """
    log = 6.159835e-5 + z * -1.8348145e-6
    log = -9.305253e-4 + z * log
    log = 8.507892e-3 + z * log
    log = -5.3960074e-2 + z * log
    log = -4.5846438e-1 + z * log
    log = -1.1512511 + z * log
    return tl.exp2(-0.9999953 + z * log)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, bias_ptr, y_ptr, rows,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    live = (offs_m[:, None] < rows) & (offs_n[None, :] < C)
    at = offs_m[:, None] * C + offs_n[None, :]
    bias = tl.load(bias_ptr + offs_n, mask=offs_n < C, other=0.0).to(tl.float32)[None, :]
    u = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) + bias
    HALF: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    tl.store(y_ptr + at, gelu(u, HALF), mask=live)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad_ptr, x_ptr, bias_ptr, dx_ptr, partial_ptr, rows,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    ANSWERS: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = tl.load(bias_ptr + offs_n, mask=offs_n < C, other=0.0).to(tl.float32)[None, :]
    dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    HALF: tl.constexpr = x_ptr.dtype.element_ty.primitive_bitwidth == 16
    step = tl.num_programs(0) * BLOCK_M
    for first in tl.range(tl.program_id(0) * BLOCK_M, rows, step, num_stages=STAGES):
        offs_m = first + tl.arange(0, BLOCK_M).to(tl.int64)
        live = (offs_m[:, None] < rows) & (offs_n[None, :] < C)
        at = offs_m[:, None] * C + offs_n[None, :]
        u = tl.load(x_ptr + at, mask=live, other=0.0).to(tl.float32) + bias
        grad = tl.load(grad_ptr + at, mask=live, other=0.0).to(tl.float32)
        density = tl.exp2(u * u * MINUS_HALF_LOG2_E) * PEAK
        dx = grad * (_normal_distribution(u, HALF) + u * density)
        tl.store(dx_ptr + at, dx, mask=live)
        if ANSWERS:
            tl.store(grad_ptr + at, gelu(u, HALF), mask=live)
        dbias += dx
    columns_ptr = partial_ptr + tl.program_id(0) * C
    tl.store(columns_ptr + offs_n, tl.sum(dbias, 0), mask=offs_n < C)


def forward(x, bias):
    """x (rows, C) -> y in x's dtype."""
    rows, columns = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() > 0:
        setting = configs.ELEMENTWISE
        # Rows first: CUDA's second axis ends at 65,535 blocks.
        blocks = configs.cdiv(rows, setting.block_m), configs.cdiv(columns, setting.block_n)
        _forward_kernel[blocks](
            x.contiguous(), bias.contiguous(), y, rows, C=columns, **setting.launch()
        )
    return y


def backward(grad, x, bias):
    """Gradients of x and bias, in their dtypes."""
    return _backward(grad.contiguous(), x, bias, answers=False)


def backward_in_place(grad, x, bias):
    """The same; ``grad``, contiguous and in x's dtype, becomes the forward's answer."""
    return _backward(grad, x, bias, answers=True)


def _backward(grad, x, bias, *, answers):
    rows, columns = x.shape
    dx, dbias = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(bias)
    setting = configs.ELEMENTWISE
    across = configs.cdiv(columns, setting.block_n)
    blocks = configs.cdiv(rows, setting.block_m)
    programs = min(blocks, configs.cdiv(configs.row_programs(x.device), max(across, 1)))
    partial = torch.empty((1, programs, columns), dtype=torch.float32, device=x.device)
    if x.numel() > 0:
        _backward_kernel[programs, across](
            grad, x.contiguous(), bias.contiguous(), dx, partial, rows,
            C=columns, STAGES=configs.MOST_STAGES, ANSWERS=answers, **setting.launch(),
        )  # fmt: skip
    add_partials(partial, dbias)
    return dx, dbias
