"""Block-sparse attention masks, from a pattern or from a dense mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast.ops.dispatch import (
    NATIVE_DEVICES,
    Limit,
    Limits,
    check_devices,
    choose,
    define,
    integer,
    outliving,
)
from tinybert_fast.reference.block_mask import Conditions, allowed_pairs, conditions_met
from tinybert_fast.reference.block_mask import block_mask as reference

SIDES = (64, 128)  # of a block, in tokens
LONGEST = 1 << 20  # tokens of a mask

LIMITS = Limits(
    "block_mask",
    torch=None,
    native=Limit((torch.bool,), NATIVE_DEVICES),
    reference=Limit((torch.bool,)),
)

_CONDITIONS = (
    "Tensor probe, Tensor? document_first, Tensor? document_stop, Tensor? global_words,"
    " Tensor? lengths, Tensor? dense, int size, int masks, int side, bool everything, int window,"
    " int window_blocks, int random_blocks, int seed"
)


def _fake_lists(kinds: Tensor, entries: int, partial: int, *conditions: Any) -> list[Tensor]:
    masks, count, _ = kinds.shape
    side = conditions[8]
    sizes = [(masks, 2 * count + 1), (entries,), (entries,)] * 2 + [(partial, side, side // 32)]
    return [kinds.new_empty(size, dtype=torch.int32) for size in sizes]


_kinds = define(
    f"block_mask_kinds({_CONDITIONS}) -> Tensor",
    fake=lambda probe, *rest: probe.new_empty(
        (rest[6], -(-rest[5] // rest[7]), -(-rest[5] // rest[7])), dtype=torch.uint8
    ),
    native="tinybert_fast.ops.native:block_mask_kinds",
)
_lists = define(
    f"block_mask_lists(Tensor kinds, SymInt entries, SymInt partial, {_CONDITIONS}) -> Tensor[]",
    fake=_fake_lists,
    native="tinybert_fast.ops.native:block_mask_lists",
)


@dataclass(frozen=True)
class BlockPattern:
    """Which tokens may attend to each other by rule: those that any of its rules lets meet.

    Attributes:
        window: tokens whose ranks differ by at most this, so many to either side (half of what
            ``longformer`` takes).
        window_blocks: tokens whose blocks' numbers differ by at most this, likewise.
        global_tokens: these attend to all tokens, and all attend to them.
        random_blocks: so many more blocks of keys for every block of queries, which no other rule
            lets it meet, drawn by ``seed``.
        side: of a block, 64 or 128 tokens.

    Without any rule all tokens meet, which documents or lengths then narrow.
    """

    window: int | None = None
    window_blocks: int | None = None
    global_tokens: tuple[int, ...] = ()
    random_blocks: int = 0
    seed: int = 0
    side: int = 64

    def __post_init__(self) -> None:
        for name in ("window", "window_blocks", "random_blocks", "seed"):
            value = getattr(self, name)
            if value is not None or not name.startswith("window"):
                integer("block_mask", name, value, 0, 2**63 - 1)
        for token in self.global_tokens:
            integer("block_mask", "global_tokens", token, 0, 2**63 - 1)
        _check_side(self.side)

    @classmethod
    def longformer(
        cls, window: int = 512, global_tokens: Sequence[int] = (0,), side: int = 64
    ) -> BlockPattern:
        """A sliding window of ``window`` tokens, half of it to either side, and global tokens
        (Beltagy et al. 2020, arXiv:2004.05150).
        """
        return cls(window=window // 2, global_tokens=tuple(global_tokens), side=side)

    @classmethod
    def bigbird(
        cls, window_blocks: int = 3, global_blocks: int = 2, random_blocks: int = 3, *,
        seed: int = 0, side: int = 64,
    ) -> BlockPattern:  # fmt: skip
        """A window of ``window_blocks`` blocks, the first ``global_blocks`` blocks global, and
        random blocks (Zaheer et al. 2020, arXiv:2007.14062, where global blocks are the first and
        the last).
        """
        return cls(
            window_blocks=window_blocks // 2,
            global_tokens=tuple(range(global_blocks * side)),
            random_blocks=random_blocks,
            seed=seed,
            side=side,
        )


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
        if alike and self.lists[6].shape[1] in SIDES:
            segments = 2 * -(-self.size // self.lists[6].shape[1]) + 1
            alike = self.lists[0].shape[1] == self.lists[3].shape[1] == segments
        if not alike or self.lists[0].dtype != torch.int32 or self.lists[6].shape[1] not in SIDES:
            raise ValueError(
                f"a BlockMask holds seven int32 tensors on one device, cells of blocks of {SIDES} "
                f"last; got {', '.join(f'{x.dtype} {tuple(x.shape)}' for x in self.lists)}. Make "
                "one with BlockMask.from_dense or BlockMask.from_pattern"
            )

    @classmethod
    def from_dense(cls, allowed: Tensor, side: int = 64, impl: str = "auto") -> BlockMask:
        """From bool (N, N), or (B, N, N) for a mask per sequence; True where attention is allowed.

        Raises:
            ValueError: another dtype or shape, or a side that is not 64 or 128.
        """
        if not isinstance(allowed, Tensor):
            raise ValueError(
                f"block_mask: expected a bool tensor (N, N) or (B, N, N); got "
                f"{type(allowed).__name__}"
            )
        square = allowed.dim() in (2, 3) and allowed.shape[-1] == allowed.shape[-2]
        if allowed.dtype != torch.bool or not square:
            raise ValueError(
                "block_mask: expected bool (N, N) or (B, N, N); got "
                f"{allowed.dtype} {tuple(allowed.shape)}"
            )
        whole = (allowed if allowed.dim() == 3 else allowed[None]).contiguous()
        pattern = BlockPattern(side=side)
        return cls.from_pattern(pattern, allowed.shape[-1], dense=whole, impl=impl)

    @classmethod
    @outliving
    def from_pattern(
        cls,
        pattern: BlockPattern,
        size: int,
        *,
        documents: Tensor | None = None,
        lengths: Tensor | None = None,
        dense: Tensor | None = None,
        device: torch.device | str | None = None,
        impl: str = "auto",
    ) -> BlockMask:
        """Of sequences up to ``size`` tokens. A GPU is waited for, to size the lists.

        Args:
            documents: int (B, N), a number for every token that never decreases along a row: only
                tokens of one document meet.
            lengths: int64 (B,): blocks beyond a sequence's tokens are left out.
            dense: bool (B, N, N): besides, only these pairs meet.
            device: of the lists; that of the tensors, by default the CPU.

        Raises:
            ValueError: sizes, dtypes or devices that do not fit, numbers out of range, documents
                that decrease.
        """
        given = {"documents": documents, "lengths": lengths, "dense": dense}
        first = next((x for x in given.values() if x is not None), None)
        if device is None:
            device = getattr(first, "device", "cpu")
        probe = torch.empty(0, dtype=torch.bool, device=device)
        choice, _ = choose(impl, LIMITS, probe)
        masks = _check(pattern, size, documents, lengths, dense)
        check_devices("block_mask", probe.device, **given)
        marked = None
        if pattern.global_tokens:
            marked = torch.zeros(size, dtype=torch.bool, device=device)
            marked[[token for token in pattern.global_tokens if token < size]] = True
        rules = (pattern.window, pattern.window_blocks, marked, pattern.random_blocks or None)
        conditions = Conditions(
            size=size,
            masks=masks,
            side=pattern.side,
            everything=all(rule is None for rule in rules),
            window=-1 if pattern.window is None else min(pattern.window, size),
            window_blocks=-1 if pattern.window_blocks is None else min(pattern.window_blocks, size),
            global_tokens=marked,
            random_blocks=min(pattern.random_blocks, size),
            seed=pattern.seed,
            documents=documents,
            lengths=lengths,
            dense=dense,
        )
        if choice == "reference":
            pairs = conditions_met(conditions, probe.device)
            return cls(size, tuple(reference(pairs, pattern.side)))
        return cls(size, tuple(_native_lists(probe, conditions)))

    @outliving
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


def check_block_mask(
    op: str, block_mask: BlockMask | Tensor, longest: int, batch: int, device: torch.device
) -> None:
    """ValueError unless it serves ``batch`` sequences of up to ``longest`` tokens on ``device``."""
    expected = f"N >= {longest} on {device}"
    if isinstance(block_mask, BlockMask):
        where = block_mask.lists[0].device
        if block_mask.size < longest or block_mask.masks not in (1, batch) or where != device:
            raise ValueError(
                f"{op}: block_mask must hold 1 or {batch} masks of size {expected}; got "
                f"{block_mask.masks} of size {block_mask.size} on {where}"
            )
        return
    sizes = block_mask.shape
    square = len(sizes) >= 2 and sizes[-2] == sizes[-1] and sizes[:-2] in ((), (batch,))
    right = block_mask.dtype == torch.bool and block_mask.device == device
    if not right or not square or sizes[-1] < longest:
        raise ValueError(
            f"{op}: block_mask must be bool (N, N) or ({batch}, N, N), {expected}; got "
            f"{block_mask.dtype} {tuple(sizes)} on {block_mask.device}"
        )


def _native_lists(probe: Tensor, c: Conditions) -> list[Tensor]:
    bounds: tuple[Tensor | None, Tensor | None] = (None, None)
    if c.documents is not None:  # where each token's document begins and ends
        documents = c.documents.contiguous()
        first = torch.searchsorted(documents, documents)
        stop = torch.searchsorted(documents, documents, right=True)
        bounds = (first.int(), stop.int())
    arguments = (
        probe, *bounds, _words_of(c.global_tokens), c.lengths, c.dense, c.size, c.masks, c.side,
        c.everything, c.window, c.window_blocks, c.random_blocks, c.seed,
    )  # fmt: skip
    kinds = _kinds(*arguments, "native")
    partial, full = torch.stack([(kinds == kind).sum() for kind in (1, 2)]).tolist()
    if partial + full >= 2**31:
        raise ValueError(
            f"block_mask: {partial + full:,} blocks are listed; fewer than 2^31 can be"
        )
    return _lists(kinds, partial + full, partial, *arguments, "native")


def _words_of(marked: Tensor | None) -> Tensor | None:
    """Bool (N,) -> int32, the bits of 32 tokens each, zeros up to the end of a block."""
    if marked is None:
        return None
    padded = F.pad(marked, (0, -len(marked) % max(SIDES))).view(-1, 4, 8)
    values = 2 ** torch.arange(8, dtype=torch.uint8, device=marked.device)
    return (padded * values).sum(-1, dtype=torch.uint8).view(torch.int32).flatten()


def _check_side(side: int) -> None:
    if side not in SIDES:
        raise ValueError(f"block_mask: side={side} is not one of {SIDES}")


def _check(
    pattern: BlockPattern,
    size: int,
    documents: Tensor | None,
    lengths: Tensor | None,
    dense: Tensor | None,
) -> int:
    """The number of masks."""
    integer("block_mask", "size", size, 0, LONGEST)
    for name, given in (("documents", documents), ("lengths", lengths), ("dense", dense)):
        if given is not None and not isinstance(given, Tensor):
            raise ValueError(f"block_mask: {name} is {type(given).__name__}; expected a tensor")
    masks = next((len(x) for x in (documents, lengths, dense) if x is not None and x.dim()), 1)
    integers = (torch.int32, torch.int64)
    for name, x, dtypes, shape in (
        ("documents", documents, integers, (masks, size)),
        ("lengths", lengths, (torch.int64,), (masks,)),
        ("dense", dense, (torch.bool,), (masks, size, size)),
    ):
        if x is not None and (x.dtype not in dtypes or x.shape != shape or not x.is_contiguous()):
            raise ValueError(
                f"block_mask: {name} must be {' or '.join(map(str, dtypes))} {shape}, contiguous; "
                f"got {x.dtype} {tuple(x.shape)}, strides {x.stride()}"
            )
    if (
        lengths is not None
        and lengths.numel()
        and not 0 <= int(lengths.min()) <= int(lengths.max()) <= size
    ):
        raise ValueError(f"block_mask: lengths must lie in 0..{size}; got {lengths.tolist()[:8]}")
    if documents is not None and bool((documents.diff(dim=1) < 0).any()):
        raise ValueError(
            "block_mask: documents must not decrease along a row: a document's tokens are "
            "neighbours"
        )
    return masks
