"""Launch settings: tile sizes, warps and pipeline stages of every kernel.

Chosen by what ptxas says for sm_80, sm_90 and sm_100 (no spill in fp16 and bf16) and not yet by a
GPU's clock.
"""

from typing import NamedTuple

import torch
import triton

from tinybert_fast.ops.dispatch import INTERPRETED


class Setting(NamedTuple):
    """A tile of scores (BLOCK_M queries, BLOCK_N keys) and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def launch(self) -> dict[str, int]:
        """As a kernel's keyword arguments."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# Pass -> width of the tile's head dimension -> setting, for fp16 and bf16.
ATTENTION = {
    "forward": {
        32: Setting(64, 64, 4, 2),
        64: Setting(128, 64, 8, 2),
        128: Setting(128, 64, 8, 2),
    },
    "dq": {
        32: Setting(64, 64, 4, 2),
        64: Setting(64, 64, 4, 2),
        128: Setting(64, 64, 8, 2),
    },
    "dkdv": {
        32: Setting(64, 64, 4, 2),
        64: Setting(64, 64, 4, 2),
        128: Setting(64, 64, 8, 2),
    },
}
ATTENTION_FP32 = Setting(32, 32, 4, 1)  # no tensor core: small tiles keep it out of the stack
ATTENTION_INTERPRETED = Setting(32, 32, 1, 1)  # so that short sequences have several blocks

# The backward that holds all scores of a head: side of its tile -> setting, for heads up to 64.
ONE_TILE = {64: Setting(64, 64, 4, 1), 128: Setting(128, 128, 8, 1)}
ONE_TILE_INTERPRETED = {32: Setting(32, 32, 1, 1)}
ONE_TILE_WIDEST_HEAD = 64

SMALLEST_DOT = 16  # of tl.dot, each dimension


def head_block(width: int) -> int:
    """The width of a tile that holds a head: a power of 2."""
    return max(triton.next_power_of_2(width), SMALLEST_DOT)


def attention(
    kernel: str, dtype: torch.dtype, width: int, block_mask: list[torch.Tensor]
) -> Setting:
    """The setting of one attention kernel for heads of ``width`` numbers."""
    setting = ATTENTION[kernel][max(head_block(width), 32)]
    if INTERPRETED:
        setting = ATTENTION_INTERPRETED
    elif dtype == torch.float32:
        setting = ATTENTION_FP32
    if block_mask:  # a tile of scores is a block of the mask
        side = block_mask[-1].shape[1]
        setting = setting._replace(block_m=side, block_n=side)
    return setting


def one_tile(
    dtype: torch.dtype, width: int, max_length: int, block_mask: list[torch.Tensor]
) -> Setting | None:
    """The setting of the backward that holds all scores of a head, or None where none fits."""
    if block_mask or width > ONE_TILE_WIDEST_HEAD or (dtype == torch.float32 and not INTERPRETED):
        return None
    table = ONE_TILE_INTERPRETED if INTERPRETED else ONE_TILE
    return next((table[side] for side in sorted(table) if max_length <= side), None)
