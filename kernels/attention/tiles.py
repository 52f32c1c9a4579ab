"""What the attention kernels share: operands, tiles of rows, which scores count."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinybert_fast.reference import philox

LOG2_E = math.log2(math.e)


class Rows(NamedTuple):
    """An operand (T, H, D) as a kernel takes it: address, and strides in elements."""

    ptr: Tensor
    row: int
    head: int

    @classmethod
    def of(cls, x: Tensor) -> "Rows":
        return cls(x, x.stride(0), x.stride(1))


class Dropout(NamedTuple):
    """Bytes below ``threshold`` drop a score, kept ones are multiplied by ``scale``."""

    seed: Tensor | None
    threshold: int
    scale: float

    @classmethod
    def of(cls, rate: float, seed: Tensor | None) -> "Dropout":
        if rate == 0.0:
            return cls(None, 0, 1.0)
        return cls(seed, philox.threshold(rate), philox.keep_scale(rate))


def neighbours(x: Tensor) -> Tensor:
    """The D numbers of a head side by side, as every model hands them over."""
    return x if x.stride(-1) == 1 else x.contiguous()


def grid(cu_seqlens: Tensor, max_length: int, block: int, heads: int) -> tuple[int, int]:
    """One program per (sequence, block of its rows) and head."""
    return (len(cu_seqlens) - 1) * triton.cdiv(max_length, block), heads


@triton.jit
def place(cu_seqlens_ptr, max_length, BLOCK: tl.constexpr):
    """This program's (sequence, first row of its block, start, length of the sequence)."""
    blocks = tl.cdiv(max_length, BLOCK)
    sequence = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    start = tl.load(cu_seqlens_ptr + sequence)
    return sequence, first, start.to(tl.int64), tl.load(cu_seqlens_ptr + sequence + 1) - start


@triton.jit
def head_of(x, start, head):
    """Address of the first row of a sequence in one head of ``x: Rows``."""
    return x.ptr + start * x.row + head.to(tl.int64) * x.head


@triton.jit
def load_tile(ptr, stride_row, offs, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of one head, zero beyond the sequence and beyond D: (BLOCK, BLOCK_D)."""
    offs_d = tl.arange(0, BLOCK_D)
    live = offs[:, None] < length
    if D < BLOCK_D:
        live = live & (offs_d[None, :] < D)
    return tl.load(ptr + offs[:, None] * stride_row + offs_d[None, :], mask=live, other=0.0)


@triton.jit
def store_tile(ptr, stride_row, offs, length, tile, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The reverse of load_tile; rounds to the operand's dtype."""
    offs_d = tl.arange(0, BLOCK_D)
    live = (offs[:, None] < length) & (offs_d[None, :] < D)
    tl.store(ptr + offs[:, None] * stride_row + offs_d[None, :], tile, mask=live)


@triton.jit
def live_scores(offs_m, offs_n, length, DIRECTION: tl.constexpr):
    """Which scores of a tile count: (BLOCK_M, BLOCK_N)."""
    i, j = offs_m[:, None], offs_n[None, :]
    live = (i < length) & (j < length)
    if DIRECTION == "causal":
        live = live & (j <= i)
    elif DIRECTION == "anti_causal":
        live = live & (j >= i)
    return live


@triton.jit
def key_ranges(
    first, length, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIRECTION: tl.constexpr
):
    """Keys that a block of queries needs: with a mask [low, full_low), whole blocks without one
    [full_low, full_high), with a mask [full_high, high).
    """
    low, full_low, full_high, high = 0, 0, length // BLOCK_N * BLOCK_N, length
    if DIRECTION == "causal":
        full_high = tl.minimum(full_high, (first + 1) // BLOCK_N * BLOCK_N)
        high = tl.minimum(first + BLOCK_M, length)
    elif DIRECTION == "anti_causal":
        low = first // BLOCK_N * BLOCK_N
        full_low = tl.cdiv(first + BLOCK_M - 1, BLOCK_N) * BLOCK_N
        full_high = tl.maximum(full_high, full_low)
    return low, full_low, full_high, high
