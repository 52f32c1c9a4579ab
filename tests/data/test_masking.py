"""SparseMaskingCollator: Transformers' interface, exact counts, whole words, workers, refusal."""

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, Trainer, TrainingArguments

from tinybert_fast import TinyBertForMaskedLM
from tinybert_fast.data import SparseMaskingCollator
from tinybert_fast.testing.tiny_models import tiny_config, tiny_tokenizer

WORDS = ("good", "film", "##s", "##ing", "bad", "play")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), WORDS)


@pytest.fixture(scope="module")
def examples(tokenizer):
    texts = [" ".join(["good films playing bad"] * n) for n in (1, 3, 2, 5)]
    return [tokenizer(text, return_special_tokens_mask=True) for text in texts]


def eligible(examples):
    return [len(example["input_ids"]) - 2 for example in examples]


def test_fields_and_batch_are_those_of_transformers(tokenizer, examples):
    theirs = {field.name for field in dataclasses.fields(DataCollatorForLanguageModeling)}
    ours = {field.name for field in dataclasses.fields(SparseMaskingCollator)}
    assert theirs <= ours
    for options in ({}, {"pad_to_multiple_of": 16}, {"return_tensors": "np"}, {"mlm": False}):
        want = DataCollatorForLanguageModeling(tokenizer, **options)([dict(x) for x in examples])
        got = SparseMaskingCollator(tokenizer, **options)(examples)
        assert set(got) == set(want)
        for name in want:
            assert type(got[name]) is type(want[name])
            assert got[name].shape == want[name].shape
            assert got[name].dtype == want[name].dtype
            if name not in ("input_ids", "labels") or not options.get("mlm", True):
                assert np.array_equal(got[name], want[name])


@pytest.mark.parametrize("keep", [("input_ids",), ("input_ids", "special_tokens_mask"), None])
def test_counts_are_exact(tokenizer, examples, keep):
    given = [{k: x[k] for k in keep or x} for x in examples]
    batch = SparseMaskingCollator(tokenizer, mlm_probability=0.25, compact_labels=True)(given)
    counts = (batch["labels"] != -100).sum(1).tolist()
    assert counts == [max(1, int(0.25 * n + 0.5)) for n in eligible(examples)]
    assert torch.equal(batch["labels"].flatten()[batch["masked_rows"]], batch["masked_labels"])
    assert not set(batch["masked_labels"].tolist()) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("kind", ["whole_word_mask", "span_mask"])
def test_words_stay_whole(tokenizer, examples, kind):
    collate = SparseMaskingCollator(tokenizer, mlm_probability=0.4, **{kind: True})
    continues = {i for t, i in tokenizer.get_vocab().items() if t.startswith("##")}
    seen = 0
    for _ in range(20):
        batch = collate(examples)
        for row, example in zip(batch["labels"].tolist(), examples):
            for i, token in enumerate(example["input_ids"]):
                if token in continues:
                    assert (row[i] == -100) == (row[i - 1] == -100)
                    seen += row[i] != -100
    assert seen


def test_examples_with_ids_keep_their_masks(tokenizer, examples):
    numbered = [{**x, "example_id": 100 + n} for n, x in enumerate(examples)]
    collate = SparseMaskingCollator(tokenizer, seed=3)
    whole = collate(numbered)["input_ids"]
    alone = [collate([x])["input_ids"][0] for x in numbered]
    for row, one in zip(whole, alone):
        assert torch.equal(row[: len(one)], one)
    assert "example_id" not in collate(numbered)
    collate.set_step(1)
    assert not torch.equal(collate(numbered)["input_ids"], whole)


def test_seeds_and_workers(tokenizer, examples):
    def batches(workers, seed):
        torch.manual_seed(5)
        collate = SparseMaskingCollator(tokenizer, seed=seed)
        loader = DataLoader(examples, 2, collate_fn=collate, num_workers=workers)
        return [batch["input_ids"].tolist() for _ in range(2) for batch in loader]

    for seed in (None, 7):
        for workers in (0, 2):
            first = batches(workers, seed)
            assert first == batches(workers, seed)
            assert first[:2] != first[2:]  # another epoch, other masks
    assert batches(0, 7) != batches(0, 8)


def test_other_columns_and_left_padding(tokenizer, examples):
    batch = SparseMaskingCollator(tokenizer)([{**x, "extra": [1]} for x in examples[:1]])
    assert batch["extra"].tolist() == [[1]]
    tokenizer.padding_side = "left"
    try:
        batch = SparseMaskingCollator(tokenizer)(examples)
        assert batch["attention_mask"][0, 0] == 0
        assert ((batch["labels"] != -100) <= (batch["attention_mask"] == 1)).all()
    finally:
        tokenizer.padding_side = "right"


def test_in_a_trainer(tokenizer, examples, tmp_path):
    model = TinyBertForMaskedLM(tiny_config(vocab_size=len(tokenizer)))
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, dataloader_num_workers=1,
        remove_unused_columns=False,
    )  # fmt: skip
    collate = SparseMaskingCollator(tokenizer)
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=examples)
    assert trainer.train().training_loss > 0


def test_refuses(tokenizer):
    make = partial(SparseMaskingCollator, tokenizer)
    with pytest.raises(ValueError, match=r"ratio=0\.0; expected above 0"):
        make(mlm_probability=0.0)
    with pytest.raises(ValueError, match="need mlm=True"):
        make(mlm=False, whole_word_mask=True)
    with pytest.raises(ValueError, match="return_tensors='tf' is not one of pt, np"):
        make(return_tensors="tf")([[1, 2, 3]])
    bare = type("Bare", (), {"mask_token": None})()
    with pytest.raises(ValueError, match="Bare has no mask token"):
        SparseMaskingCollator(bare)
