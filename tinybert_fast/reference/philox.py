"""Philox-4x32-10 in exact int64 arithmetic, and the dropout masks that are built on it.

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3". One call maps a 128-bit counter
and a 64-bit key to 128 random bits. A mask is a function of (seed, site, sequence, head, position,
column) alone, so every implementation, layout and tile size drops the same cells.

One call serves 16 cells, 8 bits each: a cell is kept when its byte is at least
``round(256 * p)``, and kept cells are scaled by the reciprocal of the exact keep rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LEVELS = 256  # a byte per cell
SMALLEST_RATE = 1 / (2 * LEVELS)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Four counter words and two key words (int64 tensors below 2^32) -> four random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1, c2, c3


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """The 64-bit product's two words, by halves: a product of two words overflows int64."""
    low, high = word & 0xFFFF, word >> 16
    first = low * constant
    second = high * constant + (first >> 16)
    return second >> 16, ((second & 0xFFFF) << 16) | (first & 0xFFFF)


def site_key(seed: Tensor, site: int) -> tuple[Tensor, Tensor]:
    """The key of one dropout site: Philox of (site, seed[1]) under seed[0]. seed: int64 (2,)."""
    low, high = seed & WORD, (seed >> 32) & WORD
    place = torch.full_like(low[0], site)
    words = philox((place, torch.zeros_like(place), low[1], high[1]), (low[0], high[0]))
    return words[0], words[1]


def threshold(dropout_p: float) -> int:
    """Bytes below it are dropped. ValueError for a rate that 8 bits cannot express."""
    if not SMALLEST_RATE < dropout_p < 1 - SMALLEST_RATE:  # those two would round to 0 and 1
        raise ValueError(
            f"dropout_p={dropout_p} cannot be expressed in 8 bits; use 0 or a rate above 1/512 and "
            "below 1 - 1/512"
        )
    return round(LEVELS * dropout_p)


def keep_scale(dropout_p: float) -> float:
    """The factor of kept cells: 1 / (the exact probability that a cell is kept)."""
    return LEVELS / (LEVELS - threshold(dropout_p))


def attention_keep(
    seed: Tensor, site: int, sequence: int, heads: int, queries: int, keys: int, dropout_p: float
) -> Tensor:
    """Which attention cells of one sequence are kept: bool (heads, queries, keys).

    The 16 bytes of a call cover rows i, i + 8 and columns j, j + 1, j + 8, ..., j + 25: the cells
    that one thread owns in a tensor-core tile, so that a kernel needs one call per 16 scores.
    """
    device = seed.device
    i = torch.arange(queries, device=device)[:, None]
    j = torch.arange(keys, device=device)[None, :]
    head = torch.arange(heads, device=device)[:, None, None]
    row = (i >> 4) * 8 + (i & 7) + 0 * j
    group = (j >> 5) * 4 + ((j >> 1) & 3) + 0 * i
    byte = 4 * ((j >> 3) & 3) + 2 * (j & 1) + ((i >> 3) & 1)
    counter = (group + 0 * head, row + 0 * head, head + 0 * row, torch.full_like(head, sequence))
    words = torch.stack(torch.broadcast_tensors(*philox(counter, site_key(seed, site))))
    return _byte(words, byte + 0 * head) >= threshold(dropout_p)


def hidden_keep(
    seed: Tensor, site: int, sequences: Tensor, positions: Tensor, columns: int, dropout_p: float
) -> Tensor:
    """Which hidden cells are kept: bool (rows, columns); a call covers 16 columns of a row."""
    group = torch.arange((columns + 15) // 16, device=seed.device)[None, :]
    sequence, position = sequences.long()[:, None], positions.long()[:, None]
    counter = torch.broadcast_tensors(group, position, torch.zeros_like(group), sequence)
    words = torch.stack(philox(counter, site_key(seed, site)), -1)  # (rows, groups, 4)
    cells = words[..., None] >> torch.arange(0, 32, 8, device=seed.device) & 0xFF
    return cells.flatten(1)[:, :columns] >= threshold(dropout_p)


def _byte(words: Tensor, byte: Tensor) -> Tensor:
    """Byte 0..15 of four stacked words (4, ...), least significant first."""
    word = words.gather(0, (byte >> 2)[None])[0]
    return (word >> (8 * (byte & 3))) & 0xFF
