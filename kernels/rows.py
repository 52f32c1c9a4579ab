"""What the layer-norm kernels share: rows of C columns as tuples of tiles, means, sums over rows.

A tile of Triton is a power of 2 wide. In a single one a row of 312 columns would leave 39 % of the
lanes idle, so a row is a tuple of equal, narrower tiles: 312 = 4 * 64 + 56, 768 = 3 * 256. C is
known to the compiler: from the offsets of rows it then sees that 16 bytes can be loaded at a time.

Sums over all rows (gradients of vectors) have two stages: each of a fixed number of programs walks
its rows and writes its fp32 sums; a second kernel adds those in order. So two runs give the same
bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinybert_fast.kernels import configs

# Partial sums that the second stage loads at a time, and how many columns of them: it waits for
# each load, so few tall ones; 32 bytes of a row are a whole sector of memory.
SUMMED_ROWS, SUMMED_COLUMNS, SUMMING_WARPS = 512, 8, 8


@triton.jit
def load_rows(ptr, offs_m, rows, C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows in fp32, zero beyond the last one and beyond C: tiles (BLOCK_M, BLOCK_N)."""
    return gather_rows(ptr, offs_m, offs_m < rows, C, BLOCK_N)


@triton.jit
def gather_rows(ptr, offs_m, live_m, C: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows ``offs_m`` (int64, any order) in fp32, zero where not ``live_m`` and beyond C."""
    tiles: tl.tuple = ()
    for first_n in tl.static_range(0, C, BLOCK_N):
        offs_n = first_n + tl.arange(0, BLOCK_N)
        live = live_m[:, None]
        if first_n + BLOCK_N > C:
            live = live & (offs_n[None, :] < C)
        at = offs_m[:, None] * C + offs_n[None, :]
        tiles = tiles + (tl.load(ptr + at, mask=live, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def store_rows(ptr, offs_m, rows, tiles, C: tl.constexpr, BLOCK_N: tl.constexpr):
    """The reverse of load_rows; rounds to the operand's dtype."""
    for i in tl.static_range(len(tiles)):
        offs_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
        live = offs_m[:, None] < rows
        if (i + 1) * BLOCK_N > C:
            live = live & (offs_n[None, :] < C)
        tl.store(ptr + offs_m[:, None] * C + offs_n[None, :], tiles[i], mask=live)


@triton.jit
def load_vector(ptr, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A vector (C,) in fp32, zero beyond C, the same in every row: tiles (BLOCK_M, BLOCK_N).

    Loaded by every row: lanes that ask for one address are served at once, while a tile of one row
    would be loaded in its own layout and then exchanged between threads.
    """
    tiles: tl.tuple = ()
    for first_n in tl.static_range(0, C, BLOCK_N):
        offs_n = tl.zeros((BLOCK_M, 1), tl.int32) + (first_n + tl.arange(0, BLOCK_N))[None, :]
        tiles = tiles + (tl.load(ptr + offs_n, mask=offs_n < C, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def load_place(sequences_ptr, positions_ptr, offs_m, rows):
    """Sequence and rank of each row, by which cells are dropped: two of (BLOCK_M,)."""
    sequence = tl.load(sequences_ptr + offs_m, mask=offs_m < rows, other=0)
    return sequence, tl.load(positions_ptr + offs_m, mask=offs_m < rows, other=0)


@triton.jit
def load_statistic(ptr, offs_m, rows):
    """mean or rstd of each row: (BLOCK_M, 1)."""
    return tl.load(ptr + offs_m, mask=offs_m < rows, other=0.0)[:, None]


@triton.jit
def store_statistic(ptr, offs_m, rows, statistic):
    """The reverse of load_statistic."""
    tl.store(ptr + offs_m[:, None], statistic, mask=offs_m[:, None] < rows)


@triton.jit
def add(a, b):
    """Sums of tiles."""
    sums: tl.tuple = ()
    for i in tl.static_range(len(a)):
        sums = sums + (a[i] + b[i],)
    return sums


@triton.jit
def multiply(a, b):
    """Products of tiles."""
    products: tl.tuple = ()
    for i in tl.static_range(len(a)):
        products = products + (a[i] * b[i],)
    return products


@triton.jit
def scaled(tiles, factor):
    """Tiles times a number."""
    products: tl.tuple = ()
    for i in tl.static_range(len(tiles)):
        products = products + (tiles[i] * factor,)
    return products


@triton.jit
def where_rows(keep, tiles):
    """The rows that ``keep`` (BLOCK_M, 1) names, the others zero."""
    kept: tl.tuple = ()
    for i in tl.static_range(len(tiles)):
        kept = kept + (tl.where(keep, tiles[i], 0.0),)
    return kept


@triton.jit
def row_mean(tiles, C: tl.constexpr):
    """The mean of each row, whose dead columns hold zero: (BLOCK_M, 1)."""
    total = tl.sum(tiles[0], 1)
    for i in tl.static_range(1, len(tiles)):
        total += tl.sum(tiles[i], 1)
    return (total * (1.0 / C))[:, None]


@triton.jit
def centre(tiles, mean, C: tl.constexpr, BLOCK_N: tl.constexpr):
    """x - mean, zero beyond C: a dead column would add mean**2 to the variance."""
    centred: tl.tuple = ()
    for i in tl.static_range(len(tiles)):
        tile = tiles[i] - mean
        if (i + 1) * BLOCK_N > C:
            tile = tl.where((i * BLOCK_N + tl.arange(0, BLOCK_N))[None, :] < C, tile, 0.0)
        centred = centred + (tile,)
    return centred


@triton.jit
def normalise(tiles, eps, C: tl.constexpr, BLOCK_N: tl.constexpr):
    """z = (x - mean) * rstd as tiles, mean and rstd (BLOCK_M, 1). All passes over registers.

    The mean is rounded like a sum of C numbers. What that leaves is taken off in a second pass:
    else a constant row, whose variance is 0, would be nothing but this error, times 1e6.
    """
    mean = row_mean(tiles, C)
    centred = centre(tiles, mean, C, BLOCK_N)
    left_over = row_mean(centred, C)
    centred = centre(centred, left_over, C, BLOCK_N)
    rstd = tl.rsqrt(row_mean(multiply(centred, centred), C) + eps)
    normal: tl.tuple = ()
    for i in tl.static_range(len(tiles)):
        normal = normal + (centred[i] * rstd,)
    return normal, mean + left_over, rstd


@triton.jit
def renormalise(tiles, mean, rstd):
    """The backward's z. Beyond C it is anything: the gradient that it meets there is 0."""
    normal: tl.tuple = ()
    for i in tl.static_range(len(tiles)):
        normal = normal + ((tiles[i] - mean) * rstd,)
    return normal


@triton.jit
def input_gradient(grad, normal, weight, rstd, C: tl.constexpr):
    """rstd * (g - mean(g) - z * mean(g * z)) as tiles, with g = grad * weight and z = normal."""
    g = multiply(grad, weight)
    mean = row_mean(g, C)
    along = row_mean(multiply(g, normal), C)
    gradient: tl.tuple = ()
    for i in tl.static_range(len(g)):
        gradient = gradient + (rstd * (g[i] - mean - normal[i] * along),)
    return gradient


@triton.jit
def zeros(C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles to add gradients to; their rows are summed once, by store_sum."""
    tiles: tl.tuple = ()
    for _ in tl.static_range(0, C, BLOCK_N):
        tiles = tiles + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    return tiles


@triton.jit
def store_sum(partial_ptr, which, tiles, C: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's part of sum number ``which``, for add_partials."""
    row_ptr = partial_ptr + (which * tl.num_programs(0) + tl.program_id(0)) * C
    for i in tl.static_range(len(tiles)):
        offs_n = i * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(row_ptr + offs_n, tl.sum(tiles[i], 0), mask=offs_n < C)


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
    _add_kernel[configs.cdiv(columns, SUMMED_COLUMNS), len(sums)](
        partial, sums, programs, C=columns, BLOCK_M=SUMMED_ROWS, BLOCK_N=SUMMED_COLUMNS,
        num_warps=SUMMING_WARPS, **configs.COMPILED,
    )  # fmt: skip


def partials(sums: int, rows: int, setting: configs.RowSetting, like: Tensor) -> Tensor:
    """Room for the ``sums`` of each program of a backward kernel over the rows of ``like``."""
    blocks = configs.cdiv(rows, setting.block_m)
    programs = min(blocks, configs.row_programs(like.device))
    shape = (sums, programs, like.shape[-1])
    return torch.empty(shape, dtype=torch.float32, device=like.device)
