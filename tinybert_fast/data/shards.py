"""Pre-training examples on disk: a corpus is tokenised once, paired, and kept as Arrow shards.

A folder of shards holds manifest.json and shard-00000.arrow, ..., files of the `datasets` library
with a row for each example:

    input_ids               [CLS] A [SEP] B [SEP], or without pairs [CLS] A [SEP]; uint16 while the
                            vocabulary allows, else int32
    length                  int32, of input_ids
    example_id              int64, shard << 32 | row, kept when rows are selected or shuffled
    first_length            int32, tokens of segment A with its [CLS] and [SEP] (only pairs)
    next_sentence_label     int8, 1 if B is from another document (only pairs)
    word_starts             bool, where a word begins (only words="jieba")

Everything is drawn by (seed, duplicate, part of the corpus); parts, and which of them a shard
holds, follow from the corpus alone. So the files do not depend on the number of processes.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets

from tinybert_fast.data.atomic import atomic_write, replacing_folder
from tinybert_fast.data.corpus import Corpus, CorpusPart
from tinybert_fast.data.progress import shown
from tinybert_fast.data.shard_maker import Pairing, Shard, ShardMaker, jobs_of
from tinybert_fast.data.token_store import BlockEncoder, TokenWriter, blocks
from tinybert_fast.data.word_starts import ChineseWords
from tinybert_fast.data.workers import in_order

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1
WORDS = ("wordpiece", "jieba")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MANY_UNKNOWN = 0.1  # a share of [UNK] that hints at another language's tokenizer


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


class Survey(NamedTuple):
    """Of a corpus that has been read once: the hash of ``Manifest.corpus``."""

    corpus: str
    documents: int


class Shards(NamedTuple):
    examples: Dataset  # rows as above, mapped from the disk
    manifest: Manifest


def fingerprint(tokenizer) -> str:
    """Of what decides which ids a text gets: vocabulary, special tokens and where they go,
    normalisation, splits, and the side that a long text is cut on.
    """
    parts = [
        sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.all_special_ids),
        tokenizer.truncation_side,
    ]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # its rules are Python's
        parts.append(type(tokenizer).__name__)
    else:
        rules = json.loads(backend.to_str())
        for of, name in ((rules, "truncation"), (rules, "padding"), (rules["model"], "vocab")):
            of.pop(name, None)  # what the latest call set, and what is said above
        parts.append(rules)
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
    options: dict[str, Any] = {
        "max_length": max_length,
        "nsp": nsp,
        "short": short,
        "duplicates": duplicates,
        "words": words,
        "seed": seed,
    }
    _check_options(**options, processes=processes)
    backend = _backend(tokenizer).to_str()
    size = len(tokenizer)
    dtype = np.dtype(np.uint16 if size <= 1 << 16 else np.int32)
    encoding = (backend, corpus, words, dtype)
    special = (tokenizer.cls_token_id, tokenizer.sep_token_id)
    pairing = Pairing(nsp, max_length - (3 if nsp else 2), short, seed, *special)
    if words == "jieba":
        ChineseWords()  # here first: worker processes share what it loads
    with _said_plainly(folder), replacing_folder(Path(folder)) as target:
        tokens = target / "tokens"
        tokens.mkdir()
        hashed = _Hashed(corpus.lines())
        with TokenWriter(tokens, words=words == "jieba") as writer:
            encoded = in_order(BlockEncoder, encoding, blocks(hashed), processes)
            for block in shown(encoded, "tokenising the corpus", on=progress):
                writer.add(block)
        _check_text(corpus, writer.documents if writer.tokens else 0, nsp)
        _check_tokens(writer, tokenizer)
        parts = writer.parts()
        jobs = jobs_of(parts, duplicates)
        made = in_order(ShardMaker, (target, tokens, dtype, parts, pairing), jobs, processes)
        shards = tuple(shown(made, "pairing sentences", len(jobs), on=progress))
        shutil.rmtree(tokens)
        manifest = Manifest(
            tokenizer=fingerprint(tokenizer),
            vocab_size=size,
            corpus=hashed.digest(),
            options={**options, "documents": corpus.documents, "sentences": corpus.sentences},
            documents=writer.documents,
            sentences=writer.sentences,
            tokens=writer.tokens,
            examples=sum(shard.examples for shard in shards),
            unrelated=sum(shard.unrelated for shard in shards),
            shards=shards,
            token_counts=[writer.counts[i] for i in range(size)],
            sentence_counts=[writer.spread[i] for i in range(size)],
        )
        if nsp and manifest.unrelated == manifest.examples:
            log.warning(
                "no pair has two sentences in a row, so next-sentence prediction is no task: does "
                "the text have sentence ends, or a sentence in each line? --no-nsp trains without"
            )
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


def survey(corpus: Corpus, *, nsp: bool) -> Survey:
    """Reads the corpus. Raises what ``write_shards`` raises of a text that does not serve."""
    hashed = _Hashed(corpus.lines())
    documents = sum(line is None for line in hashed)
    _check_text(corpus, documents, nsp)
    return Survey(hashed.digest(), documents)


def shards_of(
    corpus: Corpus,
    found: Survey,
    tokenizer,
    folder: str | Path,
    *,
    processes: int = 1,
    progress: bool = False,
    **options: Any,
) -> Shards:
    """The corpus as examples: opened in ``folder`` if they were made there before, else written.

    Their sub-folder is named after the text, the tokenizer and ``options`` (of ``write_shards``),
    so what is found under the name is what would be written. ValueError: the text has changed since
    it was ``found``.
    """
    rules = (corpus.sentences, fingerprint(tokenizer), sorted(options.items()), FORMAT)
    key = hashlib.sha256(repr((found.corpus, rules)).encode()).hexdigest()[:16]
    target = Path(folder) / f"shards-{key}"
    if not (target / MANIFEST).exists():
        made = write_shards(
            corpus, tokenizer, target, processes=processes, progress=progress, **options
        )
        if made.corpus != found.corpus:
            shutil.rmtree(target)
            raise ValueError(
                f"{corpus} changed after this run had first read it; start again when nothing "
                "writes to it"
            )
    return open_shards(target, tokenizer)


def _check_options(
    max_length: int, nsp: bool, short: float, duplicates: int, words: str, seed: int, processes: int
) -> None:
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


def _check_text(corpus: Corpus, documents: int, nsp: bool) -> None:
    held_out = isinstance(corpus, CorpusPart) and corpus.held_out
    remedy = "; hold out a larger share, or a text of its own" if held_out else ""
    if not documents:
        raise ValueError(f"{corpus} holds no text; expected sentences{remedy}")
    if nsp and documents == 1:
        raise ValueError(
            f"{corpus} is one document, and next-sentence pairs need sentences of another: give "
            "more documents (a blank line ends one; documents='files', --documents files: a file "
            f"is one), or train without pairs (nsp=False, --no-nsp){remedy}"
        )


def _check_tokens(writer: TokenWriter, tokenizer) -> None:
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
    last = max(tokenizer.get_vocab().values())
    if last >= len(tokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} numbers its {len(tokenizer)} tokens up to {last}; "
            "expected no gap (a token that stands twice in vocab.txt leaves one)"
        )
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
