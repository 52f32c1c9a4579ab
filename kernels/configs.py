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
    """Rows that a program of a layer-norm kernel holds at a time, as tiles (BLOCK_M, BLOCK_N)."""

    block_m: int
    block_n: int
    num_warps: int

    def launch(self) -> dict[str, int]:
        """As a kernel's keyword arguments."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.num_warps}


# Neighbouring numbers that a thread loads, 16 bytes in half precision, and whose dropout it draws
# at once (philox.hidden_keep). Widened to fp32, so the dtype does not matter to what follows.
LOADED = 8
WARP = 32 * LOADED
ONE_WARP = 1024  # columns that one warp holds: a row's sums then need no barrier
COLUMNS_OF_A_WARP = 512  # of wider rows
# Widths of a tile to choose from, for one warp. A backward keeps sums of its tiles: narrow tiles
# would cost it registers, as a thread holds as many columns as it has tiles.
TILE_WIDTHS = {"forward": (64, 128, 256), "backward": (128, 256)}
NUMBERS_OF_A_THREAD = {"forward": 48, "backward": LOADED}  # of one operand; of one row any number
MOST_ROWS = 32
ROWS_INTERPRETED = 4  # so that few rows have several blocks
PROGRAMS_PER_SM = 8
PROGRAMS_INTERPRETED = 2  # so that a program walks several blocks


def rows(kernel: str, columns: int) -> RowSetting:
    """The setting of one layer-norm kernel for rows of ``columns`` numbers."""
    whole = triton.next_power_of_2(columns)
    num_warps = 1 if columns <= ONE_WARP else whole // COLUMNS_OF_A_WARP
    widths = [num_warps * width for width in TILE_WIDTHS[kernel]]
    # The least padding; of equals the widest. A row that fits the narrowest is one tile.
    block_n = min(widths, key=lambda width: (triton.cdiv(columns, width) * width, -width))
    block_n = max(min(block_n, whole), LOADED)
    block_m = max(num_warps * WARP // block_n, 1)  # each thread in one row
    numbers = triton.cdiv(columns, block_n) * LOADED
    while numbers * 2 <= NUMBERS_OF_A_THREAD[kernel]:
        block_m, numbers = block_m * 2, numbers * 2
    block_m = ROWS_INTERPRETED if INTERPRETED else min(block_m, MOST_ROWS)
    return RowSetting(block_m, block_n, num_warps)


@cache
def row_programs(device: torch.device) -> int:
    """Programs of a kernel that sums over all rows; also how many partial sums there are."""
    if INTERPRETED:
        return PROGRAMS_INTERPRETED
    return PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
