"""Which rows of a padded batch are real tokens, found once per batch and used by every layer.

A batch of B sequences padded to width N is packed into T = sum(lengths) rows by dropping every
padding position, in row-major order. Any key-padding mask is legal: padding on the right, on the
left, holes, and sequences with no token at all.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast.ops.dispatch import TENSORS, outliving
from tinybert_fast.ops.sequence_layout import sequence_extents, sequence_layout

Tables = tuple[Tensor, Tensor, Tensor]  # cu_seqlens, work, padded_work


class _OnTheDevice(tuple):
    """Lengths that no one may read: what a CUDA graph was captured with is not what it runs on."""

    def _refuse(self, *_: Any) -> NoReturn:
        raise ValueError(
            "the lengths of this layout are on the device alone (SequenceLayout.of_capacity); "
            "compute with cu_seqlens"
        )

    __iter__ = __len__ = __contains__ = __getitem__ = __eq__ = __hash__ = _refuse


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """The valid rows of one batch: host sizes beside the device tensors that kernels read.

    Attributes:
        batch_size: B, sequences in the batch, empty ones included.
        width: N, positions of a padded row.
        lengths: valid tokens of each sequence, on the host; max_length: the longest.
        starts_padded: whether a sequence that has tokens has padding in column 0.
        has_holes: whether a sequence has padding between two tokens.
        cu_seqlens: int32 (B + 1,), exclusive running sum of the lengths.
        rows: int64 (T,), flat index ``b * N + n`` of each valid token, increasing.
        sequences: int32 (T,), the sequence b that a token belongs to.
        positions: int32 (T,), rank of a token among the valid tokens of its sequence. Dropout
            counters, causal order and block masks use it, so they don't depend on padding.
        work: int32 (B, 4), the list that attention's kernels work through, in every layer and both
            passes: (sequence b, its length, packed row of its first token, 0), 16 bytes each. The
            longest come first, so that no long one is left to the end; of equal lengths the lower
            b.
        padded_work: the same for padded rows, with the column of the first token; 0 if none.
        dummies: how many of the sequences, the last ones, are not of the batch but fill its rows up
            to a fixed number (`of_capacity`): encoded like others, padded by nobody, counted by no
            loss. spare: how many of the last rows may be theirs.
    """

    batch_size: int
    width: int
    lengths: tuple[int, ...]
    max_length: int
    starts_padded: bool
    has_holes: bool
    cu_seqlens: Tensor
    rows: Tensor
    sequences: Tensor
    positions: Tensor
    work: Tensor
    padded_work: Tensor
    dummies: int = field(default=0, kw_only=True)
    spare: int = field(default=0, kw_only=True)

    @classmethod
    @outliving
    def from_mask(cls, mask: Tensor, impl: str = "auto") -> SequenceLayout:
        """From a (B, N) key-padding mask of any dtype, non-zero where a token is real. One host
        sync. ValueError for another number of dimensions."""
        if mask.dim() != 2:
            raise ValueError(
                "a key-padding mask has 2 dimensions (batch, width); got shape "
                f"{tuple(mask.shape)}. Reduce a 3-D or 4-D attention mask to (batch, width) first"
            )
        real = (mask.detach() != 0).contiguous()
        extents = sequence_extents(real, impl)
        lengths, starts, ends = extents.tolist()
        tables = _tables(lengths, starts, real.device)
        # The count is known by now, so this one does not wait for the device.
        placed = sequence_layout(real, tables[0], sum(lengths), impl)
        return cls._made(
            mask.shape[1],
            lengths,
            tables,
            *placed,
            starts_padded=any(starts),
            has_holes=any(n != b - a for n, a, b in zip(lengths, starts, ends, strict=True)),
        )

    @classmethod
    @outliving
    def from_lengths(
        cls, lengths: Sequence[int], width: int | None = None, device: torch.device | str = "cpu"
    ) -> SequenceLayout:
        """Right-padded rows of the given lengths, padded to ``width`` (default: the longest).
        ValueError for a length that is negative or above it."""
        lengths = [int(n) for n in lengths]
        width = max(lengths, default=0) if width is None else width
        if any(not 0 <= n <= width for n in lengths):
            raise ValueError(f"lengths must lie in 0..{width} (the padded width); got {lengths}")
        rows = torch.cat(
            [torch.arange(n, device="cpu") + b * width for b, n in enumerate(lengths)]
            or [torch.empty(0, dtype=torch.int64, device="cpu")]
        )
        rows = rows.to(device, non_blocking=True)
        return cls._build(width, lengths, rows, _tables(lengths, [0] * len(lengths), rows.device))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Tensor, width: int | None = None) -> SequenceLayout:
        """Of packed rows, as FlashAttention's varlen functions describe them: int32 or int64
        (B + 1,), from 0, never decreasing, or ValueError. One host sync."""
        integers = cu_seqlens.dtype in (torch.int32, torch.int64)
        if not integers or cu_seqlens.dim() != 1 or len(cu_seqlens) == 0:
            raise ValueError(
                "cu_seqlens is the running sum of the lengths, int32 (batch + 1,); got "
                f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            )
        stops = cu_seqlens.tolist()
        lengths = [b - a for a, b in itertools.pairwise(stops)]
        if stops[0] != 0 or min(lengths, default=0) < 0:
            raise ValueError(f"cu_seqlens must begin with 0 and never decrease; got {stops}")
        return cls.from_lengths(lengths, width, cu_seqlens.device)

    @classmethod
    @outliving
    def full(
        cls, batch_size: int, width: int, device: torch.device | str = "cpu"
    ) -> SequenceLayout:
        """Every position of a (B, N) batch is a token."""
        rows = torch.arange(batch_size * width, device=device)
        return cls._build(width, [width] * batch_size, rows, full_tables(batch_size, width, device))

    @classmethod
    @outliving
    def of_capacity(
        cls, lengths: Tensor, width: int, total: int, *, dummies: int, spare: int
    ) -> SequenceLayout:
        """Right-padded rows whose lengths, int64 (B,), the device alone knows: they add up to
        ``total``, which the last ``dummies`` of them see to, with ``spare`` tokens or fewer.

        Nothing is read on the host, nor copied from it, so a CUDA graph may hold the making. All
        that the host decides by is the same for any lengths: ``max_length`` is the width.
        """
        real = len(lengths) - dummies
        stops = F.pad(lengths.cumsum(0), (1, 0))
        places = torch.arange(total, device=lengths.device)
        sequences = torch.searchsorted(stops[1:], places, right=True)
        positions = places - stops[sequences]
        numbers = torch.arange(real, len(lengths), device=lengths.device)  # dummies are the longest
        order = torch.cat((numbers, torch.argsort(lengths[:real], descending=True, stable=True)))
        firsts = stops[order]
        return cls(
            batch_size=len(lengths),
            width=width,
            lengths=_OnTheDevice(),
            max_length=width,
            starts_padded=False,
            has_holes=False,
            cu_seqlens=stops.int(),
            rows=sequences * width + positions,
            sequences=sequences.int(),
            positions=positions.int(),
            work=_listed(order, lengths[order], firsts),
            padded_work=_listed(order, lengths[order], torch.zeros_like(firsts)),
            dummies=dummies,
            spare=spare,
        )

    @classmethod
    def _build(cls, width: int, lengths: list[int], rows: Tensor, tables: Tables) -> SequenceLayout:
        """Of rows without padding before or between tokens."""
        sequences = torch.div(rows, max(width, 1), rounding_mode="floor")
        positions = torch.arange(len(rows), device=rows.device) - tables[0][sequences]
        return cls._made(width, lengths, tables, rows, sequences.int(), positions.int())

    @classmethod
    def _made(
        cls,
        width: int,
        lengths: list[int],
        tables: Tables,
        rows: Tensor,
        sequences: Tensor,
        positions: Tensor,
        *,
        starts_padded: bool = False,
        has_holes: bool = False,
    ) -> SequenceLayout:
        cu_seqlens, work, padded_work = tables
        return cls(
            batch_size=len(lengths),
            width=width,
            lengths=tuple(lengths),
            max_length=max(lengths, default=0),
            starts_padded=starts_padded,
            has_holes=has_holes,
            cu_seqlens=cu_seqlens,
            rows=rows,
            sequences=sequences,
            positions=positions,
            work=work,
            padded_work=padded_work,
        )

    @property
    def total(self) -> int:
        """T, the valid tokens of the batch."""
        return self.rows.shape[0]

    @cached_property
    @outliving
    def columns(self) -> Tensor:
        """int64 (T,): the padded column n of each token, which BERT's position ids default to."""
        return self.rows - self.sequences.long() * self.width

    @cached_property
    @outliving
    def first_rows(self) -> Tensor:
        """int64 (B,): packed row of each sequence's first token, -1 where a sequence is empty."""
        starts = self.cu_seqlens.long()
        return torch.where(starts[1:] > starts[:-1], starts[:-1], -1)

    @cached_property
    @outliving
    def firsts(self) -> Tensor:
        """int64 (B,): likewise, row 0 where a sequence is empty."""
        return self.first_rows.clamp(min=0)

    @property
    def may_be_empty(self) -> bool:
        """Whether a sequence without a token is among them, as far as the host knows."""
        return isinstance(self.lengths, _OnTheDevice) or 0 in self.lengths

    @cached_property
    def is_full(self) -> bool:
        """No position is padding, so packing is a reshape."""
        return self.total == self.batch_size * self.width and not self.spare

    @property
    def counted(self) -> SequenceLayout:
        """Without dummies, whose rows then stand behind all sequences: what a loss counts."""
        return self._counted if self.dummies else self

    @cached_property
    @outliving
    def _counted(self) -> SequenceLayout:
        real = self.batch_size - self.dummies
        return replace(
            self,
            batch_size=real,
            cu_seqlens=self.cu_seqlens[: real + 1],
            work=self.work[self.dummies :],
            padded_work=self.padded_work[self.dummies :],
            dummies=0,
        )

    @cached_property
    @outliving
    def dead(self) -> Tensor:
        """bool (spare,), of the last rows: those behind all sequences."""
        places = torch.arange(self.total - self.spare, self.total, device=self.rows.device)
        return places >= self.cu_seqlens[-1]

    def over_tokens(self, mean: Tensor) -> Tensor:
        """The mean over tokens of what has been averaged over all rows, the dead ones being 0."""
        return mean * self.total / self.cu_seqlens[-1] if self.spare else mean

    def pack(self, padded: Tensor) -> Tensor:
        """(B, N, ...) -> (T, ...): drop the padding rows."""
        if padded.shape[:2] != (self.batch_size, self.width):
            raise ValueError(
                f"expected a tensor of shape ({self.batch_size}, {self.width}, ...) to pack; "
                f"got {tuple(padded.shape)}"
            )
        flat = padded.flatten(0, 1)
        return flat if self.is_full else flat.index_select(0, self.rows)

    def pad(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """(T, ...) -> (B, N, ...): put the tokens back, ``fill`` in the padding rows; without the
        dummies, if there are any.
        """
        if packed.shape[0] != self.total:
            raise ValueError(
                f"expected {self.total} packed rows; got a tensor of shape {tuple(packed.shape)}"
            )
        shape = (self.batch_size, self.width, *packed.shape[1:])
        if self.is_full:
            return packed.reshape(shape)
        flat = packed.new_full((self.batch_size * self.width, *packed.shape[1:]), fill)
        padded = flat.index_copy(0, self.rows, packed).view(shape)
        return padded[: self.batch_size - self.dummies] if self.dummies else padded


def counted_lengths(cu_seqlens: Tensor, longest: int) -> list[int]:
    """What a FLOP counter takes for the lengths: of tensors that hold nothing, the longest."""
    if type(cu_seqlens) not in TENSORS or cu_seqlens.is_meta:
        return [longest] * (len(cu_seqlens) - 1)
    return cu_seqlens.diff().tolist()


def full_cu_seqlens(batch_size: int, width: int, device: torch.device | str) -> Tensor:
    """Of a batch without padding."""
    return torch.arange(batch_size + 1, dtype=torch.int32, device=device).mul_(width)


def full_tables(batch_size: int, width: int, device: torch.device | str) -> Tables:
    """cu_seqlens, work and padded_work of a batch without padding.

    Made on the device: a copy from the host could not be part of a CUDA graph.
    """
    stops = full_cu_seqlens(batch_size, width, device)
    numbers = torch.arange(batch_size, dtype=torch.int32, device=device)
    firsts, lengths = stops[:-1], stops[1:] - stops[:-1]
    padded_work = _listed(numbers, lengths, torch.zeros_like(firsts))
    return stops, _listed(numbers, lengths, firsts), padded_work


def longest_first(lengths: Tensor, firsts: Tensor) -> Tensor:
    """A work list of int64 (B,) lengths and places of the first tokens, on their device."""
    order = torch.argsort(lengths, descending=True, stable=True)
    return _listed(order, lengths[order], firsts[order])


def _listed(sequences: Tensor, lengths: Tensor, firsts: Tensor) -> Tensor:
    return torch.stack((sequences, lengths, firsts, torch.zeros_like(sequences)), 1).int()


def _tables(lengths: list[int], columns: list[int], device: torch.device) -> Tables:
    """cu_seqlens, work and padded_work, in one copy from the host.

    columns: of each sequence's first token. Without tensors until the copy: for the few numbers of
    a batch, a dozen of PyTorch's operations take longer.
    """
    stops = array("i", itertools.accumulate(lengths, initial=0))
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    numbers = array("i")  # the lists in front: each of their rows begins at a multiple of 16 bytes
    for firsts in (stops, columns):
        entries = array("i", bytes(4 * 4 * len(order)))  # zeros
        entries[0::4] = array("i", order)
        entries[1::4] = array("i", map(lengths.__getitem__, order))
        entries[2::4] = array("i", map(firsts.__getitem__, order))
        numbers += entries
    numbers += stops
    tables = torch.frombuffer(numbers, dtype=torch.int32).to(device, non_blocking=True)
    work, padded_work, cu_seqlens = tables.split([4 * len(order), 4 * len(order), len(stops)])
    return cu_seqlens, work.view(-1, 4), padded_work.view(-1, 4)
