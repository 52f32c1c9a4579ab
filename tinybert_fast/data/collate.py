"""Batches of similar length, padded on the right."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

WINDOW_BATCHES = 50  # sorted by length together: little padding, and still random
# Columns that batches are made of: with an entry for each token, and one for each example.
PER_TOKEN = ("input_ids", "token_type_ids", "word_starts")
PER_ROW = ("label", "index", "example_id", "first_length", "next_sentence_label")

Columns = dict[str, np.ndarray]  # see `Rows`


class LengthCollator:
    """Encoded examples -> {input_ids, attention_mask, token_type_ids: (B, N) int64, labels: (B,)}.

    N is the longest example, rounded up to `pad_to_multiple_of`. `labels` is there if the examples
    have `label`; so is `index`, as a list: which examples they are. `lengths=True` adds the lengths
    as a list: a packed encoder then need not ask the device for them. Examples are a list of them,
    or what `Rows` gives.
    """

    def __init__(self, tokenizer, pad_to_multiple_of: int | None = None, *, lengths: bool = False):
        self.pad_id = tokenizer.pad_token_id
        self.multiple = pad_to_multiple_of or 1
        self.lengths = lengths

    def __call__(self, examples: Sequence[Mapping] | Columns) -> dict[str, Any]:
        columns = columns_of(examples)
        batch: dict[str, Any] = padded(columns, self.pad_id, self.multiple)
        if "label" in columns:
            labels = torch.tensor(columns["label"])
            batch["labels"] = labels.float() if labels.is_floating_point() else labels.long()
        if "index" in columns:
            batch["index"] = columns["index"].tolist()
        if self.lengths:
            batch["lengths"] = columns["lengths"].tolist()
        return batch


class Rows(Dataset):
    """Encoded examples as a DataLoader reads them for `LengthCollator` and `PreTrainingCollator`: a
    batch comes as columns, of a table, and no token becomes a Python number, which would take most
    of a batch's time.
    """

    def __init__(self, encoded) -> None:
        names = [name for name in (*PER_TOKEN, *PER_ROW) if name in encoded.column_names]
        self.table = encoded.with_format("arrow", columns=names)

    def __len__(self) -> int:
        return len(self.table)

    def __getitems__(self, rows: Sequence[int]) -> Columns:
        """Those of PER_TOKEN and PER_ROW that are there: of all rows, one behind the other, and
        (rows,); "lengths": (rows,), of input_ids.
        """
        import pyarrow.compute as pc  # which masking does without

        found = self.table[rows]
        columns = {
            name: pc.list_flatten(found[name]) if name in PER_TOKEN else found[name]
            for name in found.column_names
        }
        columns["lengths"] = pc.list_value_length(found["input_ids"])
        return {name: column.to_numpy() for name, column in columns.items()}


def columns_of(examples: Sequence[Mapping] | Columns) -> Columns:
    """As `Rows` gives them."""
    if isinstance(examples, dict):
        return examples
    first = examples[0]
    found = {n: np.concatenate([e[n] for e in examples]) for n in PER_TOKEN if n in first}
    found |= {n: np.array([e[n] for e in examples]) for n in PER_ROW if n in first}
    return {**found, "lengths": np.array([len(e["input_ids"]) for e in examples])}


def padded(columns: Columns, pad_id: int, multiple: int) -> dict[str, torch.Tensor]:
    """{name: int64 (B, N)} of PER_TOKEN, padded on the right, and attention_mask. N is the longest
    example, rounded up to ``multiple``.
    """
    lengths = columns["lengths"]
    width = -(-int(lengths.max()) // multiple) * multiple
    real = np.arange(width) < lengths[:, None]
    found = {"attention_mask": torch.from_numpy(real.astype(np.int64))}
    for name in PER_TOKEN:
        if name in columns:
            tokens = np.full(real.shape, pad_id if name == "input_ids" else 0, np.int64)
            tokens[real] = columns[name]
            found[name] = torch.from_numpy(tokens)
    return found


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
