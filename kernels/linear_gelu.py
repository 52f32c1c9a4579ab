"""y = u Phi(u),   u = x @ weight.mT + bias: a linear layer and its erf GELU in one kernel.

For where nobody wants a gradient, which needs x @ weight.mT again. Phi: bias_gelu.py.

Shapes: x (rows, K), weight (C, K), y (rows, C), in half precision; bias (C,). The product is summed
in fp32, and so is what follows; y is rounded once. K and C are multiples of 8, for TMA, which loads
0 beyond a tensor's end and stores nothing there. What else there is takes cuBLAS's product and
bias_gelu's kernel.

Or all three in e4m3, with fp32 scales of rows, (rows,), (C,) and (rows,): each number times its
row's scale is what is meant. K and C are multiples of 16.

A program takes tile after tile and loads the next one's operands while it finishes one (flatten).
With two programs on an SM, the tensor cores work for one while the other is at its GELU.
Source: Hendrycks & Gimpel 2016, arXiv:1606.08415; the form of the loop, Triton's tutorial of
persistent products.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tinybert_fast.kernels import bias_gelu, configs
from tinybert_fast.kernels.bias_gelu import gelu


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_tma, weight_tma, bias_ptr, y_tma, rows, scales,
    C: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    ACROSS: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles = tl.cdiv(rows, BLOCK_M) * ACROSS
    # A count of its own, so that no place of a tile is kept while the next one is loaded.
    stored = tl.program_id(0) - tl.num_programs(0)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=True):
        row, column = tile // ACROSS * BLOCK_M, tile % ACROSS * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in range(STEPS):
            x = x_tma.load([row, step * BLOCK_K])  # (BLOCK_M, BLOCK_K)
            weight = weight_tma.load([column, step * BLOCK_K])  # (BLOCK_N, BLOCK_K)
            total = tl.dot(x, weight.T, total)
        stored += tl.num_programs(0)
        row, column = stored // ACROSS * BLOCK_M, stored % ACROSS * BLOCK_N
        _store(total, bias_ptr, y_tma, rows, scales, row, column, C, BLOCK_M, BLOCK_N, PARTS)


@triton.jit
def _store(
    total, bias_ptr, y_tma, rows, scales, row, column,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """gelu(total + bias), in parts of the columns: less shared memory on its way out."""
    if PARTS == 1:
        offs_n = column + tl.arange(0, BLOCK_N)
        bias = tl.load(bias_ptr + offs_n, mask=offs_n < C, other=0.0).to(tl.float32)
        if scales is None:
            y = gelu(total + bias[None, :], True)
        else:
            offs_m = row + tl.arange(0, BLOCK_M)
            of_x = tl.load(scales[0] + offs_m, mask=offs_m < rows, other=0.0)
            of_weight = tl.load(scales[1] + offs_n, mask=offs_n < C, other=0.0)
            of_y = tl.load(scales[2] + offs_m, mask=offs_m < rows, other=1.0)
            u = total * of_x[:, None] * of_weight[None, :] + bias[None, :]
            y = gelu(u, True) * (1.0 / of_y)[:, None]
        y_tma.store([row, column], y)
    else:
        HALF_N: tl.constexpr = BLOCK_N // 2
        low, high = total.reshape((BLOCK_M, 2, HALF_N)).permute((0, 2, 1)).split()
        _store(low, bias_ptr, y_tma, rows, scales, row, column, C, BLOCK_M, HALF_N, PARTS // 2)
        column += HALF_N
        _store(high, bias_ptr, y_tma, rows, scales, row, column, C, BLOCK_M, HALF_N, PARTS // 2)


def forward(x, weight, bias):
    """x (rows, K), weight (C, K) -> y (rows, C) in x's dtype."""
    setting = configs.linear_gelu(x, weight.shape[0])
    if setting is None:
        return bias_gelu.forward(F.linear(x, weight), bias)
    return _launch(setting, x, weight, bias, None)


def forward_fp8(x, x_scale, weight, weight_scale, bias, y_scale):
    """x (rows, K), weight (C, K) -> y (rows, C), all in e4m3, with the scales of their rows."""
    # That of rows in half precision with as many bytes, so of half as many numbers.
    setting = configs.linear_gelu(x.view(torch.float16), weight.shape[0])
    setting = setting._replace(block_k=2 * setting.block_k)
    return _launch(setting, x, weight, bias, (x_scale, weight_scale, y_scale))


def _launch(setting, x, weight, bias, scales):
    (rows, inputs), columns = x.shape, weight.shape[0]
    block_m, block_n, block_k, parts, *_, programs = setting
    y = torch.empty((rows, columns), dtype=x.dtype, device=x.device)
    tiles = configs.cdiv(rows, block_m) * configs.cdiv(columns, block_n)
    described = TensorDescriptor.from_tensor
    _forward_kernel[min(tiles, programs * configs.processors(x.device)),](
        described(_aligned(x), [block_m, block_k]),
        described(_aligned(weight), [block_n, block_k]),
        bias.contiguous(),
        described(y, [block_m, block_n // parts]),
        rows,
        scales,
        C=columns,
        K=inputs,
        **setting.launch(),
    )
    return y


def _aligned(x):
    """As TMA takes it."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % configs.TMA_BYTES else x
