"""Block-sparse attention masks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tinybert_fast.reference.block_mask import allowed_pairs
from tinybert_fast.reference.block_mask import block_mask as reference

SIDES = (64, 128)  # of a block, in tokens


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Which tokens may attend to which, as lists of blocks: ``attention(..., block_mask=)``.

    Attributes:
        size: N, the longest sequence it serves; token ranks index it.
        lists: the seven tensors of ``reference/block_mask.py``, for one mask or one per sequence.
    """

    size: int
    lists: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        alike = len({(x.dtype, x.device) for x in self.lists}) == 1 and len(self.lists) == 7
        if not alike or self.lists[0].dtype != torch.int32 or self.lists[6].shape[1] not in SIDES:
            raise ValueError(
                f"a BlockMask holds seven int32 tensors on one device, cells of blocks of {SIDES} "
                f"last; got {', '.join(f'{x.dtype} {tuple(x.shape)}' for x in self.lists)}. Make "
                "one with BlockMask.from_dense"
            )

    @classmethod
    def from_dense(cls, allowed: Tensor, side: int = 64) -> BlockMask:
        """From bool (N, N), or (B, N, N) for a mask per sequence; True where attention is allowed.

        Raises:
            ValueError: another dtype or shape, or a side that is not 64 or 128.
        """
        square = allowed.dim() in (2, 3) and allowed.shape[-1] == allowed.shape[-2]
        if allowed.dtype != torch.bool or not square:
            raise ValueError(
                "block_mask: expected bool (N, N) or (B, N, N); got "
                f"{allowed.dtype} {tuple(allowed.shape)}"
            )
        if side not in SIDES:
            raise ValueError(f"block_mask: side={side} is not one of {SIDES}")
        whole = allowed if allowed.dim() == 3 else allowed[None]
        return cls(allowed.shape[-1], tuple(reference(whole, side)))

    def to(self, device: torch.device | str) -> BlockMask:
        """The same on another device."""
        return BlockMask(self.size, tuple(x.to(device) for x in self.lists))

    @property
    def masks(self) -> int:
        """1 for a mask that all sequences share, else the number of sequences."""
        return self.lists[0].shape[0]

    @property
    def dense(self) -> Tensor:
        """Bool (M, N, N), made anew."""
        return allowed_pairs(list(self.lists), self.size)
