"""The dropout masks of reference/philox.py on a CPU, from the compiled module."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinybert_fast.ops import native
from tinybert_fast.reference.philox import threshold


class Cells:
    """As random.Cells; in any order, since a cell is a function of its place."""

    def __init__(self, seed: Tensor, site: int):
        self.seed, self.site = seed, site

    def attention_keep(
        self, sequences: Sequence[int], heads: slice, first: int, tiles: Tensor | None,
        queries: int, keys: int, dropout_p: float, dtype,
    ) -> Tensor:  # fmt: skip
        """1 or 0 (sequences, heads, queries, keys): of the queries from ``first`` on, and of the
        keys of these tiles of 32, or of all from 0 on.
        """
        if tiles is None:
            tiles = torch.arange(-(-keys // native.TILE), device="cpu")
        numbers, bound = torch.tensor(sequences, device="cpu"), threshold(dropout_p)
        keep = native.attention_keep(
            self.seed, self.site, numbers, heads, first, queries, tiles, keys, bound
        )
        return keep.to(dtype)

    def hidden(self, sequences: Tensor, positions: Tensor, columns: int) -> Tensor:
        """Random uint8 (rows, columns)."""
        return native.hidden_cells(self.seed, self.site, sequences, positions, columns)
