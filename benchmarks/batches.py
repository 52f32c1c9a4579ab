"""Seeded batches of BERT inputs with lengths drawn over a range, as real text has them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tinybert_fast.ops.layout import SequenceLayout

FILL = 0.6  # share of positions that are real, unless asked for another
SHORTEST = 0.2  # of the width at that share, where lengths spread evenly over [0.2, 1]
LABELLED = 0.15  # of the tokens between [CLS] and [SEP]
IGNORED = -100
MASK = 103  # [MASK] in BERT's English vocabulary; ids drawn for words start above it
MOST_ON_GPU = 8  # buckets
SPECIAL = 2  # [CLS] and [SEP]


@dataclass(frozen=True, eq=False)
class Batch:
    """Right-padded (B, N) ids, mask, types and masked-LM labels (-100 where there is none); of each
    sequence (B,) a class, 0 or 1."""

    lengths: tuple[int, ...]
    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor
    labels: Tensor
    classes: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "token_type_ids": self.token_type_ids,
        }

    @property
    def shape(self) -> tuple[int, int]:
        batch, width = self.input_ids.shape
        return batch, width

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def is_full(self) -> bool:
        """No position is padding."""
        return self.tokens == self.input_ids.numel()

    @cached_property
    def places(self) -> Tensor:
        """int64 (T,): flat places b * N + n of the tokens, made from the lengths on the host, so
        that nobody waits for the device to count them."""
        width = self.input_ids.shape[1]
        places = [torch.arange(n) + b * width for b, n in enumerate(self.lengths)]
        return torch.cat(places).to(self.input_ids.device)

    @cached_property
    def packed_inputs(self) -> dict[str, Tensor]:
        """int64 (1, T) each: the tokens one behind another, with their positions, as Transformers'
        DataCollatorWithFlattening gives them."""
        positions = self.places % self.input_ids.shape[1]
        ids, types = (
            x.flatten().index_select(0, self.places) for x in (self.input_ids, self.token_type_ids)
        )
        found = {"input_ids": ids, "token_type_ids": types, "position_ids": positions}
        return {name: x.unsqueeze(0) for name, x in found.items()}

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """int32 (B + 1,): where sequences begin among the T tokens, and T."""
        ends = torch.tensor((0, *self.lengths)).cumsum(0, dtype=torch.int32)
        return ends.to(self.input_ids.device)

    @cached_property
    def packed_rows(self) -> Tensor:
        """int64 (B N,): of each flat place of a token, its number among the T tokens."""
        rows = torch.zeros_like(self.input_ids).flatten()
        return rows.index_copy(0, self.places, torch.arange(self.tokens, device=rows.device))

    @cached_property
    def labelled(self) -> Tensor:
        """int64 (R,): flat places of the labels. Read from the device once."""
        return (self.labels.flatten() != IGNORED).nonzero().squeeze(1)

    @cached_property
    def firsts(self) -> Tensor:
        """int64 (B,): flat places of the first tokens."""
        batch, width = self.input_ids.shape
        return torch.arange(batch, device=self.input_ids.device) * width

    @property
    def layout(self) -> SequenceLayout:
        """As a collator makes it, which knows the lengths: nothing is read from the device."""
        width = self.input_ids.shape[1]
        return SequenceLayout.from_lengths(self.lengths, width, self.input_ids.device)

    @property
    def longest_first(self) -> list[int]:
        """Numbers of the sequences."""
        return sorted(range(len(self.lengths)), key=lambda b: -self.lengths[b])

    def buckets(self, count: int) -> list[Batch]:
        """Sorted by length and cut into ``count`` batches, each trimmed to its longest sequence."""
        order = self.longest_first
        size = -(-len(order) // count)
        return [self.rows(order[i : i + size]) for i in range(0, len(order), size)]

    def rows(self, numbers: list[int]) -> Batch:
        """These sequences, trimmed to the longest of them."""
        longest = max(self.lengths[b] for b in numbers)
        index = torch.tensor(numbers, device=self.input_ids.device)
        padded = (self.input_ids, self.attention_mask, self.token_type_ids, self.labels)
        parts = [x.index_select(0, index)[:, :longest].contiguous() for x in padded]
        parts.append(self.classes.index_select(0, index))
        return Batch(tuple(self.lengths[b] for b in numbers), *parts)


def bucket_counts(batch: Batch) -> tuple[int, ...]:
    """What a careful user would try: 1, 2, 4, ... up to one sequence per bucket; up to
    MOST_ON_GPU on a GPU, which small batches leave idle; 1 without padding."""
    if batch.is_full:
        return (1,)
    counts = tuple(1 << i for i in range(len(batch.lengths).bit_length()))
    if batch.input_ids.is_cuda:
        return tuple(n for n in counts if n <= MOST_ON_GPU)
    return counts


def draw_lengths(
    batch: int, width: int, generator: torch.Generator, fill: float = FILL
) -> list[int]:
    """One length from each of ``batch`` equal slices of [0.2, 1] * width, in random order.

    Places within the slices come in opposite pairs, so the mean is 0.6 * width at any batch size.
    With another ``fill`` the shortest moves in proportion, the longest is still about the width,
    and a power of the place between them makes the mean about fill * width: fewer long ones, as
    text has them, the lower it is.
    """
    shortest = SHORTEST / FILL * fill
    half = torch.rand(batch // 2, generator=generator)
    within = torch.cat([half, half.new_full((batch % 2,), 0.5), 1 - half.flip(0)])
    at = (torch.arange(batch) + within) / batch
    at = at ** ((1 - fill) / (fill - shortest))
    lengths = (width * (shortest + (1 - shortest) * at)).round().long().clamp(SPECIAL + 1, width)
    return lengths[torch.randperm(batch, generator=generator)].tolist()


def draw_batch(
    lengths: list[int],
    width: int,
    vocabulary: int,
    generator: torch.Generator,
    device: torch.device,
) -> Batch:
    """Random words between a first and a last special token; 15 % of them labelled and masked."""
    batch = len(lengths)
    first = min(MASK + 1, vocabulary // 2)
    ids = torch.randint(first, vocabulary, (batch, width), generator=generator)
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    labels = torch.full((batch, width), IGNORED)
    for b, length in enumerate(lengths):
        words = length - SPECIAL
        chosen = 1 + torch.randperm(words, generator=generator)[: max(1, round(LABELLED * words))]
        labels[b, chosen] = ids[b, chosen]
        ids[b, chosen] = min(MASK, first - 1)
    # One sequence in four of the other class: halves would leave the class bias no gradient.
    classes = (torch.arange(batch) % 4 == 0).long()
    drawn = (ids * real, real.long(), torch.zeros_like(ids), labels, classes)
    return Batch(tuple(lengths), *(x.to(device) for x in drawn))
