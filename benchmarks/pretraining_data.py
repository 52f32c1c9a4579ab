"""Text to pre-training examples: speed beside TinyBERT's recipe, and memory as the text grows.

    python benchmarks/pretraining_data.py TEXT ... --tokenizer FOLDER [--rounds 5] [--json FILE]
    python benchmarks/pretraining_data.py TEXT ... --tokenizer FOLDER --memory 20 200

Both providers read the same files, split the same sentences and use the same tokenizer on one core:

    recipe  as TinyBERT's data generation works: each sentence tokenised by itself, documents as
            lists of tokens in memory, sentences joined into pairs, masked once, a line of JSON each
    ours    write_shards, which leaves masking to the batches

Times are CPU seconds, and the ratio is the median of the rounds' ratios. ``--memory`` makes corpora
of so many MB by repeating sentences in random order and gives the peak resident memory of each run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoTokenizer, BertTokenizerFast

from tinybert_fast.benchmarks.hardware import facts
from tinybert_fast.data import Corpus, write_shards
from tinybert_fast.data.atomic import atomic_write

MAX_LENGTH, SHORT = 128, 0.1
MASK_RATIO, MOST_MASKED = 0.15, 20


def recipe(corpus: Corpus, tokenizer: BertTokenizerFast, file: Path, seed: int = 0) -> int:
    """Writes examples as lines of JSON; returns their number."""
    draw = random.Random(seed)
    documents: list[list[list[str]]] = [[]]
    for line in corpus.lines():
        if line is None:
            documents.append([])
        else:
            documents[-1] += [tokenizer.tokenize(sentence) for sentence in corpus.split(line)]
    documents = [document for document in documents if document]
    words = list(tokenizer.get_vocab())
    written = 0
    with file.open("w") as out:
        for number in range(len(documents)):
            for tokens, types, unrelated in recipe_pairs(documents, number, draw):
                masked, places, labels = recipe_masks(tokens, words, draw)
                row = {
                    "tokens": masked,
                    "segment_ids": types,
                    "is_random_next": unrelated,
                    "masked_lm_positions": places,
                    "masked_lm_labels": labels,
                }
                out.write(json.dumps(row) + "\n")
                written += 1
    return written


def recipe_pairs(documents: list[list[list[str]]], number: int, draw: random.Random):
    """(tokens, segment ids, whether B is from another document) of each pair of one document."""
    document, room = documents[number], MAX_LENGTH - 3
    target = draw.randint(2, room) if draw.random() < SHORT else room
    taken: list[list[str]] = []
    at = size = 0
    while at < len(document):
        taken.append(document[at])
        size += len(document[at])
        if at == len(document) - 1 or size >= target:
            end = draw.randint(1, len(taken) - 1) if len(taken) > 1 else 1
            a = [token for sentence in taken[:end] for token in sentence]
            unrelated = len(taken) == 1 or draw.random() < 0.5
            if unrelated:
                other = number
                while other == number:
                    other = draw.randrange(len(documents))
                b: list[str] = []
                for sentence in documents[other][draw.randrange(len(documents[other])) :]:
                    b.extend(sentence)
                    if len(b) >= target - len(a):
                        break
                at -= len(taken) - end
            else:
                b = [token for sentence in taken[end:] for token in sentence]
            while len(a) + len(b) > room:
                longer = a if len(a) > len(b) else b
                longer.pop(0 if draw.random() < 0.5 else -1)
            if a and b:
                tokens = ["[CLS]", *a, "[SEP]", *b, "[SEP]"]
                yield tokens, [0] * (len(a) + 2) + [1] * (len(b) + 1), unrelated
            taken, size = [], 0
        at += 1


def recipe_masks(tokens: list[str], words: list[str], draw: random.Random):
    """(tokens after masking, places, what stood there)."""
    places = [i for i, token in enumerate(tokens) if token not in ("[CLS]", "[SEP]")]
    draw.shuffle(places)
    places = sorted(places[: min(MOST_MASKED, max(1, round(len(tokens) * MASK_RATIO)))])
    masked = list(tokens)
    for place in places:
        kind = draw.random()
        if kind < 0.8:
            masked[place] = "[MASK]"
        elif kind < 0.9:
            masked[place] = draw.choice(words)
    return masked, places, [tokens[place] for place in places]


def ours(corpus: Corpus, tokenizer: BertTokenizerFast, folder: Path) -> int:
    return write_shards(corpus, tokenizer, folder, max_length=MAX_LENGTH, short=SHORT).examples


def measure_speed(corpus: Corpus, tokenizer: BertTokenizerFast, rounds: int) -> dict[str, Any]:
    """CPU seconds of both, in turn."""
    providers: dict[str, Callable[..., int]] = {"recipe": recipe, "ours": ours}
    times: dict[str, list[float]] = {name: [] for name in providers}
    for number in range(-1, rounds):  # the first is a warm-up
        for name, provider in providers.items():
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                provider(corpus, tokenizer, Path(folder, name))
                if number >= 0:
                    times[name].append(time.process_time() - start)
    megabytes = sum(path.stat().st_size for path in corpus.paths) / 1e6
    seconds = {name: median(found) for name, found in times.items()}
    return {
        "megabytes": megabytes,
        "rounds": rounds,
        **{f"{name}_cpu_s": found for name, found in seconds.items()},
        **{f"{name}_mb_per_s": megabytes / found for name, found in seconds.items()},
        "speedup": median(a / b for a, b in zip(times["recipe"], times["ours"], strict=True)),
    }


def measure_memory(corpus: Corpus, tokenizer: str, megabytes: int) -> dict[str, Any]:
    """Of a run of its own, after what it imports."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "text.txt")
        generate(list(corpus), file, megabytes * 10**6)
        command = [sys.executable, __file__, str(file), "--tokenizer", tokenizer, "--once"]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {"megabytes": megabytes, **json.loads(found)}


def generate(sentences: list[str], file: Path, size: int) -> None:
    """Documents of 20 sentences in random order, ``size`` bytes of them."""
    draw, written = random.Random(0), 0
    with file.open("wb") as out:
        while written < size:
            document = "\n".join(draw.choices(sentences, k=20)) + "\n\n"
            written += out.write(document.encode())


def once(corpus: Corpus, tokenizer: BertTokenizerFast) -> dict[str, Any]:
    before = peak_mib()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        examples = ours(corpus, tokenizer, Path(folder, "shards"))
    seconds = time.perf_counter() - start
    return {"examples": examples, "seconds": seconds, "before_mib": before, "peak_mib": peak_mib()}


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Print what was measured as JSON, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, nargs="+", help="files, or folders of .txt files")
    parser.add_argument("--tokenizer", required=True, help="a Transformers folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", type=int, nargs="+", metavar="MB", help="sizes to generate")
    parser.add_argument("--once", action="store_true", help="one run of ours, with its memory")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    corpus = Corpus.of(given.text, documents="blank-lines" if given.once else "files")
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer)
    if given.once:
        print(json.dumps(once(corpus, tokenizer)))
        return
    rows = (
        [measure_memory(corpus, given.tokenizer, size) for size in given.memory]
        if given.memory
        else [measure_speed(corpus, tokenizer, given.rounds)]
    )
    text = json.dumps([{**row, **facts(torch.device("cpu"))} for row in rows], indent=1)
    print(text)
    if given.json:
        atomic_write(given.json, text + "\n")


if __name__ == "__main__":
    main()
