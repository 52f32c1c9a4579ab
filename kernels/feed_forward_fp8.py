"""y = g W2^T + b2,   g = [gelu(u)],   u = [x] W1^T + b1: a feed-forward block of 8-bit floats.

[ ] and the scales of its rows: reference/feed_forward_fp8.py. Three kernels: rows of x are rounded,
and both scales of each found; linear_gelu's makes the first product, its GELU and the rounding of
that; the second is PyTorch's, scaled by rows (CUTLASS's or cuBLAS's).

Shapes: x (rows, K), made contiguous; W1 (F, K), W2 (C, F) e4m3 with scales (F,), (C,) fp32; b1
(F,), b2 (C,); reach (2,) fp32; y (rows, C) in x's dtype, rounded to bf16 before. K, F and C are
multiples of 16, for TMA. Sums are fp32 registers of the tensor cores, which keep about 14 bits of a
product of e4m3: less than a tenth of what rounding to e4m3 costs.
Source: Micikevicius et al. 2022, arXiv:2209.05433.
"""

import torch
import triton
import triton.language as tl

from tinybert_fast.kernels import configs, linear_gelu
from tinybert_fast.kernels.rows import load_rows, multiply, row_mean, scaled, store_rows
from tinybert_fast.kernels.rows import store_statistic as store_scale

E4M3 = torch.float8_e4m3fn
# As in the reference: the largest number of e4m3, what stands for that of a row of zeros, and how
# much longer than x its rounded row may be.
LARGEST, TINY, SLACK = tl.constexpr(448.0), tl.constexpr(1e-12), tl.constexpr(1.07)
# PyTorch's product may read the scales of rows up to a multiple of its tiles.
SCALES = 256


@triton.jit(do_not_specialize=["rows"])
def _round_kernel(
    x_ptr, reach_ptr, rounded_ptr, scale_ptr, wide_scale_ptr, rows,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    x = load_rows(x_ptr, offs_m, rows, C, BLOCK_N)
    largest = tl.maximum(_row_largest(x), TINY)
    factor = tl.div_rn(tl.full((BLOCK_M, 1), LARGEST, tl.float32), largest)
    store_rows(rounded_ptr, offs_m, rows, scaled(x, factor), C, BLOCK_N)
    store_scale(scale_ptr, offs_m, rows, largest * (1.0 / LARGEST))
    length = tl.sqrt(row_mean(multiply(x, x), C) * C)
    bound = SLACK * length * tl.load(reach_ptr) + tl.load(reach_ptr + 1)
    store_scale(wide_scale_ptr, offs_m, rows, tl.maximum(bound, TINY) * (1.0 / LARGEST))


@triton.jit
def _row_largest(tiles):
    """max|x| of each row: (BLOCK_M, 1)."""
    largest = tl.max(tl.abs(tiles[0]), 1)
    for i in tl.static_range(1, len(tiles)):
        largest = tl.maximum(largest, tl.max(tl.abs(tiles[i]), 1))
    return largest[:, None]


def forward(x, inner, inner_scale, inner_bias, outer, outer_scale, outer_bias, reach):
    """x (rows, K) -> y (rows, C) in x's dtype."""
    if x.shape[0] == 0:
        return x.new_empty(0, outer.shape[0])
    rows, scale, wide_scale = rounded(x, reach)
    expanded = linear_gelu.forward_fp8(rows, scale, inner, inner_scale, inner_bias, wide_scale)
    return _product(expanded, wide_scale, outer, outer_scale, outer_bias).to(x.dtype)


def rounded(x, reach):
    """x (rows, K) -> e4m3 (rows, K), and fp32 (rows,) the scales of its rows and of GELU's."""
    rows, columns = x.shape
    y = torch.empty(x.shape, dtype=E4M3, device=x.device)
    room = configs.cdiv(rows, SCALES) * SCALES
    scales = (torch.empty(room, dtype=torch.float32, device=x.device) for _ in range(2))
    scale, wide_scale = (s[:rows] for s in scales)
    setting = configs.rows("forward", columns)
    _round_kernel[(configs.cdiv(rows, setting.block_m),)](
        x.contiguous(), reach, y, scale, wide_scale, rows, C=columns, **setting.launch()
    )
    return y, scale, wide_scale


def _product(x, scale, weight, weight_scale, bias):
    """y = (x W^T) scale weight_scale + bias, in bf16: x, W e4m3, scales of their rows."""
    if configs.INTERPRETED:  # PyTorch has no such product of CPU tensors
        y = x.float() @ weight.float().mT * scale[:, None] * weight_scale + bias
        return y.to(torch.bfloat16)
    return torch._scaled_mm(
        x,
        weight.mT,
        scale_a=scale[:, None],
        scale_b=weight_scale[None, :],
        bias=bias.to(torch.bfloat16),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
