"""BERT models of a few kilobytes and texts to train them on, written to a folder: for tests and
examples.
"""

import csv
import random
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import BertConfig, BertTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
GOOD = ("good", "fine", "great", "lovely")
BAD = ("bad", "poor", "awful", "dull")
PLAIN = ("a", "the", "film", "actor", "story", "scene", "was", "with", "and", "very", "##s", ".")
WORDS = (*SPECIAL, *GOOD, *BAD, *PLAIN)


def tiny_tokenizer(folder: Path, words: tuple[str, ...] = WORDS) -> "BertTokenizerFast":
    """A WordPiece tokenizer of `words`, saved to `folder`."""
    from transformers import BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = folder / "vocab.txt"
    vocabulary.write_text("\n".join(words) + "\n", encoding="utf-8")
    tokenizer = BertTokenizerFast.from_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def tiny_config(**changes) -> "BertConfig":
    """Hidden 24, 2 layers, 2 heads (width 12), 40 positions."""
    from transformers import BertConfig

    sizes = {
        "vocab_size": len(WORDS),
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
    }
    return BertConfig(**{**sizes, **changes})


def tiny_encoder(folder: Path, *, seed: int = 0, words: tuple[str, ...] = WORDS, **changes) -> Path:
    """A BertModel with random weights, and its tokenizer; returns the folder."""
    from transformers import BertModel

    tiny_tokenizer(folder, words)
    torch.manual_seed(seed)
    BertModel(tiny_config(vocab_size=len(words), **changes)).save_pretrained(folder)
    return folder


def tiny_classifier(
    folder: Path, labels: tuple[str, ...] = ("bad", "good"), *, seed: int = 0, **changes
) -> Path:
    """A BertForSequenceClassification with random weights, and its tokenizer."""
    from transformers import BertForSequenceClassification

    tiny_tokenizer(folder)
    torch.manual_seed(seed)
    names = {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }
    BertForSequenceClassification(tiny_config(**names, **changes)).save_pretrained(folder)
    return folder


def sentiment_rows(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, "good" | "bad") of 2 to 12 words; the label is the kind of the one opinion word in the
    text.
    """
    draw = random.Random(seed)
    made = []
    for _ in range(rows):
        label = draw.choice(("good", "bad"))
        words = [draw.choice([w for w in PLAIN if w.isalpha()]) for _ in range(draw.randint(1, 11))]
        words.insert(draw.randint(0, len(words)), draw.choice(GOOD if label == "good" else BAD))
        made.append((" ".join(words), label))
    return made


def sentiment_file(path: Path, rows: int, seed: int = 0) -> Path:
    """sentiment_rows as csv with the columns sentence, label."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("sentence", "label"), *sentiment_rows(rows, seed)])
    return path
