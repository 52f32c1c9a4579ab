"""Dropout masks from torch's own generator, 8 bits a cell, at the rates of reference/philox.py.

Philox in tensor arithmetic is hundreds of passes over a tensor on a CPU, and of launches on a GPU.
philox.py beside this file has the reference's own cells, from the compiled module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tinybert_fast.reference.philox import threshold

MIX = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)


def generator(seed: Tensor, site: int) -> torch.Generator:
    """A generator that replays: it depends on (seed, site) alone. Reads the seed on the host."""
    first, second = seed.tolist()
    mixed = (first * MIX[0] + second * MIX[1] + (site + 1) * MIX[2]) & (2**64 - 1)
    # The CPU's Mersenne twister takes 32 bits of its seed: fold the high half in.
    return torch.Generator(seed.device).manual_seed((mixed ^ (mixed >> 32)) & (2**63 - 1))


def draw_bytes(
    shape: torch.Size | tuple[int, ...], source: torch.Generator | None, device: torch.device
) -> Tensor:
    """Random uint8 ``shape``: 8 cells per 64-bit draw, where bernoulli_ draws for each cell."""
    count = math.prod(shape)
    words = torch.empty((count + 7) // 8, dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=source)
    return words.view(torch.uint8)[:count].view(shape)


class Cells:
    """What the forward and the backward of one place draw, in the same order."""

    def __init__(self, seed: Tensor, site: int):
        self.seed, self.site = seed, site
        self._source: torch.Generator | None = None

    def attention_keep(
        self, sequences: Sequence[int], heads: slice, first: int, tiles: Tensor | None,
        queries: int, keys: int, dropout_p: float, dtype,
    ) -> Tensor:  # fmt: skip
        """1 or 0 (sequences, heads, queries, keys)."""
        shape = (len(sequences), heads.stop - heads.start, queries, keys)
        if self._source is None:  # the backward draws the same again, on a GPU too
            self._source = generator(self.seed, self.site)
        return keep_mask(draw_bytes(shape, self._source, self.seed.device), dropout_p, dtype)

    def hidden(self, sequences: Tensor, positions: Tensor, columns: int) -> Tensor:
        """Random uint8 (rows, columns), which the backward is handed: a function of (seed, site) on
        a CPU; on a GPU the next of the device's generator, so that no seed is read on the host.
        """
        on_cpu = self.seed.device.type == "cpu"
        source = generator(self.seed, self.site) if on_cpu else None
        return draw_bytes((len(sequences), columns), source, self.seed.device)


def keep_mask(cells: Tensor, dropout_p: float, dtype: torch.dtype) -> Tensor:
    """1 where a random byte keeps its cell, else 0, in the dtype it will be multiplied with.

    A product of a float and a bool tensor on a CPU makes a float copy of the latter each time.
    """
    return cells.to(dtype).ge_(threshold(dropout_p))
