"""Parts of a tokenised corpus -> one Arrow file of examples (columns: ``shards.py``)."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Features, Value
from datasets import List as ListOf
from datasets.arrow_writer import ArrowWriter

from tinybert_fast.data.pairs import Pair, Range, key, packed_sentences, sentence_pairs
from tinybert_fast.data.token_store import TokenStore

SHARD_TOKENS = 1 << 21  # of the corpus in one shard, or one part's more
NOTHING = Range(0, 0)  # segment B of an example without one


class Shard(NamedTuple):
    name: str
    examples: int
    unrelated: int
    size: int  # bytes


class Pairing(NamedTuple):
    """How parts of a corpus become examples."""

    nsp: bool
    room: int  # tokens of an example, special ones apart
    short: float
    seed: int
    cls: int
    sep: int


class Job(NamedTuple):
    number: int  # of the shard
    duplicate: int
    first: int  # parts of the corpus
    stop: int


class ShardMaker:
    """Job -> Shard, in a worker process."""

    def __init__(
        self, folder: Path, tokens: Path, dtype: np.dtype, parts: np.ndarray, pairing: Pairing
    ):
        self.folder, self.pairing, self.parts = folder, pairing, parts
        self.store = TokenStore(tokens, dtype)
        # What stands before segment A, and behind A and B, in each file of the store.
        marks = {"ids": (pairing.cls, pairing.sep), "starts": (1, 1)}
        self.marks = {
            name: tuple(np.array([mark], self.store.dtypes[name]) for mark in marks[name])
            for name in ("ids", "starts")
            if name in self.store
        }
        features = {
            "input_ids": ListOf(Value(dtype.name)),
            "length": Value("int32"),
            "example_id": Value("int64"),
        }
        if pairing.nsp:
            features |= {"first_length": Value("int32"), "next_sentence_label": Value("int8")}
        if "starts" in self.store:
            features["word_starts"] = ListOf(Value("bool"))
        self.features = Features(features)

    def __call__(self, job: Job) -> Shard:
        pairs: list[Pair] = []
        taken: dict[str, list[np.ndarray]] = {name: [] for name in self.marks}
        for part in range(job.first, job.stop):
            made = list(self._pairs(part, key(self.pairing.seed, job.duplicate, part)))
            pairs += made
            for name, (opening, closing) in self.marks.items():
                take = self._taker(name, part)
                for a, b, _ in made:
                    taken[name] += [opening, take(a), closing]
                    if b.stop > b.start:
                        taken[name] += [take(b), closing]
        ranges = np.array([(*a, *b) for a, b, _ in pairs])  # (E, 4)
        first = ranges[:, 1] - ranges[:, 0] + 2
        length = first + (ranges[:, 3] - ranges[:, 2] + 1 if self.pairing.nsp else 0)
        offsets = np.concatenate([[0], np.cumsum(length)])
        columns: dict[str, Any] = {
            "input_ids": _lists(offsets, np.concatenate(taken["ids"])),
            "length": length.astype(np.int32),
            "example_id": job.number << 32 | np.arange(len(pairs)),
        }
        unrelated = np.array([pair.unrelated for pair in pairs], np.int8)
        if self.pairing.nsp:
            columns["first_length"] = first.astype(np.int32)
            columns["next_sentence_label"] = unrelated
        if "starts" in taken:
            starts = np.concatenate(taken["starts"]).astype(bool)
            starts[offsets[:-1] + 1] = True  # a segment may begin inside a word
            if self.pairing.nsp:
                starts[offsets[:-1] + first] = True
            columns["word_starts"] = _lists(offsets, starts)
        file = self.folder / f"shard-{job.number:05}.arrow"
        with ArrowWriter(path=str(file), features=self.features) as writer:
            writer.write_table(pa.table(columns))
            writer.finalize()
        return Shard(file.name, len(pairs), int(unrelated.sum()), file.stat().st_size)

    def _pairs(self, part: int, draw: Random) -> Iterator[Pair]:
        first, stop = self.parts[part : part + 2, 1].tolist()
        bounds = self.store["bounds", first, stop + 1].tolist()
        room, short = self.pairing.room, self.pairing.short
        if self.pairing.nsp:
            other = partial(self._other, draw, *self._document(part))
            return sentence_pairs(bounds, room, short, draw, other)
        return (Pair(a, NOTHING, 0) for a in packed_sentences(bounds, room, short, draw))

    def _document(self, part: int) -> tuple[int, int]:
        """The parts of the same document: first and stop."""
        documents = self.parts[:-1, 0]
        return (
            int(np.searchsorted(documents, documents[part], "left")),
            int(np.searchsorted(documents, documents[part], "right")),
        )

    def _other(self, draw: Random, first: int, stop: int, tokens: int) -> Range:
        """Sentences from anywhere but parts ``first`` to ``stop``, up to ``tokens`` if they go so
        far in their part.
        """
        part = int(draw.random() * (len(self.parts) - 1 - (stop - first)))
        if part >= first:
            part += stop - first
        low, high = self.parts[part : part + 2, 1].tolist()
        sentence = low + int(draw.random() * (high - low))
        bounds = self.store["bounds", sentence, min(high, sentence + max(1, tokens)) + 1]
        last = int(np.searchsorted(bounds, bounds[0] + max(1, tokens)))
        return Range(int(bounds[0]), int(bounds[min(last, len(bounds) - 1)]))

    def _taker(self, name: str, part: int) -> Callable[[Range], np.ndarray]:
        start, stop = self.parts[part : part + 2, 2].tolist()
        local = self.store[name, start, stop]

        def take(where: Range) -> np.ndarray:
            if start <= where.start and where.stop <= stop:
                return local[where.start - start : where.stop - start]
            return self.store[name, where.start, where.stop]

        return take


def jobs_of(parts: np.ndarray, duplicates: int) -> list[Job]:
    """Parts in a row, of SHARD_TOKENS or one part more, once for each duplicate."""
    cuts, begun = [0], 0
    for part in range(1, len(parts)):
        if parts[part, 2] - begun >= SHARD_TOKENS or part == len(parts) - 1:
            cuts.append(part)
            begun = parts[part, 2]
    ranges = [(d, *cut) for d in range(duplicates) for cut in pairwise(cuts)]
    return [Job(number, *what) for number, what in enumerate(ranges)]


def _lists(offsets: np.ndarray, values: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
