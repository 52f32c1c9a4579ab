"""A corpus of made-up words with a small model's config beside it."""

import random
from pathlib import Path

import pytest

from tinybert_fast.testing.tiny_models import tiny_config

DOCUMENTS, SENTENCES = 12, 30


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """text/0.txt ... 11.txt, one document each, and config.json (dropout 0)."""
    folder = tmp_path_factory.mktemp("pretraining")
    (folder / "text").mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(60)]
    for number in range(DOCUMENTS):
        lines = [" ".join(draw.choices(words, k=draw.randint(4, 10))) for _ in range(SENTENCES)]
        (folder / "text" / f"{number}.txt").write_text(".\n".join(lines) + ".\n")
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tiny_config(vocab_size=200, **none).to_json_file(folder / "config.json")
    return folder
