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

SMALLEST_DOT = 16  # of tl.dot, each dimension


def head_block(width: int) -> int:
    """The width of a tile that holds a head: a power of 2."""
    return max(triton.next_power_of_2(width), SMALLEST_DOT)


def attention(kernel: str, dtype: torch.dtype, width: int) -> Setting:
    """The setting of one attention kernel for heads of ``width`` numbers."""
    if INTERPRETED:
        return ATTENTION_INTERPRETED
    if dtype == torch.float32:
        return ATTENTION_FP32
    return ATTENTION[kernel][max(head_block(width), 32)]
