"""Batches of similar length, padded on the right."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

WINDOW_BATCHES = 50  # sorted by length together: little padding, and still random


class LengthCollator:
    """Encoded examples -> {input_ids, attention_mask, token_type_ids: (B, N) int64, labels: (B,)}.

    N is the longest example, rounded up to `pad_to_multiple_of`. `labels` is there if the examples
    have `label`; so is `index`, as a list: which examples they are. `lengths=True` adds the lengths
    as a list: a packed encoder then need not ask the device for them.
    """

    def __init__(self, tokenizer, pad_to_multiple_of: int | None = None, *, lengths: bool = False):
        self.pad_id = tokenizer.pad_token_id
        self.multiple = pad_to_multiple_of or 1
        self.lengths = lengths

    def __call__(self, examples: Sequence[Mapping]) -> dict[str, Any]:
        lengths = [len(example["input_ids"]) for example in examples]
        width = -(-max(lengths) // self.multiple) * self.multiple
        batch: dict[str, Any] = {
            "input_ids": torch.full((len(examples), width), self.pad_id, dtype=torch.int64),
            "attention_mask": torch.zeros(len(examples), width, dtype=torch.int64),
            "token_type_ids": torch.zeros(len(examples), width, dtype=torch.int64),
        }
        for row, (example, n) in enumerate(zip(examples, lengths, strict=True)):
            batch["input_ids"][row, :n] = torch.as_tensor(example["input_ids"])
            batch["token_type_ids"][row, :n] = torch.as_tensor(example["token_type_ids"])
            batch["attention_mask"][row, :n] = 1
        if "label" in examples[0]:
            labels = [example["label"] for example in examples]
            dtype = torch.float32 if isinstance(labels[0], float) else torch.int64
            batch["labels"] = torch.tensor(labels, dtype=dtype)
        if "index" in examples[0]:
            batch["index"] = [example["index"] for example in examples]
        if self.lengths:
            batch["lengths"] = lengths
        return batch


class LengthGroupedSampler(Sampler[int]):
    """A random order in which every `batch_size` neighbours have similar lengths.

    Shuffle, sort by length within windows of WINDOW_BATCHES batches, cut into batches, shuffle
    these. With `batch_size` = the examples of one optimizer step, all ranks of a step get equal
    work, and steps do not depend on the number of ranks. The longest batch comes first, so that
    memory runs out at once or not at all; the incomplete one comes last, or with `drop_last` not at
    all.

    The order is a function of (seed, epoch) alone, never of torch's generator: an epoch resumed in
    the middle goes on with the same batches.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = False,
    ):
        self.lengths = np.asarray(lengths)
        self.chunk = batch_size
        self.rest = 0 if drop_last else len(self.lengths) % batch_size
        self.window = batch_size * WINDOW_BATCHES
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths) // self.chunk * self.chunk + self.rest

    def __iter__(self) -> Iterator[int]:
        draw = np.random.default_rng((self.seed, self.epoch))
        order = draw.permutation(len(self.lengths))
        whole = len(order) // self.chunk * self.chunk
        rest = order[whole : whole + self.rest]
        chunks = []
        for start in range(0, whole, self.window):
            part = order[start : min(start + self.window, whole)]
            part = part[np.argsort(-self.lengths[part], kind="stable")]
            chunks += np.split(part, range(self.chunk, len(part), self.chunk))
        chunks = [chunks[i] for i in draw.permutation(len(chunks))]
        if chunks:
            longest = max(range(len(chunks)), key=lambda i: self.lengths[chunks[i]].max())
            chunks[0], chunks[longest] = chunks[longest], chunks[0]
        order = np.concatenate([*chunks, rest])  # kept as 8 bytes each
        starts = range(0, len(order), self.chunk)
        return (i for start in starts for i in order[start : start + self.chunk].tolist())


def lengths_of(encoded) -> np.ndarray:
    """(rows,), at once: a column of a dataset gives its numbers one by one."""
    return encoded.with_format("numpy")["length"][:]


def sort_by_length(encoded) -> tuple:
    """(the encoded examples, longest first; their original indices (rows,)): the least padding for
    evaluation.
    """
    order = np.argsort(-lengths_of(encoded), kind="stable")
    return encoded.select(order), order
