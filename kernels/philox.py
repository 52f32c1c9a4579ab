"""Dropout masks inside a kernel: the cells of reference/philox.py, byte for byte."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from tinybert_fast.reference import philox


class Dropout(NamedTuple):
    """Bytes below ``threshold`` drop a cell, kept ones are multiplied by ``scale``."""

    seed: Tensor | None
    threshold: int
    scale: float

    @classmethod
    def of(cls, rate: float, seed: Tensor | None) -> "Dropout":
        if rate == 0.0:
            return cls(None, 0, 1.0)
        return cls(seed, philox.threshold(rate), philox.keep_scale(rate))


@triton.jit
def site_key(seed_ptr, site):
    """The key of one dropout site, uint64: Philox of (site, 0, seed[1]) under seed[0]."""
    second = tl.load(seed_ptr + 1).to(tl.uint64, bitcast=True)
    place = tl.full((), site, tl.uint32)
    low, high, _, _ = tl.philox(
        tl.load(seed_ptr), place, place * 0, second.to(tl.uint32), (second >> 32).to(tl.uint32)
    )
    return low.to(tl.uint64) | (high.to(tl.uint64) << 32)


@triton.jit
def attention_keep(key, sequence, head, offs_m, offs_n, threshold):
    """Which scores of a tile (BLOCK_M, BLOCK_N) are kept.

    The 16 bytes of a call go to the scores that one thread owns in a tensor-core tile. Written
    score by score: LLVM merges the calls of equal counters, so a thread draws once for 16.
    """
    i, j = offs_m[:, None], offs_n[None, :]
    row = (i >> 4) * 8 + (i & 7)
    group = (j >> 5) * 4 + ((j >> 1) & 3)
    zero = (row + group) * 0
    w0, w1, w2, w3 = tl.philox(key, group + zero, row + zero, head + zero, sequence + zero)
    word = (j >> 3) & 3
    chosen = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    byte = 2 * (j & 1) + ((i >> 3) & 1)
    # Compared as the top byte: what lies below it cannot change the answer.
    return (chosen << (24 - 8 * byte).to(tl.uint32)) >= (threshold << 24).to(tl.uint32)


@triton.jit
def hidden_keep(key, sequence, position, first_n, threshold, BLOCK: tl.constexpr):
    """Which of BLOCK columns from ``first_n`` on are kept in each row: (BLOCK_M, BLOCK).

    sequence, position: int32 (BLOCK_M,). Written cell by cell: LLVM merges the calls of equal
    counters, so a thread draws once for the neighbouring columns that it loads.
    """
    offs_n = first_n + tl.arange(0, BLOCK)[None, :]
    zero = offs_n * 0 + position[:, None] * 0
    w0, w1, w2, w3 = tl.philox(
        key, (offs_n >> 4) + zero, position[:, None] + zero, zero, sequence[:, None] + zero
    )
    word, byte = (offs_n >> 2) & 3, offs_n & 3
    chosen = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    # Compared as the top byte: what lies below it cannot change the answer.
    return (chosen << (24 - 8 * byte).to(tl.uint32)) >= (threshold << 24).to(tl.uint32)
