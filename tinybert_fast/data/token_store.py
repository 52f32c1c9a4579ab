"""The tokens of a corpus in flat files: written once in order, any range of them read back."""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Encoding, Tokenizer

from tinybert_fast.data.corpus import Corpus
from tinybert_fast.data.word_starts import ChineseWords

BLOCK_CHARS = 1 << 18  # tokenised at a time
KNOWN_CHARS = 1 << 20  # of the words whose tokens are remembered
PART_TOKENS = 1 << 20  # of one document that are paired at a time: bounds memory, not meaning


class Block(NamedTuple):
    """Some lines of a corpus, tokenised; T tokens in S sentences.

    ids: (T,). starts: uint8 (T,), 1 where a word begins, or None. lengths: int64 (S,), none of them
    0. documents: the sentences of the block before each end of a document. present, spread: the
    tokens there are, and in how many sentences each is.
    """

    ids: np.ndarray
    starts: np.ndarray | None
    lengths: np.ndarray
    documents: list[int]
    present: np.ndarray
    spread: np.ndarray


class BlockEncoder:
    """Lines and document ends (``Corpus.lines``) -> Block.

    tokenizer: a ``tokenizers.Tokenizer`` in JSON. Names of special tokens in the text are text.
    """

    def __init__(self, tokenizer: str, corpus: Corpus, words: str, dtype: np.dtype):
        self.tokenizer = Tokenizer.from_str(tokenizer)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True
        self.corpus, self.dtype = corpus, dtype
        self.chinese = ChineseWords() if words == "jieba" else None
        self.by_word = _by_word(json.loads(tokenizer))
        self._known: dict[str, bytes] = {}  # word -> its ids
        self._known_chars = 0

    def __call__(self, lines: list[str | None]) -> Block:
        texts: list[str] = []
        ends = []  # of documents, in texts
        for line in lines:
            if line is None:
                ends.append(len(texts))
            else:
                texts.extend(self.corpus.split(line))
        starts = None
        if self.chinese is not None:
            encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
            rows = self._bytes(encoded)
            flags = [self.chinese.starts(text, one.offsets) for text, one in zip(texts, encoded)]
            starts = np.concatenate([*flags, np.empty(0, np.uint8)])
        elif self.by_word:
            rows = self._encode_words(texts)
        else:
            rows = self._encode(texts)
        ids = np.frombuffer(b"".join(rows), self.dtype)
        lengths = np.array([len(row) for row in rows], dtype=np.int64) // self.dtype.itemsize
        sentence = np.repeat(np.arange(len(texts)), lengths)
        size = self.tokenizer.get_vocab_size()
        present, spread = np.unique(np.unique(sentence * size + ids) % size, return_counts=True)
        held = lengths > 0  # a sentence of marks that the tokenizer drops is none
        before = np.concatenate([[0], np.cumsum(held)])
        return Block(ids, starts, lengths[held], before[ends].tolist(), present, spread)

    def _encode(self, texts: list[str]) -> list[bytes]:
        return self._bytes(self.tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    def _encode_words(self, texts: list[str]) -> list[bytes]:
        """The same, with each different word tokenised once: text repeats its words."""
        split = [text.split(" ") for text in texts]
        if self._known_chars > KNOWN_CHARS:
            self._known, self._known_chars = {}, 0
        known = self._known
        new = list(set(chain.from_iterable(split)).difference(known))
        known.update(zip(new, self._encode(new)))
        self._known_chars += sum(map(len, new))
        return [b"".join([known[word] for word in words]) for words in split]

    def _bytes(self, encoded: list[Encoding]) -> list[bytes]:
        return [np.array(one.ids, self.dtype).tobytes() for one in encoded]


def _by_word(tokenizer: dict[str, Any]) -> bool:
    """Whether tokens never depend on what stands beyond a space: so with BERT's own parts."""
    parts = [
        (tokenizer[name] or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")
    ]
    added = [token["content"] for token in tokenizer["added_tokens"] if not token["special"]]
    return parts == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and not added


def blocks(lines: Iterable[str | None]) -> Iterator[list[str | None]]:
    """The same lines, BLOCK_CHARS or one line more at a time."""
    block: list[str | None] = []
    chars = 0
    for line in lines:
        block.append(line)
        chars += len(line or "")
        if chars >= BLOCK_CHARS:
            yield block
            block, chars = [], 0
    if block:
        yield block


class TokenWriter:
    """Blocks, added in order -> the files of a TokenStore; a context manager.

    Attributes:
        documents, sentences, tokens: what there is so far.
        counts, spread: of each token: occurrences, and sentences that hold it.
    """

    def __init__(self, folder: Path, *, words: bool):
        self.folder, self.words = folder, words
        self.documents = self.sentences = self.tokens = 0
        self.counts: Counter[int] = Counter()
        self.spread: Counter[int] = Counter()
        self._parts = array("q")  # document, first sentence, first token; and the next part's
        self._open = False  # the last document goes on

    def __enter__(self) -> "TokenWriter":
        self._stack = ExitStack()
        names = ("ids", "bounds", "starts") if self.words else ("ids", "bounds")
        self._files = {
            name: self._stack.enter_context((self.folder / name).open("wb")) for name in names
        }
        self._files["bounds"].write(np.zeros(1, np.int64).data)
        return self

    def __exit__(self, *error) -> None:
        self._stack.close()

    def add(self, block: Block) -> None:
        bounds = self.tokens + np.concatenate([[0], np.cumsum(block.lengths)])
        self._files["ids"].write(block.ids.data)
        self._files["bounds"].write(np.ascontiguousarray(bounds[1:]).data)
        if block.starts is not None:
            self._files["starts"].write(block.starts.data)
        first = 0
        for stop in block.documents:
            self._extend(first, stop, bounds)
            self._open = False
            first = stop
        self._extend(first, len(block.lengths), bounds)
        self.sentences += len(block.lengths)
        self.tokens += len(block.ids)
        present = block.present.tolist()
        counts = np.bincount(block.ids)[block.present]
        for total, new in ((self.counts, counts), (self.spread, block.spread)):
            total.update(dict(zip(present, new.tolist())))

    def _extend(self, first: int, stop: int, bounds: np.ndarray) -> None:
        """Sentences first to stop of a block belong to the open document, or to a new one."""
        if first == stop:
            return
        if not self._open:
            self.documents += 1
        elif bounds[first] - self._parts[-1] < PART_TOKENS:
            return
        self._open = True
        self._parts.extend((self.documents - 1, self.sentences + first, int(bounds[first])))

    def parts(self) -> np.ndarray:
        """int64 (P + 1, 3): document, first sentence and first token of each part, and an end."""
        end = (self.documents, self.sentences, self.tokens)
        return np.array(self._parts + array("q", end), np.int64).reshape(-1, 3)


class TokenStore:
    """Ranges of what a TokenWriter wrote: ``store["ids", start, stop]``, and so for "starts", both
    by token, and "bounds", int64, where sentence i is tokens bounds[i] to bounds[i + 1].

    Read rather than mapped: pages that were touched would count as this process's memory.
    """

    def __init__(self, folder: Path, dtype: np.dtype):
        self.dtypes = {"ids": dtype, "bounds": np.dtype(np.int64), "starts": np.dtype(np.uint8)}
        self._files = {
            name: (folder / name).open("rb", buffering=0)
            for name in self.dtypes
            if (folder / name).exists()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def __getitem__(self, where: tuple[str, int, int]) -> np.ndarray:
        name, start, stop = where
        file, width = self._files[name], self.dtypes[name].itemsize
        file.seek(start * width)
        return np.frombuffer(file.read((stop - start) * width), self.dtypes[name])
