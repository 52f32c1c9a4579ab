"""PreTrainingCollator: what a batch holds, and masks that do not depend on how rows are shared."""

import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertForPreTraining

from tinybert_fast.data import PreTrainingCollator, open_shards, write_shards
from tinybert_fast.data.collate import Rows
from tinybert_fast.testing.tiny_models import PLAIN, tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    words = [word for word in PLAIN if word.isalpha()]
    sentences = [" ".join(draw.choice(words, draw.integers(2, 9))) for _ in range(120)]
    text = "".join(f"{s}.\n" + "\n" * (i % 9 == 0) for i, s in enumerate(sentences))
    (folder / "a.txt").write_text(text)
    for name, nsp in (("pairs", True), ("single", False)):
        write_shards(folder / "a.txt", tokenizer, folder / name, max_length=32, nsp=nsp)
    return folder


@pytest.fixture(scope="module")
def rows(folder, tokenizer):
    return list(open_shards(folder / "pairs", tokenizer).examples)


def test_batch(tokenizer, rows):
    batch = PreTrainingCollator(tokenizer, mlm_probability=0.25, pad_to_multiple_of=8)(rows[:6])
    width = batch["input_ids"].shape[1]
    assert width % 8 == 0
    assert batch["lengths"] == [len(row["input_ids"]) for row in rows[:6]]
    assert batch["next_sentence_label"].tolist() == [r["next_sentence_label"] for r in rows[:6]]
    original = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    for i, row in enumerate(rows[:6]):
        n, first = row["length"], row["first_length"]
        assert original[i].tolist() == row["input_ids"] + [0] * (width - n)
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (width - n)
        assert batch["token_type_ids"][i].tolist() == (
            [0] * first + [1] * (n - first) + [0] * (width - n)
        )
        assert (batch["labels"][i] != -100).sum() == max(1, int(0.25 * (n - 3) + 0.5))
    assert torch.equal(batch["labels"].flatten()[batch["masked_rows"]], batch["masked_labels"])
    batch.pop("lengths")
    compact = [batch.pop(name) for name in ("masked_rows", "masked_labels")]
    assert len(compact[0]) == len(compact[1])
    model = BertForPreTraining(tiny_config(vocab_size=len(tokenizer)))
    assert model(**batch).loss.isfinite()


def test_without_pairs(folder, tokenizer):
    rows = list(open_shards(folder / "single", tokenizer).examples.with_format("numpy"))
    batch = PreTrainingCollator(tokenizer)(rows[:4])
    assert "next_sentence_label" not in batch
    assert not batch["token_type_ids"].any()


@pytest.mark.parametrize("words", ["given", "of the tokenizer"])
@pytest.mark.parametrize("kind", ["pairs", "single"])
def test_columns_make_the_batches_of_rows(folder, tokenizer, kind, words):
    """Also reversed; several rows twice, whatever dtypes the table has."""
    examples = open_shards(folder / kind, tokenizer).examples
    if words == "given":
        draw = np.random.default_rng(1)
        starts = [(draw.random(n) < 0.5).tolist() for n in examples["length"]]
        examples = examples.add_column("word_starts", starts)
    collate = PreTrainingCollator(tokenizer, whole_word_mask=True, pad_to_multiple_of=4)
    numbers = [7, 2, 2, 11, 0, 7]
    table, rows = Rows(examples).__getitems__(numbers), [examples[i] for i in numbers]
    assert table["input_ids"].dtype == np.uint16
    for columns, listed in ((table, rows), (collate.reversed(table), collate.reversed(rows))):
        got, want = collate(columns), collate(listed)
        assert got.keys() == want.keys()
        for name, value in want.items():
            if name == "lengths":
                assert got[name] == value
            else:
                assert got[name].dtype == value.dtype
                assert torch.equal(got[name], value), name


def test_a_table_lends_its_memory(folder, tokenizer):
    """Rows that follow each other are no copies: nothing may write there, or warn of it."""
    table = Rows(open_shards(folder / "pairs", tokenizer).examples).__getitems__(range(3, 9))
    assert not table["first_length"].flags.writeable
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            PreTrainingCollator(tokenizer)(table)
    finally:
        torch.set_warn_always(False)


@pytest.mark.parametrize("workers", [0, 2])
def test_masks_belong_to_the_example(tokenizer, rows, workers):
    def masked(order, size, step=0, seed=5):
        collate = PreTrainingCollator(tokenizer, seed=seed)
        collate.set_step(step)
        loader = DataLoader([rows[i] for i in order], size, collate_fn=collate, num_workers=workers)
        found = {}
        for ids, lengths in ((batch["input_ids"], batch["lengths"]) for batch in loader):
            for row, n in zip(ids.tolist(), lengths):
                found[order[len(found)]] = row[:n]
        return found

    order = list(range(30))
    want = masked(order, 8)
    assert masked(order[::-1], 5) == want
    # Two processes that take every other example.
    assert {**masked(order[::2], 8), **masked(order[1::2], 8)} == want
    assert masked(order, 8, step=1) != want
    assert masked(order, 8, seed=6) != want


def test_ratio_and_weights_change(tokenizer, rows):
    collate = PreTrainingCollator(tokenizer)
    few = len(collate(rows)["masked_rows"])
    collate.set_ratio(0.4)
    batch = collate(rows)
    assert len(batch["masked_rows"]) > 2 * few
    weights = torch.ones(len(tokenizer))
    film = tokenizer.convert_tokens_to_ids("film")
    weights[film] = 0
    collate.set_token_weights(weights)
    assert film in batch["masked_labels"]
    batch = collate(rows)
    assert film not in batch["masked_labels"]
    assert len(batch["masked_rows"]) > 2 * few  # the ratio stays
