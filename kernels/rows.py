"""What the layer-norm kernels share: rows of C columns in two blocks, means, sums over all rows.

A block of Triton is a power of 2 wide. In a single one a row of 312 columns would leave 39 % of the
lanes idle, so every row is cut in two: 312 = 256 + 56 of 64, 768 = 512 + 256. C is known to the
compiler: from the offsets of rows it then sees that 16 bytes can be loaded at a time.

Sums over all rows (gradients of vectors) have two stages: each of a fixed number of programs walks
rows pid, pid + programs, ... and writes its fp32 sums; a second kernel adds those in order. So two
runs give the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinybert_fast.kernels import configs

SUMMED_ROWS = 64  # partial sums that the second stage loads at a time
SUMMED_COLUMNS = 32  # and how many columns of them


@triton.jit
def load_rows(ptr, offs_m, rows, FIRST: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """Columns from FIRST on in fp32, zero beyond the rows and beyond C: (BLOCK_M, BLOCK)."""
    offs_n = FIRST + tl.arange(0, BLOCK)
    live = offs_m[:, None] < rows
    if FIRST + BLOCK > C:
        live = live & (offs_n[None, :] < C)
    return tl.load(ptr + offs_m[:, None] * C + offs_n[None, :], mask=live, other=0.0).to(tl.float32)


@triton.jit
def store_rows(ptr, offs_m, rows, tile, FIRST: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """The reverse of load_rows; rounds to the operand's dtype."""
    offs_n = FIRST + tl.arange(0, BLOCK)
    live = offs_m[:, None] < rows
    if FIRST + BLOCK > C:
        live = live & (offs_n[None, :] < C)
    tl.store(ptr + offs_m[:, None] * C + offs_n[None, :], tile, mask=live)


@triton.jit
def load_columns(ptr, FIRST: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """A vector's columns from FIRST on in fp32, zero beyond C: (1, BLOCK)."""
    offs_n = FIRST + tl.arange(0, BLOCK)
    return tl.load(ptr + offs_n, mask=offs_n < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def store_columns(ptr, vector, FIRST: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """The columns of a vector (BLOCK,) from FIRST on."""
    offs_n = FIRST + tl.arange(0, BLOCK)
    tl.store(ptr + offs_n, vector, mask=offs_n < C)


@triton.jit
def load_places(sequences_ptr, positions_ptr, offs_m, rows):
    """Sequence and rank of each row, by which cells are dropped: two of (BLOCK_M,)."""
    sequence = tl.load(sequences_ptr + offs_m, mask=offs_m < rows, other=0)
    return sequence, tl.load(positions_ptr + offs_m, mask=offs_m < rows, other=0)


@triton.jit
def row_mean(left, right, C: tl.constexpr):
    """The mean of each row, whose dead columns hold zero: (BLOCK_M, 1)."""
    return ((tl.sum(left, 1) + tl.sum(right, 1)) * (1.0 / C))[:, None]


@triton.jit
def centre(tile, mean, FIRST: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr):
    """tile - mean, zero beyond C: a dead column would add mean**2 to the variance."""
    centred = tile - mean
    if FIRST + BLOCK > C:
        centred = tl.where((FIRST + tl.arange(0, BLOCK))[None, :] < C, centred, 0.0)
    return centred


@triton.jit
def normalise(left, right, eps, C: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr):
    """Both blocks as (x - mean) * rstd, and mean and rstd (BLOCK_M, 1). Two passes over x."""
    mean = row_mean(left, right, C)
    left, right = centre(left, mean, 0, LEFT, C), centre(right, mean, LEFT, RIGHT, C)
    rstd = tl.rsqrt(row_mean(left * left, right * right, C) + eps)
    return left * rstd, right * rstd, mean, rstd


@triton.jit
def load_normal(
    ptr, mean, rstd, offs_m, rows, FIRST: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr
):
    """The backward's (x - mean) * rstd of a block; anything beyond C, where the gradient is 0."""
    return (load_rows(ptr, offs_m, rows, FIRST, BLOCK, C) - mean) * rstd


@triton.jit
def input_gradient(
    grad_left, normal_left, weight_left, grad_right, normal_right, weight_right, rstd,
    C: tl.constexpr,
):  # fmt: skip
    """rstd * (g - mean(g) - z * mean(g * z)) of both blocks, g = grad * weight, z = normal."""
    g_left, g_right = grad_left * weight_left, grad_right * weight_right
    mean = row_mean(g_left, g_right, C)
    along = row_mean(g_left * normal_left, g_right * normal_right, C)
    return (
        rstd * (g_left - mean - normal_left * along),
        rstd * (g_right - mean - normal_right * along),
    )


@triton.jit
def store_sums(
    partial_ptr, which, left, right, C: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr
):
    """This program's part of sum number ``which``, for add_partials."""
    at = (which * tl.num_programs(0) + tl.program_id(0)) * C
    store_columns(partial_ptr + at, left, 0, LEFT, C)
    store_columns(partial_ptr + at, right, LEFT, RIGHT, C)


@triton.jit(do_not_specialize=["programs"])
def _add_kernel(
    partial_ptr, sums, programs, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    which = tl.program_id(1)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, programs, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        live = (offs_m[:, None] < programs) & (offs_n[None, :] < C)
        at = (which * programs + offs_m)[:, None] * C + offs_n[None, :]
        total += tl.load(partial_ptr + at, mask=live, other=0.0)
    for i in tl.static_range(len(sums)):
        if which == i:
            tl.store(sums[i] + offs_n, tl.sum(total, 0), mask=offs_n < C)


def add_partials(partial: Tensor, *sums: Tensor) -> None:
    """partial (sums, programs, C) fp32 -> each of ``sums`` (C,), in its own dtype; 0 of no program.

    A kernel and not ``partial.sum(1)``: one launch then serves all sums, their rounding included,
    and the results are tensors apart, as the outputs of a registered operator must be.
    """
    _, programs, columns = partial.shape
    _add_kernel[triton.cdiv(columns, SUMMED_COLUMNS), len(sums)](
        partial, sums, programs, C=columns, BLOCK_M=SUMMED_ROWS, BLOCK_N=SUMMED_COLUMNS
    )


def partials(sums: int, rows: int, setting: configs.RowSetting, like: Tensor) -> Tensor:
    """Room for the ``sums`` of each program of a backward kernel over the rows of ``like``."""
    blocks = triton.cdiv(rows, setting.block_m)
    programs = min(blocks, configs.row_programs(like.device))
    shape = (sums, programs, like.shape[-1])
    return torch.empty(shape, dtype=torch.float32, device=like.device)
