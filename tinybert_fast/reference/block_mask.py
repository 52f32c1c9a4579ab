"""A boolean attention mask as lists of blocks, for kernels that visit no other.

A mask (N, N) is cut into blocks of ``side`` queries by ``side`` keys. A block is left out if it
allows nothing, full if it allows every pair of its positions below N, else partial. CSR lists the
blocks of each row of blocks, CSC those of each column: partial ones first, then full ones, each in
increasing order, so that sums have one order.

    offsets (M, 2 n + 1)  row r of mask m: partial entries offsets[m, 2 r] up to
                          offsets[m, 2 r + 1], full ones from there up to offsets[m, 2 r + 2]
    blocks (E,)           the entry's column of blocks (CSR) or row of blocks (CSC)
    tiles (E,)            the entry's place in ``cells``, -1 for a full one
    cells (P, side, side / 32)  a bit for each pair of a partial block: bit (j % 32) of word j // 32

with M masks, n = ceil(N / side), E entries of all masks; everything int32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast.reference.philox import WORD, philox

WORD_BITS = 32


class Conditions(NamedTuple):
    """When query i may attend to key j, of masks that are (size, size), in blocks of ``side``:

    |i - j| <= window, or their blocks are at most window_blocks apart, or i or j is global, or
    their block was drawn at random; or always, if ``everything``. And besides both are in one
    document, below the length of their mask, and allowed by ``dense``. None leaves out a condition.
    """

    size: int
    masks: int
    side: int
    everything: bool
    window: int  # -1: none, as window_blocks
    window_blocks: int
    global_tokens: Tensor | None  # bool (N,)
    random_blocks: int  # of a row of blocks, with no token that another rule lets it meet
    seed: int
    documents: Tensor | None  # int (M, N), increasing
    lengths: Tensor | None  # int64 (M,)
    dense: Tensor | None  # bool (M, N, N)


def conditions_met(c: Conditions, device: torch.device | str) -> Tensor:
    """Bool (M, N, N)."""
    at = torch.arange(c.size, device=device)
    i, j = at[:, None], at[None, :]
    met = torch.full((c.size, c.size), c.everything, device=device)
    if c.window >= 0:
        met |= (i - j).abs() <= c.window
    if c.window_blocks >= 0:
        met |= (i // c.side - j // c.side).abs() <= c.window_blocks
    if c.global_tokens is not None:
        met |= c.global_tokens[:, None] | c.global_tokens[None, :]
    if c.random_blocks:
        met |= _drawn_blocks(c, device)[i // c.side, j // c.side]
    met = met.expand(c.masks, -1, -1)
    if c.documents is not None:
        met = met & (c.documents[:, :, None] == c.documents[:, None, :])
    if c.lengths is not None:
        inside = at < c.lengths[:, None]
        met = met & inside[:, :, None] & inside[:, None, :]
    return met if c.dense is None else met & c.dense


def _drawn_blocks(c: Conditions, device: torch.device | str) -> Tensor:
    """Bool (n, n): the ``random_blocks`` key blocks of a row with the smallest (word, number)."""
    count = -(-c.size // c.side)
    r = torch.arange(count, device=device)[:, None].expand(count, count)
    near = (r - r.mT).abs()
    tokens = ((near - 1) * c.side + 1).clamp_min(0)  # between the nearest two
    open_ = (tokens > c.window) & (near > c.window_blocks)
    if c.global_tokens is not None:
        padded = F.pad(c.global_tokens, (0, count * c.side - c.size))
        open_ &= ~padded.view(count, c.side).any(1)
    zero = torch.zeros_like(r)
    key = (zero + (c.seed & WORD), zero + (c.seed >> 32 & WORD))
    words = philox((r.mT, r, zero, zero), key)[0].masked_fill(~open_, 1 << 32)
    chosen = torch.argsort(words, dim=1, stable=True)[:, : c.random_blocks]
    return torch.zeros_like(open_).scatter_(1, chosen, True) & open_


def block_mask(allowed: Tensor, side: int) -> list[Tensor]:
    """Bool (M, N, N) -> CSR offsets, blocks, tiles; CSC offsets, blocks, tiles; cells."""
    size = allowed.shape[1]
    count = -(-size // side)
    beyond = (0, count * side - size) * 2
    inside = _blocks(F.pad(allowed, beyond), side)
    outside = _blocks(F.pad(torch.ones_like(allowed), beyond), side).logical_not()
    some = inside.flatten(3).any(3)  # (M, n, n)
    full = (inside | outside).flatten(3).all(3) & some
    partial = some & ~full
    tile = torch.full(partial.shape, -1, device=allowed.device)
    tile[partial] = torch.arange(int(partial.sum()), device=allowed.device)
    by_query = _lists(partial, full, tile)
    by_key = _lists(partial.mT, full.mT, tile.mT)
    return [*by_query, *by_key, _words(inside[partial])]


def allowed_pairs(lists: list[Tensor], size: int) -> Tensor:
    """The bool (M, N, N) that ``block_mask`` was given."""
    offsets, blocks, tiles, *_, cells = lists
    masks, side = offsets.shape[0], cells.shape[1]
    count = -(-size // side)
    entries = torch.arange(len(blocks), device=blocks.device)
    segment = torch.searchsorted(offsets.flatten(), entries.int(), right=True) - 1
    mask, row = segment // offsets.shape[1], segment % offsets.shape[1] // 2
    out = torch.zeros(masks, count, count, side, side, dtype=torch.bool, device=cells.device)
    out[mask, row, blocks.long()] = tiles_of(cells)[tiles.long()]
    return out.transpose(2, 3).reshape(masks, count * side, count * side)[:, :size, :size]


def tiles_of(cells: Tensor) -> Tensor:
    """Bool (P + 1, side, side): the pairs of every partial block, and those of a full one last, so
    that ``tiles`` index it.
    """
    bit = torch.arange(WORD_BITS, dtype=torch.int32, device=cells.device)
    pairs = ((cells[..., None] >> bit) & 1).bool().flatten(2)
    return torch.cat([pairs, pairs.new_ones(1, *pairs.shape[1:])])


def _blocks(x: Tensor, side: int) -> Tensor:
    """(M, n side, n side) -> (M, n, n, side, side)."""
    count = x.shape[1] // side
    return x.unflatten(2, (count, side)).unflatten(1, (count, side)).transpose(2, 3)


def _lists(partial: Tensor, full: Tensor, tile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    kinds = torch.stack([partial, full], 2)  # (M, n, 2, n)
    mask, row, _, block = kinds.nonzero(as_tuple=True)
    stops = kinds.sum(3).flatten().cumsum(0).view(len(kinds), -1)  # (M, 2 n)
    ends = kinds.flatten(1).sum(1).cumsum(0)
    starts = F.pad(ends[:-1], (1, 0))[:, None]  # (M, 1): where the mask before ends
    offsets = torch.cat([starts, stops], 1)
    return offsets.int(), block.int(), tile[mask, row, block].int()


def _words(pairs: Tensor) -> Tensor:
    """Bool (P, side, side) -> int32 (P, side, side / 32)."""
    bit = torch.arange(WORD_BITS, device=pairs.device)
    words = (pairs.unflatten(2, (-1, WORD_BITS)).long() << bit).sum(3)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
