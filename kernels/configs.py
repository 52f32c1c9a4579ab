"""Launch settings: tile sizes, warps and pipeline stages of every kernel.

Chosen by what ptxas says for sm_80, sm_90 and sm_100 (no spill in fp16 and bf16): compiled, and
timed on no GPU, but for those that FAMILIES[90] gets last and that of linear_gelu. A file
of one's own, which `tinybert-fast bench --tune` writes, goes before these.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
import triton

from tinybert_fast.kernels.settings import (
    ANY,
    COMPILED,
    IN_ONE_TILE,
    KERNELS,
    Key,
    Setting,
    Table,
    own,
)

INTERPRETED = triton.knobs.runtime.interpret


HEADS = (32, 64, 128)
HALF = (torch.float16, torch.bfloat16)

# kernel -> head -> longest -> setting
Settings = dict[str, dict[int, dict[int, Setting]]]


def _spread(
    settings: Settings,
    dtypes: tuple[torch.dtype, ...],
    *patterns: str,
    dropout: tuple[bool, ...] = (False, True),
) -> Table:
    """The same for each dtype and pattern, with dropout and without."""
    return {
        Key(kernel, head, dtype, drops, pattern): by_length
        for kernel, heads in settings.items()
        for head, by_length in heads.items()
        for dtype in dtypes
        for drops in dropout
        for pattern in patterns
    }


def _everywhere(
    by_length: dict[int, Setting], *kernels: str, heads: tuple[int, ...] = HEADS
) -> Settings:
    return {kernel: dict.fromkeys(heads, by_length) for kernel in kernels}


PIPELINED, PLAIN = Setting(64, 64, 4, 2), Setting(64, 64, 4, 1)
TALL, NARROW, EIGHT = Setting(128, 64, 8, 1), Setting(64, 32, 4, 1), Setting(64, 64, 8, 1)
NARROW_PIPELINED = NARROW._replace(num_stages=2)
ONE_TILE = {64: PLAIN, 128: Setting(128, 128, 8, 1)}


def _any(settings: dict[int, Setting]) -> dict[int, dict[int, Setting]]:
    """head -> longest -> setting, for every length."""
    return {head: {ANY: setting} for head, setting in settings.items()}


class Family(NamedTuple):
    """The settings of one pattern; of the others where they need more registers."""

    all: Settings
    direction: Settings  # of what differs
    blocks: Settings  # a tile is no larger than a block; what a list names is not fetched ahead


# Of the losses, whose head is the wider of student's and teacher's.
LOSSES: Settings = {
    "gram": _any({32: PIPELINED, 64: PIPELINED}),
    "direct": _any({32: PLAIN, 64: PLAIN}),
    "relation_one_tile": {32: ONE_TILE, 64: ONE_TILE},
    "relation_statistics": _any(dict.fromkeys(HEADS, PLAIN)),
    "relation_gradient": _any({32: PLAIN, 64: PLAIN, 128: NARROW}),
}
SM_90 = Family(
    all={
        "forward": {
            32: {ANY: PIPELINED},
            64: {64: PIPELINED, ANY: TALL._replace(num_stages=2)},
            128: {ANY: TALL._replace(num_stages=2)},
        },
        "one_tile": {32: ONE_TILE, 64: ONE_TILE},
        "dq": _any({32: PIPELINED, 64: PIPELINED, 128: TALL}),
        "dkdv": _any({32: PIPELINED, 64: PIPELINED, 128: NARROW}),
        **LOSSES,
    },
    direction={"dkdv": _any({32: NARROW_PIPELINED, 64: NARROW_PIPELINED})},
    blocks={
        "forward": _any({32: PLAIN, 64: PLAIN, 128: NARROW}),
        "dq": _any({32: PLAIN, 64: PLAIN, 128: NARROW}),
        "dkdv": _any({32: NARROW, 64: NARROW, 128: NARROW}),
        "direct": _any({32: NARROW, 64: NARROW}),
    },
)
SM_80 = Family(
    all={
        "forward": {
            **SM_90.all["forward"],
            64: {64: PLAIN, ANY: TALL._replace(num_stages=2)},
            128: {ANY: TALL},
        },
        "one_tile": {32: ONE_TILE, 64: {64: PLAIN}},
        "dq": _any({32: PIPELINED, 64: NARROW_PIPELINED, 128: EIGHT._replace(num_stages=2)}),
        "dkdv": _any({32: PIPELINED, 64: NARROW_PIPELINED, 128: EIGHT._replace(num_stages=2)}),
        **LOSSES,
        "direct": _any(dict.fromkeys((32, 64), NARROW._replace(num_warps=8))),
        "relation_one_tile": {32: {64: PLAIN}, 64: {64: PLAIN}},
        "relation_statistics": _any({32: PLAIN, 64: PLAIN, 128: Setting(32, 32, 4, 1)}),
        "relation_gradient": _any({32: PLAIN, 64: NARROW, 128: EIGHT}),
    },
    direction={
        "forward": _any({128: Setting(128, 32, 8, 1)}),
        "dkdv": _any({32: NARROW_PIPELINED}),
    },
    blocks={
        **SM_90.blocks,
        "forward": _any({32: NARROW, 64: PLAIN, 128: NARROW}),
        "direct": _any(dict.fromkeys((32, 64), NARROW._replace(num_warps=8))),
    },
)
# One stage: with two, ptxas is given 6 times as many instructions for a score.
SM_100 = Family(
    all={
        "forward": {32: {ANY: PLAIN}, 64: {64: PLAIN, ANY: TALL}, 128: {ANY: TALL}},
        "one_tile": SM_90.all["one_tile"],
        "dq": _any(dict.fromkeys(HEADS, NARROW)),
        "dkdv": _any({32: PLAIN, 64: PLAIN, 128: EIGHT}),
        **LOSSES,
        "gram": _any({32: PLAIN, 64: EIGHT}),
        "relation_gradient": _any({32: NARROW, 64: NARROW, 128: EIGHT}),
    },
    direction={"forward": _any({64: PLAIN}), "dkdv": _any({64: NARROW_PIPELINED})},
    blocks={
        "forward": _any({32: PLAIN, 64: NARROW, 128: NARROW}),
        "dq": _any(dict.fromkeys(HEADS, NARROW)),
        "dkdv": _any({32: NARROW, 64: NARROW, 128: Setting(32, 64, 8, 1)}),
        "direct": _any({32: NARROW, 64: NARROW}),
    },
)
# No tensor core: products keep their operands in registers, and part of them in the stack. Compiled
# for sm_90, that is up to 56 bytes at heads of 32, up to 816 at heads of 64, kilobytes at heads of
# 128. The relation's statistics keep 0 and 672 at heads of 32 and 64 with 8 warps, 752 and 3,376
# with 4; smaller tiles do not keep them out of it either.
FP32: Settings = {
    **_everywhere({ANY: Setting(32, 32, 4, 1)}, *KERNELS),
    "relation_statistics": _any(dict.fromkeys(HEADS, Setting(32, 32, 8, 1))),
}
FAMILIES: dict[int, Table] = {
    number: {
        **_spread(family.all, HALF, "all", "direction"),
        **_spread(family.direction, HALF, "direction"),
        **_spread(family.blocks, HALF, "blocks"),
        **_spread(FP32, (torch.float32,), "all", "direction", "blocks"),
    }
    for number, family in ((80, SM_80), (90, SM_90), (100, SM_100))
}
# Attention as `bench --tune` found it on an H200, at 65,536 tokens in sequences of 64, 128 and 512
# (benchmarks/results/tune-nvidia-h200.json; 64 without dropout takes what longer ones do). The Gram
# form was tried on that GPU under several settings, of which no rows are kept. Programs that walk
# heads were timed on an H100 (benchmarks/results/one-tile-nvidia-h100-80gb-hbm3.json).
DEEP = PIPELINED._replace(num_stages=3)
WALKING, WALKING_3 = Setting(128, 128, 8, 3, 12), Setting(64, 64, 4, 3, 3)
FAMILIES[90] |= {
    **_spread(
        _everywhere({ANY: DEEP}, "forward", "dq", "dkdv", heads=(32, 64)),
        HALF, "all", dropout=(False,),
    ),
    **_spread(
        {
            "forward": {32: {ANY: DEEP}, 64: {128: NARROW_PIPELINED, ANY: PLAIN}},
            "dq": _any({32: DEEP, 64: NARROW}),
        },
        HALF, "all", dropout=(True,),
    ),
    **_spread(_everywhere({128: PLAIN, ANY: DEEP}, "gram", heads=(32, 64)), HALF, "all"),
    **_spread({"one_tile": {32: {64: PLAIN, 128: WALKING}}}, HALF, "all"),
    **_spread({"one_tile": {64: {64: WALKING_3, 128: WALKING}}}, HALF, "all", dropout=(False,)),
}  # fmt: skip
# Small, so that short sequences have several blocks.
SMALL = Setting(32, 32, 1, 1)
SEVERAL = {256: SMALL, ANY: Setting(64, 64, 1, 1)}
DTYPES_INTERPRETED = (torch.float16, torch.float32)
INTERPRETED_TABLE = {
    **_spread(_everywhere(SEVERAL, *KERNELS), DTYPES_INTERPRETED, "all", "direction"),
    **_spread(
        {
            **_everywhere({32: SMALL}, *IN_ONE_TILE),
            **_everywhere({32: SMALL._replace(heads_each=2)}, "one_tile"),
        },
        DTYPES_INTERPRETED,
        "all",
        "direction",
    ),
    **_spread(
        _everywhere({ANY: Setting(32, 64, 1, 1)}, "forward", "dq", "dkdv", "direct"),
        DTYPES_INTERPRETED,
        "blocks",
    ),
}

NARROWEST_PIPELINE = 16  # bytes of a load; narrower ones, copied ahead, would spill
SMALLEST_DOT = 16  # of tl.dot, each dimension

_forced: list[Table] = []


@contextmanager
def forced(table: Table) -> Iterator[None]:
    """Inside, launches take their settings from ``table``."""
    _forced.append(table)
    try:
        yield
    finally:
        _forced.pop()


def table(device: torch.device) -> Table:
    """The settings of a device."""
    return _forced[-1] if _forced else _table(device)


@cache
def _table(device: torch.device) -> Table:
    """One's own, then those of the newest family that the device can run."""
    if INTERPRETED:
        return INTERPRETED_TABLE
    return {**FAMILIES[newest(FAMILIES, device)], **own(torch.cuda.get_device_name(device))}


def newest(families: Iterable[int], device: torch.device) -> int:
    """The family that a device takes: the last that it can run."""
    return max((f for f in families if f <= capability(device)), default=min(families))


def capability(device: torch.device) -> int:
    """90 of an sm_90."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


# Triton's own take 10 microseconds on the host: its compiler can call them too.
def cdiv(n: int, size: int) -> int:
    """Blocks of ``size`` that cover n."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The least one that is not below n."""
    return 1 << (n - 1).bit_length()


def head_block(width: int) -> int:
    """The width of a tile that holds a head: a power of 2."""
    return max(power_of_2(width), SMALLEST_DOT)


class Scores(NamedTuple):
    """What decides the setting of an attention kernel."""

    device: torch.device
    dtype: torch.dtype
    width: int  # of a head
    longest: int
    dropout: bool
    load_bytes: int  # at a time, that the strides allow
    pattern: str  # as in Key

    @classmethod
    def of(
        cls,
        q: torch.Tensor,
        align: int,
        longest: int,
        dropout_p: float,
        direction: str,
        block_mask: list[torch.Tensor],
    ) -> "Scores":
        """For operands like ``q`` whose strides are multiples of ``align``."""
        pattern = "blocks" if block_mask else "all" if direction == "both" else "direction"
        load_bytes = align * q.element_size()
        return cls(q.device, q.dtype, q.shape[-1], longest, dropout_p > 0.0, load_bytes, pattern)


def attention(kernel: str, scores: Scores) -> Setting:
    """The setting of an attention kernel that serves all scores."""
    setting = attention_if_served(kernel, scores)
    assert setting is not None, f"{kernel} has no setting for {scores}"
    return setting


def attention_if_served(kernel: str, scores: Scores) -> Setting | None:
    """The setting of one attention kernel, or None where it does not serve such scores."""
    head = max(head_block(scores.width), min(HEADS))
    key = Key(kernel, head, scores.dtype, scores.dropout, scores.pattern)
    by_length = table(scores.device).get(key, {})
    setting = next((by_length[n] for n in sorted(by_length) if scores.longest <= n), None)
    if setting is not None and scores.load_bytes < NARROWEST_PIPELINE:
        setting = setting._replace(num_stages=1, heads_each=1)
    return setting


FILLING = 0.35  # heads that a program could have done while it waits for its first one's operands


def filling(setting: Setting, sequences: int, heads: int, device: torch.device) -> Setting:
    """With as many heads to a program, up to the setting's, as end soonest: few programs wait less
    and leave more SMs idle at the end. One head has no pipeline over them.
    """

    def time(each: int) -> float:
        waves = cdiv(sequences * heads // each, processors(device))
        return waves * (each + FILLING)

    divisors = [n for n in range(setting.heads_each, 1, -1) if heads % n == 0]
    each = min([*divisors, 1], key=time)
    return setting._replace(heads_each=each, num_stages=setting.num_stages if each > 1 else 1)


class RowSetting(NamedTuple):
    """Rows that a program of a layer-norm kernel holds at a time, as tiles (BLOCK_M, BLOCK_N)."""

    block_m: int
    block_n: int
    num_warps: int
    stages: int = 0  # of a backward's loop: rows in flight while others are computed with

    def launch(self) -> dict[str, int]:
        """As a kernel's keyword arguments."""
        tile = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.num_warps}
        return {**tile, **COMPILED, **({"STAGES": self.stages} if self.stages else {})}


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
MOST_STAGES = 3
# Of shared memory, that rows in flight may take: the least of any GPU from sm_80 on gives a program
# 99 KiB, of which sums over a row want up to 17.
IN_FLIGHT_BYTES = 80 << 10
IN_FLIGHT = 2  # operands that a backward reads
PROGRAMS_INTERPRETED = 2  # so that a program walks several blocks


@cache
def rows(kernel: str, columns: int, itemsize: int = 0) -> RowSetting:
    """The setting of one layer-norm kernel for rows of ``columns`` numbers, of a backward's of
    ``itemsize`` bytes each.
    """
    whole = power_of_2(columns)
    num_warps = 1 if columns <= ONE_WARP else whole // COLUMNS_OF_A_WARP
    widths = [num_warps * width for width in TILE_WIDTHS[kernel]]
    # The least padding; of equals the widest. A row that fits the narrowest is one tile.
    block_n = min(widths, key=lambda width: (cdiv(columns, width) * width, -width))
    block_n = max(min(block_n, whole), LOADED)
    block_m = max(num_warps * WARP // block_n, 1)  # each thread in one row
    numbers = cdiv(columns, block_n) * LOADED
    while numbers * 2 <= NUMBERS_OF_A_THREAD[kernel]:
        block_m, numbers = block_m * 2, numbers * 2
    block_m = ROWS_INTERPRETED if INTERPRETED else min(block_m, MOST_ROWS)
    if kernel == "forward":
        return RowSetting(block_m, block_n, num_warps)
    stage_bytes = IN_FLIGHT * block_m * cdiv(columns, block_n) * block_n * itemsize
    stages = min(1 + IN_FLIGHT_BYTES // stage_bytes, MOST_STAGES)
    return RowSetting(block_m, block_n, num_warps, stages)


# A tile of a kernel whose numbers do not meet: each thread loads 16 bytes of half precision twice.
ELEMENTWISE = RowSetting(4, 64, 1) if INTERPRETED else RowSetting(8, WARP, 4)

L2_BYTES = 32 << 20  # of what two products share: it stays in the L2 cache of an A100 or H100


class Product(NamedTuple):
    """Tiles (BLOCK_M, BLOCK_N) of a product, summed in steps of BLOCK_K, stored in PARTS of their
    columns; an SM holds so many programs.
    """

    block_m: int
    block_n: int
    block_k: int
    parts: int
    num_warps: int
    num_stages: int
    programs: int

    def launch(self) -> dict[str, int]:
        """As a kernel's keyword arguments."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "PARTS": self.parts,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            **COMPILED,
        }


# Of linear_gelu, timed on an H100 (benchmarks/results/linear-gelu-nvidia-h100-80gb-hbm3.json). It
# loads by TMA, which began with sm_90; an SM of sm_120 has too little shared memory for such tiles.
SQUARE = Product(128, 128, 64, parts=2, num_warps=4, num_stages=3, programs=2)
PRODUCTS: dict[int, Product | None] = {80: None, 90: SQUARE, 100: SQUARE, 120: None}
PRODUCT_INTERPRETED = Product(32, 32, 32, parts=2, num_warps=1, num_stages=1, programs=2)
TMA_BYTES = 16  # that divide the address of a tensor and the bytes of a row


def linear_gelu(x: torch.Tensor, columns: int) -> Product | None:
    """The setting of linear_gelu for x (rows, K) times (K, columns); None where it doesn't serve:
    fp32, rows that TMA cannot load, older GPUs, an empty operand.
    """
    unit = TMA_BYTES // x.element_size()
    if x.dtype not in HALF or x.shape[1] % unit or columns % unit or not x.numel() * columns:
        return None
    return PRODUCT_INTERPRETED if INTERPRETED else PRODUCTS[newest(PRODUCTS, x.device)]


def vocabulary() -> dict[str, int]:
    """Keyword arguments of the kernel over a row of logits."""
    if INTERPRETED:  # so that few words have several blocks
        return {"BLOCK_N": 64}
    warps = 8  # each thread loads 16 bytes of half precision at a time
    return {"BLOCK_N": warps * WARP, "num_warps": warps, **COMPILED}


def row_programs(device: torch.device) -> int:
    """Programs of a kernel that sums over all rows; also how many partial sums there are."""
    return PROGRAMS_INTERPRETED if INTERPRETED else PROGRAMS_PER_SM * processors(device)


@cache
def processors(device: torch.device) -> int:
    """SMs of a GPU."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count
