"""Pre-training examples on disk: a corpus is tokenised once, paired, and kept as Arrow shards.

A folder of shards holds manifest.json and shard-00000.arrow, ..., files of the `datasets` library
with a row for each example:

    input_ids               [CLS] A [SEP] B [SEP], or without pairs [CLS] A [SEP]; uint16 while the
                            vocabulary allows, else int32
    length                  int32, of input_ids
    example_id              int64, shard << 32 | row, kept when rows are selected or shuffled
    first_length            int32, tokens of segment A with its [CLS] and [SEP]       (pairs only)
    next_sentence_label     int8, 1 if B is from another document                     (pairs only)
    word_starts             bool, where a word begins                  (words="jieba")

Everything is drawn by (seed, duplicate, part of the corpus), and what a part and a shard is
follows from the corpus alone, so the files do not depend on the number of processes.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features, Value, concatenate_datasets
from datasets import List as ListOf
from datasets.arrow_writer import ArrowWriter

from tinybert_fast.data.atomic import atomic_write, replacing_folder
from tinybert_fast.data.corpus import Corpus
from tinybert_fast.data.pairs import Pair, Range, key, packed_sentences, sentence_pairs
from tinybert_fast.data.progress import shown
from tinybert_fast.data.token_store import BlockEncoder, TokenStore, TokenWriter, blocks
from tinybert_fast.data.word_starts import ChineseWords
from tinybert_fast.data.workers import in_order

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
SHARD_TOKENS = 1 << 22  # of the corpus in one shard, or one part's more
WORDS = ("wordpiece", "jieba")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOTHING = Range(0, 0)  # segment B of an example without one
MANY_UNKNOWN = 0.1  # a share of [UNK] that hints at another language's tokenizer


class Shard(NamedTuple):
    name: str
    examples: int
    unrelated: int
    size: int  # bytes


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds.

    Attributes:
        tokenizer: its ``fingerprint``. vocab_size: V.
        corpus: hash of the lines and where documents end.
        options: those of ``write_shards`` and of the Corpus that decide what the examples are.
        documents, sentences, tokens: of the corpus.
        unrelated: examples whose segment B is from another document.
        token_counts: (V,) occurrences of each token in the corpus.
        sentence_counts: (V,) sentences that hold it.
    """

    tokenizer: str
    vocab_size: int
    corpus: str
    options: dict[str, Any]
    documents: int
    sentences: int
    tokens: int
    examples: int
    unrelated: int
    shards: tuple[Shard, ...]
    token_counts: list[int]
    sentence_counts: list[int]
    format: int = FORMAT


class Shards(NamedTuple):
    examples: Dataset  # rows as above, mapped from the disk
    manifest: Manifest


def fingerprint(tokenizer) -> str:
    """Of what decides which ids a text gets: vocabulary, special tokens, normalisation, splits."""
    backend = json.loads(_backend(tokenizer).to_str())
    parts = (
        sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.all_special_ids),
        backend["normalizer"],
        backend["pre_tokenizer"],
    )
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def write_shards(
    corpus: Corpus | str | Path | Sequence[str | Path],
    tokenizer,
    folder: str | Path,
    *,
    max_length: int = 128,
    nsp: bool = True,
    short: float = 0.1,
    duplicates: int = 1,
    words: str = "wordpiece",
    seed: int = 0,
    processes: int = 1,
    progress: bool = False,
) -> Manifest:
    """Tokenises a corpus and writes its examples to ``folder``, whole or not at all.

    Memory does not grow with the corpus; the disk takes its tokens (2 bytes each) twice meanwhile.

    Args:
        corpus: a Corpus, or what ``Corpus.of`` takes. tokenizer: a fast one, with BERT's tokens.
        max_length: tokens of an example, special ones included.
        nsp: sentence pairs; without, whole sentences of one document in a row.
        short: share of examples with a random smaller target length (BERT: 0.1).
        duplicates: times that the corpus is paired, differently each time.
        words: where whole words begin: "wordpiece" reads it off the tokens and stores nothing,
            "jieba" is for Chinese.
        processes: that tokenise and pair; the files do not depend on it.

    Raises:
        FileExistsError: ``folder`` holds something. FileNotFoundError: a file that has gone.
        ModuleNotFoundError: jieba is missing. OSError: the disk is full.
        ValueError: no text, bytes that are not UTF-8, pairs from a single document, options or a
            tokenizer that do not serve.
    """
    corpus = Corpus.of(corpus)
    room = max_length - (3 if nsp else 2)
    for name, value, least in (
        ("max_length", max_length, 5 if nsp else 3),
        ("duplicates", duplicates, 1),
        ("processes", processes, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; expected {least} or more")
    if not 0.0 <= short <= 1.0:
        raise ValueError(f"short is {short}; expected a share from 0 to 1")
    if words not in WORDS:
        raise ValueError(f"words is {words!r}; expected one of {', '.join(WORDS)}")
    backend = _backend(tokenizer).to_str()
    size = len(tokenizer)
    dtype = np.dtype(np.uint16 if size <= 1 << 16 else np.int32)
    if words == "jieba":
        ChineseWords()  # here first: worker processes share what it loads
    with _said_plainly(folder), replacing_folder(Path(folder)) as target:
        scratch = target / "tokens"
        scratch.mkdir()
        hashed = _Hashed(corpus.lines())
        with TokenWriter(scratch, words=words == "jieba") as writer:
            setup = (backend, corpus, words, dtype)
            encoded = in_order(BlockEncoder, setup, blocks(hashed), processes)
            for block in shown(encoded, "tokenising the corpus", on=progress):
                writer.add(block)
        _check(corpus, writer, nsp, tokenizer)
        parts = writer.parts()
        pairing = Pairing(nsp, room, short, seed, tokenizer.cls_token_id, tokenizer.sep_token_id)
        jobs = _jobs(parts, duplicates)
        made = in_order(ShardMaker, (target, scratch, dtype, parts, pairing), jobs, processes)
        shards = tuple(shown(made, "pairing sentences", len(jobs), on=progress))
        shutil.rmtree(scratch)
        manifest = Manifest(
            tokenizer=fingerprint(tokenizer),
            vocab_size=size,
            corpus=hashed.digest(),
            options={
                "max_length": max_length, "nsp": nsp, "short": short, "duplicates": duplicates,
                "words": words, "seed": seed, "documents": corpus.documents,
                "sentences": corpus.sentences,
            },
            documents=writer.documents,
            sentences=writer.sentences,
            tokens=writer.tokens,
            examples=sum(shard.examples for shard in shards),
            unrelated=sum(shard.unrelated for shard in shards),
            shards=shards,
            token_counts=[writer.counts[i] for i in range(size)],
            sentence_counts=[writer.spread[i] for i in range(size)],
        )  # fmt: skip
        if nsp and manifest.unrelated == manifest.examples:
            log.warning("no pair has two sentences in a row: next-sentence prediction is no task")
        atomic_write(target / MANIFEST, json.dumps(vars(manifest)))
    return manifest


def open_shards(folder: str | Path, tokenizer) -> Shards:
    """The examples of a folder that ``write_shards`` wrote.

    Raises:
        FileNotFoundError: no such folder. ValueError: another tokenizer, or shards that are missing
            or damaged.
    """
    folder = Path(folder)
    try:
        content = (folder / MANIFEST).read_text()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"{folder} holds no {MANIFEST}; expected a folder of pre-training shards"
        ) from None
    try:
        fields = json.loads(content)
        if fields["format"] != FORMAT:
            raise ValueError(
                f"{folder}: its shards have format {fields['format']}, this version reads {FORMAT};"
                " write them anew"
            )
        shards = tuple(Shard(*shard) for shard in fields.pop("shards"))
        manifest = Manifest(shards=shards, **fields)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / MANIFEST} is damaged ({error}); write the shards anew"
        ) from None
    if manifest.tokenizer != fingerprint(tokenizer):
        raise ValueError(
            f"{folder}: its shards were made with another tokenizer ({manifest.vocab_size} tokens, "
            f"fingerprint {manifest.tokenizer}) than this one ({len(tokenizer)} tokens, "
            f"{fingerprint(tokenizer)}); write them anew, or give the tokenizer they were made with"
        )
    for shard in shards:
        file = folder / shard.name
        found = file.stat().st_size if file.is_file() else 0
        if found != shard.size:
            raise ValueError(
                f"{file} has {found} bytes, {MANIFEST} says {shard.size}; write the shards anew"
            )
    examples = [Dataset.from_file(str(folder / shard.name)) for shard in shards]
    return Shards(concatenate_datasets(examples), manifest)


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


def _jobs(parts: np.ndarray, duplicates: int) -> list[Job]:
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


def _check(corpus: Corpus, writer: TokenWriter, nsp: bool, tokenizer) -> None:
    if not writer.tokens:
        raise ValueError(f"{corpus} holds no text; expected sentences")
    if nsp and writer.documents == 1:
        raise ValueError(
            f"{corpus} is one document, and next-sentence pairs need sentences of another: give "
            "more documents (a blank line ends one; documents='files' takes each file for one), or "
            "train without pairs (nsp=False, --no-nsp)"
        )
    unknown = writer.counts[tokenizer.unk_token_id] / writer.tokens
    if unknown > MANY_UNKNOWN:
        log.warning(
            "%.0f %% of the corpus is %s to this tokenizer; is it one for this language?",
            100 * unknown,
            tokenizer.unk_token,
        )


def _backend(tokenizer):
    """The ``tokenizers.Tokenizer`` of a tokenizer that has BERT's special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer (tokenizers library)")
    missing = [
        name
        for name in ("cls_token", "sep_token", "pad_token", "mask_token", "unk_token")
        if getattr(tokenizer, name) is None
    ]
    if missing:
        raise ValueError(f"{type(tokenizer).__name__} has no {', '.join(missing)}")
    return backend


class _Hashed:
    """Lines that pass through, and their hash."""

    def __init__(self, lines: Iterable[str | None]):
        self._lines, self._hash = lines, hashlib.sha256()

    def __iter__(self) -> Iterator[str | None]:
        for line in self._lines:
            self._hash.update(b"\n" if line is None else line.encode() + b"\n")
            yield line

    def digest(self) -> str:
        return self._hash.hexdigest()[:16]


@contextmanager
def _said_plainly(folder: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise OSError(
            error.errno,
            f"no room for the shards in {folder} ({os.strerror(error.errno)}); what was written is "
            "removed. They need about 4 bytes for each token of the corpus and 2 more for each "
            "further duplicate",
        ) from None
