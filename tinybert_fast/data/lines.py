"""Unlabelled text, one sentence per line, encoded into a file that is mapped rather than read."""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from datasets import Dataset, Features, Value
from datasets import List as ListOf
from datasets.arrow_writer import ArrowWriter

from tinybert_fast.data.atomic import replacing
from tinybert_fast.data.progress import shown
from tinybert_fast.data.text_files import read_lines, text_files

log = logging.getLogger(__name__)

ENCODE_LINES = 10_000  # tokenised at a time: bounds the Python lists alive at once


@dataclass(frozen=True)
class Lines:
    """Text files, or texts at hand; blank lines do not count. Re-readable."""

    paths: tuple[Path, ...] = ()
    texts: tuple[str, ...] = ()

    @classmethod
    def of(cls, source: str | Path | Sequence[str | Path]) -> "Lines":
        """A path or several of files or folders (``text_files``), or a list of texts.

        Strings in a list are paths if the first one names a file, texts otherwise.
        """
        several = [source] if isinstance(source, str | Path) else list(source)
        if not several:
            raise ValueError("the corpus is empty; expected a text file, or a list of sentences")
        alone = isinstance(source, str | Path)
        if alone or isinstance(several[0], Path) or _is_file(several[0]):
            return cls(paths=text_files(source))
        return cls(texts=tuple(str(text) for text in several))

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            if text.strip():
                yield text.strip()
        for path in self.paths:
            yield from filter(None, read_lines(path))

    def survey(self, progress: bool = False) -> tuple[int, str]:
        """(lines that hold text, a hash of them); refuses a corpus without any."""
        digest, count = hashlib.sha256(), 0
        for line in shown(self, "reading the corpus", on=progress):
            digest.update(line.encode() + b"\n")
            count += 1
        if not count:
            where = ", ".join(map(str, self.paths)) or "the list of texts"
            raise ValueError(f"{where} holds no text; expected one sentence per line")
        return count, digest.hexdigest()[:16]


def encode_lines(lines: Iterable[str], tokenizer, max_length: int, file: Path) -> Dataset:
    """input_ids, token_type_ids, attention_mask, length of each line, written to ``file`` (Arrow).

    Any size: the answer is mapped from the disk. A file that is there already is taken as it is, so
    its name should tell what is in it. Lines of more than ``max_length`` tokens are cut; one log
    line says how many.
    """
    if not file.exists():
        features = Features(
            {
                "input_ids": ListOf(Value("int32")),
                "token_type_ids": ListOf(Value("int8")),
                "attention_mask": ListOf(Value("int8")),
                "length": Value("int32"),
            }
        )
        count = truncated = 0
        lines = iter(lines)
        with (
            replacing(file) as partial,
            ArrowWriter(path=str(partial), features=features) as writer,
        ):
            while block := list(islice(lines, ENCODE_LINES)):
                whole = tokenizer(block, return_attention_mask=False, verbose=False)["input_ids"]
                long = [i for i, ids in enumerate(whole) if len(ids) > max_length]
                for i in long:
                    whole[i] = tokenizer(block[i], truncation=True, max_length=max_length)[
                        "input_ids"
                    ]
                lengths = [len(ids) for ids in whole]
                writer.write_batch(
                    {
                        "input_ids": whole,
                        "token_type_ids": [[0] * n for n in lengths],
                        "attention_mask": [[1] * n for n in lengths],
                        "length": lengths,
                    }
                )
                count, truncated = count + len(block), truncated + len(long)
            writer.finalize()
        if truncated:
            log.warning("truncated %d of %d texts to %d tokens", truncated, count, max_length)
    return Dataset.from_file(str(file))


def _is_file(text: str | Path) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # a sentence too long for a file name
        return False
