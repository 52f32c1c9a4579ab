"""What the attention kernels share: operands, tiles of rows, which scores count."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinybert_fast.kernels import configs

LOG2_E = math.log2(math.e)
WIDEST_TILE = 128  # rows
WIDEST_LOAD = 16  # numbers; 16 bytes are 8 in half precision, 4 in single
PARTIAL, FULL = tl.constexpr(0), tl.constexpr(1)  # blocks of a mask, in the order of its lists


class Rows(NamedTuple):
    """An operand (T, H, D) or (B, N, H, D) as a kernel takes it: its address, and strides in
    units of ALIGN numbers, which tells the compiler how wide it may load.
    """

    ptr: Tensor | None
    batch: int  # 0 where rows are packed
    row: int
    head: int

    @classmethod
    def of(cls, x: Tensor, align: int) -> "Rows":
        batch, row, head = (0, *x.stride())[-4:-1]  # (T, H, D) has no batch
        return cls(x, batch // align, row // align, head // align)


NO_ROWS = Rows(None, 0, 0, 0)


def alignment(*operands: Tensor) -> int:
    """The largest power of 2 up to 16 that divides every address of a head's row, in numbers."""
    strides = [stride for x in operands for stride in x.stride()[:-1]]
    starts = [x.data_ptr() // x.element_size() for x in operands]
    return math.gcd(WIDEST_LOAD, *strides, *starts)


class BlockList(NamedTuple):
    """One direction of a block mask (reference/block_mask.py): what each block attends to."""

    offsets: Tensor | None
    blocks: Tensor | None
    tiles: Tensor | None
    cells: Tensor | None
    of_sequence: int  # offsets from one sequence's mask to the next; 0 where all share one

    @classmethod
    def by_query(cls, mask: list[Tensor]) -> "BlockList":
        return cls._of(mask[:3], mask[6]) if mask else cls(None, None, None, None, 0)

    @classmethod
    def by_key(cls, mask: list[Tensor]) -> "BlockList":
        return cls._of(mask[3:6], mask[6]) if mask else cls(None, None, None, None, 0)

    @classmethod
    def _of(cls, lists: list[Tensor], cells: Tensor) -> "BlockList":
        masks, offsets = lists[0].shape
        of_sequence = offsets if masks > 1 else 0
        return cls(lists[0], lists[1], lists[2], cells, of_sequence)


def side_of(mask: list[Tensor]) -> int:
    """Of the blocks of a mask, or 0 where there is none."""
    return mask[6].shape[1] if mask else 0


def addressable(x: Tensor) -> bool:
    """Whether a kernel reads ``x`` (T, H, D) or (B, N, H, D) by the strides that it has: the D
    numbers of a head side by side, and a tile's rows no further apart than an int32 can say.
    """
    return x.stride(-1) == 1 and x.stride(-3) * WIDEST_TILE < 2**31


def as_addressable(x: Tensor) -> Tensor:
    """``x``, as every model hands it over; a copy where its strides are stranger than that."""
    return x if addressable(x) else x.contiguous()


def statistics(q: Tensor) -> Tensor:
    """One fp32 number per query: (T, H) or (B, N, H)."""
    return torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)


def fresh_like(q: Tensor) -> Tensor:
    """Like ``q``: of packed rows each is written; of padded ones, those of padding stay zero."""
    new = torch.empty if q.dim() == 3 else torch.zeros
    return new(q.shape, dtype=q.dtype, device=q.device)


def grid(work: Tensor, max_length: int, block: int, heads: int) -> tuple[int, int]:
    """One program per (sequence, block of its rows) and head; the longest sequences first."""
    return len(work) * configs.cdiv(max_length, block), heads


@triton.jit
def task_of(work, at):
    """The address of row ``at`` of the work list: sequence, its length, its first row."""
    return work + at * 4


@triton.jit
def place(work, max_length, BLOCK: tl.constexpr):
    """This program's (task, first position of its block)."""
    blocks = tl.cdiv(max_length, BLOCK)
    return task_of(work, tl.program_id(0) // blocks), tl.program_id(0) % blocks * BLOCK


@triton.jit
def head_of(x, task, head, ALIGN: tl.constexpr):
    """Address of the first row of a task's sequence in one head of ``x: Rows``."""
    # Loaded where they are needed: kept for what is stored last, they would cost registers.
    sequence, start = tl.load(task).to(tl.int64), tl.load(task + 2).to(tl.int64)
    return x.ptr + (sequence * x.batch + start * x.row + head.to(tl.int64) * x.head) * ALIGN


@triton.jit
def rows_at(ptr, row, first, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """Addresses (BLOCK,) of the rows from ``first`` on."""
    # The part that may pass 2^31 is one number per tile; the rest is the same for every tile.
    return ptr + tl.cast(first, tl.int64) * row * ALIGN + tl.arange(0, BLOCK) * (row * ALIGN)


@triton.jit
def load_tile(
    ptr, row, first, length, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Rows of one head, zero beyond the sequence and beyond D: (BLOCK, BLOCK_D)."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    live = (first + tl.arange(0, BLOCK) < length)[:, None]
    if D < BLOCK_D:
        live = live & (offs_d < D)
    return tl.load(rows_at(ptr, row, first, BLOCK, ALIGN)[:, None] + offs_d, mask=live, other=0.0)


@triton.jit
def store_tile(
    ptr, row, first, length, tile, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """The reverse of load_tile; rounds to the operand's dtype."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    live = (first + tl.arange(0, BLOCK) < length)[:, None] & (offs_d < D)
    tl.store(rows_at(ptr, row, first, BLOCK, ALIGN)[:, None] + offs_d, tile, mask=live)


@triton.jit
def live_scores(
    first_m, first_n, length, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIRECTION: tl.constexpr
):
    """Which scores of a tile count, by length and direction: (BLOCK_M, BLOCK_N)."""
    i = first_m + tl.arange(0, BLOCK_M)[:, None]
    j = first_n + tl.arange(0, BLOCK_N)[None, :]
    live = (i < length) & (j < length)
    if DIRECTION == "causal":
        live = live & (j <= i)
    elif DIRECTION == "anti_causal":
        live = live & (j >= i)
    return live


@triton.jit
def segment(
    blocks, sequence, first, length, KIND: tl.constexpr, SIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Steps [low, high) over the blocks of a kind, PARTIAL or FULL, in one row of ``blocks:
    BlockList``, BLOCK positions each, of which ``SIDE // BLOCK`` make an entry. Those that begin
    beyond the sequence, where a mask of longer ones may have blocks, are left out.

    Where a kernel calls it, mostly before it loads operands, is by the registers that this costs.
    """
    tl.static_assert(SIDE % BLOCK == 0 and BLOCK % 32 == 0, "a tile must divide a block")
    at = blocks.offsets + sequence * blocks.of_sequence + 2 * (first // SIDE) + KIND
    low = tl.load(at) * (SIDE // BLOCK)
    last = tl.load(at + 1) * (SIDE // BLOCK) - 1
    # Positions increase. Of no step at all, block -1, which begins before any sequence ends.
    while (
        tl.load(blocks.blocks + entry_of(last, SIDE, BLOCK), mask=last >= low, other=-1) * SIDE
        + (last * BLOCK & (SIDE - 1))
        >= length
    ):
        last -= 1
    return low, last + 1


@triton.jit
def position(blocks, step, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The first position of a step."""
    inside = step * BLOCK & (SIDE - 1)
    return tl.load(blocks.blocks + entry_of(step, SIDE, BLOCK)) * SIDE + inside


@triton.jit
def entry_of(step, SIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The entry that a step belongs to; unsigned, so that the quotient is a shift."""
    return tl.cast(step, tl.uint32) // (SIDE // BLOCK)


@triton.jit
def allowed_cells(
    blocks, entry, first_m, first_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SIDE: tl.constexpr,
):  # fmt: skip
    """The cells of a tile within a partial block: (BLOCK_M, BLOCK_N)."""
    WORDS: tl.constexpr = SIDE // 32
    tile = tl.load(blocks.tiles + entry).to(tl.int64) * (SIDE * WORDS)
    first_m, first_n = first_m & (SIDE - 1), first_n & (SIDE - 1)
    row = tile + (first_m + tl.arange(0, BLOCK_M)) * WORDS + (first_n >> 5)
    j = tl.arange(0, BLOCK_N)[None, :]
    words = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for word in tl.static_range(BLOCK_N // 32):  # loaded once a row, not once a cell
        words = tl.where(j >> 5 == word, tl.load(blocks.cells + row + word)[:, None], words)
    return ((words >> (j & 31)) & 1) != 0


@triton.jit
def key_ranges(
    first, length, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DIRECTION: tl.constexpr
):
    """Keys that a block of queries needs: with a mask [low, full_low), whole blocks without one
    [full_low, full_high), with a mask [full_high, high).
    """
    low, full_low, full_high, high = 0, 0, length // BLOCK_N * BLOCK_N, length
    if DIRECTION == "causal":
        full_high = tl.minimum(full_high, (first + 1) // BLOCK_N * BLOCK_N)
        high = tl.minimum(first + BLOCK_M, length)
    elif DIRECTION == "anti_causal":
        low = first // BLOCK_N * BLOCK_N
        full_low = tl.cdiv(first + BLOCK_M - 1, BLOCK_N) * BLOCK_N
        full_high = tl.maximum(full_high, full_low)
    return low, full_low, full_high, high
