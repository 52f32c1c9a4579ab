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
def top_byte(threshold):
    """``threshold << 24``, uint32; in ``full``, as an argument of 1 is a constant without type."""
    return tl.full((), threshold, tl.uint32) << 24


@triton.jit
def attention_keep(
    key, sequence, head, first_m, first_n, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Which scores of a tile (BLOCK_M, BLOCK_N) are kept.

    The 16 bytes of a call go to the scores that one thread owns in a tensor-core tile. Written
    score by score: LLVM merges the calls of equal counters, so a thread draws once for 16.
    """
    i = first_m + tl.arange(0, BLOCK_M)[:, None]
    j = first_n + tl.arange(0, BLOCK_N)[None, :]
    row = (i >> 4) * 8 + (i & 7)
    group = (j >> 5) * 4 + ((j >> 1) & 3)
    zero = (row + group) * 0
    w0, w1, w2, w3 = tl.philox(key, group + zero, row + zero, head + zero, sequence + zero)
    word = (j >> 3) & 3
    chosen = tl.where(word < 2, tl.where(word == 0, w0, w1), tl.where(word == 2, w2, w3))
    byte = 2 * (j & 1) + ((i >> 3) & 1)
    # Compared as the top byte: what lies below it cannot change the answer.
    return (chosen << (24 - 8 * byte).to(tl.uint32)) >= top_byte(threshold)


@triton.jit
def draw(key, c0, c1, c2, c3):
    """Philox-4x32-10: ``tl.philox`` with 64-bit products, each one instruction and not two."""
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    c0, c1 = c0.to(tl.uint32, bitcast=True), c1.to(tl.uint32, bitcast=True)
    c2, c3 = c2.to(tl.uint32, bitcast=True), c3.to(tl.uint32, bitcast=True)
    for _ in tl.static_range(10):
        first, second = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c1 = (second >> 32).to(tl.uint32) ^ c1 ^ k0, second.to(tl.uint32)
        c2, c3 = (first >> 32).to(tl.uint32) ^ c3 ^ k1, first.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def hidden_keep(key, sequence, position, first_n, threshold, BLOCK_N: tl.constexpr):
    """Which of BLOCK_N columns from ``first_n`` on are kept in each row: (BLOCK_M, BLOCK_N).

    sequence, position: int32 (BLOCK_M,); ``first_n``, BLOCK_N: multiples of 8. Drawn once per 8
    columns, which one thread loads; two such threads share the 16 bytes of a call.
    """
    unit = first_n // 8 + tl.arange(0, BLOCK_N // 8)[None, :]
    i, b = position[:, None], sequence[:, None]
    zero = unit * 0 + i * 0
    w0, w1, w2, w3 = draw(key, (unit >> 1) + zero, i + zero, zero, b + zero)
    odd = (unit & 1) == 1
    low, high = tl.where(odd, w2, w0), tl.where(odd, w3, w1)  # (BLOCK_M, BLOCK_N / 8)
    column = tl.arange(0, 8)[None, None, :]
    word = tl.where(column < 4, low[:, :, None], high[:, :, None])
    # Compared as the top byte: what lies below it cannot change the answer.
    top = word << (24 - 8 * (column & 3)).to(tl.uint32)
    keep = top >= top_byte(threshold)
    return tl.reshape(keep, (position.shape[0], BLOCK_N))


@triton.jit
def drop(tiles, key, sequence, position, dropout, BLOCK_N: tl.constexpr):
    """Hidden rows, a tuple of tiles (BLOCK_M, BLOCK_N), after dropout."""
    kept: tl.tuple = ()
    for i in tl.static_range(len(tiles)):
        keep = hidden_keep(key, sequence, position, i * BLOCK_N, dropout.threshold, BLOCK_N)
        kept = kept + (tl.where(keep, tiles[i] * dropout.scale, 0.0),)
    return kept
