"""Masking: which options go together, and the weights they mean."""

from types import SimpleNamespace

import numpy as np
import pytest

from tinybert_fast.testing.tiny_models import WORDS, tiny_tokenizer
from tinybert_fast.training.masking import Masking

MANIFEST = SimpleNamespace(
    token_counts=[0] * 5 + [1000] + [10] * (len(WORDS) - 6),
    sentence_counts=[0] * 5 + [500] + [9] * (len(WORDS) - 6),
    sentences=600,
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("weights", ["count", "idf"])
def test_both_directions(tokenizer, weights):
    common = {
        direction: Masking(weights=weights, direction=direction).token_weights(MANIFEST, tokenizer)
        for direction in ("important-more", "important-less")
    }
    assert common["important-more"][5] < common["important-more"][6]
    assert common["important-less"][5] > common["important-less"][6]


def test_tables(tokenizer, tmp_path):
    table, places = tmp_path / "h.tsv", tmp_path / "g.txt"
    table.write_text("good\t5\n")
    places.write_text("1\n2\n")
    masking = Masking(weights=table, positions=places)
    weights = masking.token_weights(MANIFEST, tokenizer)
    assert weights[5] == 5
    assert np.all(np.delete(weights, 5) == 1)
    assert masking.collator(MANIFEST, tokenizer, 0).rule.places is not None
    before = masking.settings()
    table.write_text("good\t6\n")
    assert masking.settings() != before  # a resumed run sees another table


def test_uniform_and_loss_begin_uniform(tokenizer):
    assert Masking().token_weights(MANIFEST, tokenizer) is None
    assert Masking().losses(tokenizer, "cpu") is None
    losses = Masking(weights="loss", most=4.0).losses(tokenizer, "cpu")
    assert losses.most == 4.0
    assert losses.weights().tolist() == [1.0] * len(tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unit": "letter"}, "expected one of token, word, span"),
        ({"weights": "idf"}, "needs a direction: important-more or important-less"),
        ({"weights": "loss", "direction": "important-more"}, "is for weights count and idf"),
        ({"alpha": 1.5}, "alpha=1.5 is for weights count; got 'uniform'"),
        (
            {"weights": "idf", "direction": "important-more", "alpha": 0.7},
            "alpha=0.7 is for weights count; got 'idf'",
        ),
        ({"most": 3.0}, "most=3.0 is for weights count and idf and loss; got 'uniform'"),
        ({"weights": "nowhere.tsv"}, "uniform, count, idf, loss or a file"),
        ({"positions": "nowhere.txt"}, "expected a file"),
        ({"weights": "idf", "direction": "up"}, "direction is 'up'"),
        ({"weights": "count", "direction": "important-more", "alpha": 3}, "alpha is 3"),
        ({"weights": "loss", "most": 0.5}, "most is 0.5"),
        ({"positions": __file__}, "line 1: .* is no weight"),
        ({"ratio": 1.5}, "a masking ratio is 1.5"),
        ({"schedule": "linear"}, "needs an end"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Masking(**options)
