"""Launch settings: tile sizes, warps and pipeline stages of every kernel.

Chosen by what ptxas says for sm_80, sm_90 and sm_100 (no spill in fp16 and bf16) and not yet by a
GPU's clock.
"""

from functools import cache
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


class RowSetting(NamedTuple):
    """Rows that a program of a layer-norm kernel holds, and the two blocks that a row is cut into."""

    block_m: int
    left: int
    right: int
    num_warps: int

    def launch(self) -> dict[str, int]:
        """As a kernel's keyword arguments."""
        return {
            "BLOCK_M": self.block_m,
            "LEFT": self.left,
            "RIGHT": self.right,
            "num_warps": self.num_warps,
        }


# Numbers of an operand that a warp holds at a time. They are widened to fp32, so the operands' dtype
# does not matter. A backward holds two operands and its sums besides.
ROW_TILE = {"forward": 1536, "backward": 768}
MOST_ROWS = 16
# One warp a program while it can hold a row: then a row's sums need no barrier.
COLUMNS_OF_A_WARP = 1024
ROWS_INTERPRETED = 2  # so that few rows have several blocks
PROGRAMS_PER_SM = 8
PROGRAMS_INTERPRETED = 2  # so that a program walks several blocks


def rows(kernel: str, columns: int) -> RowSetting:
    """The setting of one layer-norm kernel for rows of ``columns`` numbers."""
    whole = triton.next_power_of_2(columns)
    left = max(whole // 2, 1)
    right = triton.next_power_of_2(max(columns - left, 1))
    fitting = max(ROW_TILE[kernel] // (left + right), 1)
    block_m = min(1 << (fitting.bit_length() - 1), MOST_ROWS)
    if INTERPRETED:
        block_m = ROWS_INTERPRETED
    return RowSetting(block_m, left, right, max(whole // COLUMNS_OF_A_WARP, 1))


@cache
def row_programs(device: torch.device) -> int:
    """Programs of a kernel that sums over all rows; also how many partial sums there are."""
    if INTERPRETED:
        return PROGRAMS_INTERPRETED
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
