"""Launch settings: tile sizes, warps and pipeline stages of every kernel.

Chosen by what ptxas says for sm_80, sm_90 and sm_100 (no spill in fp16 and bf16) and not yet by a
GPU's clock.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret


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


ANY = 1 << 31  # longer than every sequence

# GPU family -> kernel -> width of the tile that holds a head -> longest sequence -> setting; for
# fp16 and bf16, with dropout and without. A length that no entry covers has no such kernel.
SHORT = Setting(64, 64, 4, 2)
ONE_TILE = {64: Setting(64, 64, 4, 1), 128: Setting(128, 128, 8, 1)}
SM_90 = {
    "forward": {
        32: {ANY: SHORT},
        64: {64: SHORT, ANY: Setting(128, 64, 8, 2)},
        128: {ANY: Setting(128, 64, 8, 2)},
    },
    "one_tile": {32: ONE_TILE, 64: ONE_TILE, 128: {}},
    "dq": {32: {ANY: SHORT}, 64: {ANY: SHORT}, 128: {ANY: Setting(128, 64, 8, 1)}},
    "dkdv": {32: {ANY: SHORT}, 64: {ANY: SHORT}, 128: {ANY: Setting(64, 32, 4, 1)}},
}
SM_80 = {
    "forward": {**SM_90["forward"], 128: {ANY: Setting(128, 64, 8, 1)}},
    "one_tile": {32: ONE_TILE, 64: {64: ONE_TILE[64]}, 128: {}},
    "dq": {32: {ANY: SHORT}, 64: {ANY: Setting(64, 32, 4, 2)}, 128: {ANY: Setting(64, 64, 8, 2)}},
    "dkdv": {32: {ANY: SHORT}, 64: {ANY: Setting(64, 32, 4, 2)}, 128: {ANY: Setting(64, 64, 8, 2)}},
}
SM_100 = {
    **SM_90,
    "dq": {**SM_90["dq"], 128: {ANY: Setting(64, 64, 8, 2)}},
    "dkdv": {**SM_90["dkdv"], 128: {ANY: Setting(64, 64, 8, 2)}},
}
FAMILIES = {80: SM_80, 90: SM_90, 100: SM_100}
NARROWEST_PIPELINE = 16  # bytes of a load; narrower ones, copied ahead, would spill

FP32 = Setting(32, 32, 4, 1)  # no tensor core: small tiles keep it out of the stack
INTERPRETED_ATTENTION = Setting(32, 32, 1, 1)  # so that short sequences have several blocks
INTERPRETED_ONE_TILE = {32: INTERPRETED_ATTENTION}

SMALLEST_DOT = 16  # of tl.dot, each dimension


def head_block(width: int) -> int:
    """The width of a tile that holds a head: a power of 2."""
    return max(triton.next_power_of_2(width), SMALLEST_DOT)


@cache
def family(device: torch.device) -> int:
    """The newest family whose settings the device can run."""
    major, minor = torch.cuda.get_device_capability(device)
    return max((f for f in FAMILIES if f <= 10 * major + minor), default=min(FAMILIES))


class Scores(NamedTuple):
    """What decides the setting of an attention kernel."""

    family: int
    dtype: torch.dtype
    width: int  # of a head
    longest: int
    load_bytes: int  # at a time, that the strides allow
    mask_side: int  # of a block mask, or 0

    @classmethod
    def of(
        cls, q: torch.Tensor, align: int, longest: int, block_mask: list[torch.Tensor]
    ) -> "Scores":
        """For operands like ``q`` whose strides are multiples of ``align``."""
        side = block_mask[-1].shape[1] if block_mask else 0
        generation = 0 if INTERPRETED else family(q.device)
        return cls(generation, q.dtype, q.shape[-1], longest, align * q.element_size(), side)


def attention(kernel: str, scores: Scores) -> Setting:
    """The setting of an attention kernel that serves all scores."""
    setting = attention_if_served(kernel, scores)
    assert setting is not None, f"{kernel} has no setting for {scores}"
    return setting


def attention_if_served(kernel: str, scores: Scores) -> Setting | None:
    """The setting of one attention kernel, or None where it does not serve such scores."""
    if kernel == "one_tile" and scores.mask_side:
        return None
    if INTERPRETED:
        table = INTERPRETED_ONE_TILE if kernel == "one_tile" else {ANY: INTERPRETED_ATTENTION}
    elif scores.dtype == torch.float32:
        table = {} if kernel == "one_tile" else {ANY: FP32}
    else:
        table = FAMILIES[scores.family][kernel][max(head_block(scores.width), 32)]
    setting = next((table[n] for n in sorted(table) if scores.longest <= n), None)
    if setting is None:
        return None
    if scores.load_bytes < NARROWEST_PIPELINE:
        setting = setting._replace(num_stages=1)
    if scores.mask_side:  # a tile of scores is a block of the mask
        setting = setting._replace(block_m=scores.mask_side, block_n=scores.mask_side)
    return setting


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
