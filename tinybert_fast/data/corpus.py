"""Plain text as documents and sentences, read in one pass that keeps nothing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tinybert_fast.data.sentences import pieces, split_sentences
from tinybert_fast.data.text_files import read_lines, text_files

DOCUMENTS = ("blank-lines", "files")
SENTENCES = ("split", "lines")


@dataclass(frozen=True)
class Corpus:
    """Text files whose documents and sentences are told apart by a rule.

    Attributes:
        paths: the files, each of which begins a document.
        documents: "blank-lines" ends a document at a blank line too, as BERT's files do; "files"
            takes blank lines for paragraphs.
        sentences: "split" looks for sentence ends within each line (and none reaches over a line's
            end); "lines" takes each line for a sentence, as in BERT's files. Longer ones than
            ``sentences.MAX_CHARS`` are cut.
    """

    paths: tuple[Path, ...]
    documents: str = "blank-lines"
    sentences: str = "split"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("documents", self.documents, DOCUMENTS),
            ("sentences", self.sentences, SENTENCES),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")

    @classmethod
    def of(cls, source: "str | Path | Sequence[str | Path] | Corpus", **rules: str) -> "Corpus":
        """Of files, or folders with .txt files (``text_files``), and the rules above."""
        return source if isinstance(source, Corpus) else cls(text_files(source), **rules)

    def lines(self) -> Iterator[str | None]:
        """Lines that hold text, and None behind the last one of each document."""
        for path in self.paths:
            inside = False
            for line in read_lines(path):
                if line:
                    inside = True
                    yield line
                elif inside and self.documents == "blank-lines":
                    inside = False
                    yield None
            if inside:
                yield None

    def split(self, line: str) -> Iterator[str]:
        """The sentences of a line."""
        return split_sentences(line) if self.sentences == "split" else pieces(line)

    def __iter__(self) -> Iterator[str]:
        """All sentences."""
        for line in self.lines():
            if line is not None:
                yield from self.split(line)

    def part(self, every: int, *, held_out: bool) -> "CorpusPart":
        """Each ``every``-th document, or all the others."""
        return CorpusPart(self.paths, self.documents, self.sentences, every, held_out)

    def __str__(self) -> str:
        more = f" and {len(self.paths) - 1} more files" if len(self.paths) > 1 else ""
        return f"{self.paths[0]}{more}"


@dataclass(frozen=True)
class CorpusPart(Corpus):
    """Each ``every``-th document of a corpus, to be held out, or the others, to be trained on."""

    every: int = 2
    held_out: bool = False

    def lines(self) -> Iterator[str | None]:
        number = 0
        for line in super().lines():
            if ((number + 1) % self.every == 0) == self.held_out:
                yield line
            number += line is None

    def __str__(self) -> str:
        which = f"one document in {self.every}" if self.held_out else "what is not held out"
        return f"{which} of {super().__str__()}"
