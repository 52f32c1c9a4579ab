"""The benchmark of pre-training data: the recipe it compares with makes BERT's pairs and masks."""

import json

import pytest

from tinybert_fast.benchmarks.pretraining_data import generate, measure_speed, recipe
from tinybert_fast.data import Corpus
from tinybert_fast.testing.tiny_models import tiny_tokenizer


@pytest.fixture
def corpus(tmp_path):
    file = tmp_path / "text.txt"
    generate(["the film was good.", "a bad actor and a dull story.", "very fine."], file, 20_000)
    assert 20_000 <= file.stat().st_size < 21_000
    return Corpus.of(file)


def test_the_recipe(corpus, tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    written = recipe(corpus, tokenizer, tmp_path / "recipe.json")
    rows = [json.loads(line) for line in (tmp_path / "recipe.json").read_text().splitlines()]
    assert len(rows) == written > 40
    for row in rows:
        tokens, types = row["tokens"], row["segment_ids"]
        assert len(tokens) == len(types) <= 128
        assert tokens[types.index(1) - 1] == tokens[-1] == "[SEP]"
        assert len(row["masked_lm_labels"]) == min(20, max(1, round(0.15 * len(tokens))))
    assert 0.3 < sum(row["is_random_next"] for row in rows) / written < 0.9


def test_the_comparison(corpus, tmp_path):
    row = measure_speed(corpus, tiny_tokenizer(tmp_path / "tokenizer"), rounds=1)
    assert row["megabytes"] == pytest.approx(0.02, rel=0.1)
    assert row["speedup"] == pytest.approx(row["recipe_cpu_s"] / row["ours_cpu_s"])
