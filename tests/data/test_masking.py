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
from tinybert_fast.ops import native
from tinybert_fast.ops.dispatch import UNAVAILABLE
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


def test_words_of_offsets_are_those_of_transformers(tokenizer):
    """Pieces without a gap between them are one word, whatever they are called."""
    words = tokenizer.convert_tokens_to_ids(["good", "film", "play", "bad", "film"])
    example = {
        "input_ids": [tokenizer.cls_token_id, *words, tokenizer.sep_token_id],
        "special_tokens_mask": [1, *[0] * 5, 1],
        "offset_mapping": [(0, 0), (0, 4), (4, 8), (9, 10), (11, 15), (15, 18), (0, 0)],
    }
    collate = SparseMaskingCollator(tokenizer, whole_word_mask=True, mlm_probability=0.4)
    seen = set()
    for _ in range(40):
        batch = collate([example, example])
        assert "offset_mapping" not in batch
        seen |= {tuple((row != -100).nonzero().flatten().tolist()) for row in batch["labels"]}
    assert seen == {(1, 2), (4, 5), (3,)}


def test_lists_are_read_alike_without_the_compiled_module(tokenizer, examples, monkeypatch):
    given = [
        {**x, "offset_mapping": [(i, 1 << 40) for i in range(len(x["input_ids"]))]}
        for x in examples
    ]
    collate = SparseMaskingCollator(tokenizer, pad_to_multiple_of=8)
    batches = [collate._pad(given), collate._pad([{k: tuple(x[k]) for k in x} for x in given])]
    arrays = [{k: np.asarray(x[k]) for k in x} for x in given]
    batches.append(collate._pad(arrays))
    monkeypatch.setitem(UNAVAILABLE, "native", "not built")
    batches.append(collate._pad(given))
    for other in batches[1:]:
        assert set(other) == set(batches[0])
        for name, want in batches[0].items():
            assert want.dtype == torch.int64
            assert torch.equal(other[name], want)


def bad(examples, name, row):
    return [{**examples[0], name: row}, *examples[1:]]


@pytest.mark.parametrize("compiled", [True, False])
def test_lists_that_cannot_be_read(tokenizer, examples, monkeypatch, compiled):
    if not compiled:
        monkeypatch.setitem(UNAVAILABLE, "native", "not built")
    collate = SparseMaskingCollator(tokenizer)
    n = len(examples[0]["input_ids"])
    with pytest.raises(ValueError, match=f"example 0 has {n - 1} token_type_ids for {n} input_ids"):
        collate(bad(examples, "token_type_ids", [0] * (n - 1)))
    for item in ("x", 1.5, None, 2**70):
        with pytest.raises((TypeError, OverflowError)):
            collate(bad(examples, "input_ids", [item] * n))
    offsets = [{**x, "offset_mapping": [(0, 1)] * len(x["input_ids"])} for x in examples]
    for pair in ((1,), (1, 2, 3), 4, "ab", (1, "b")):
        with pytest.raises((TypeError, ValueError)):
            collate(bad(offsets, "offset_mapping", [pair] * n))


def test_a_tuple_that_is_freed_while_it_is_read():
    class Clears:
        def __index__(self):
            row.clear()
            self.others = [(n, 666) for n in range(1000)]
            return 7

    row = [(Clears(), 10**12)]
    assert native.pad_lists([row], 1, 0, 2).tolist() == [[[7, 10**12]]]


def test_padding_is_never_attended_to(tokenizer):
    same = [{"input_ids": [2, 9, 9, 9, 9, 9, 3]}] * 2
    batch = SparseMaskingCollator(tokenizer, pad_to_multiple_of=8)(same)
    assert batch["attention_mask"].tolist() == [[1] * 7 + [0]] * 2


def test_steps_reach_running_workers(tokenizer, examples):
    numbered = [{**x, "example_id": n} for n, x in enumerate(examples)]
    collate = SparseMaskingCollator(tokenizer, seed=3)
    loader = DataLoader(numbered, 2, collate_fn=collate, num_workers=1, persistent_workers=True)
    epochs = []
    for step in (0, 1, 0):
        collate.set_step(step)
        epochs.append([batch["input_ids"].tolist() for batch in loader])
    assert epochs[0] == epochs[2] != epochs[1]


def test_workers_differ_after_a_look_at_a_batch(tokenizer, examples):
    collate = SparseMaskingCollator(tokenizer, seed=7, mlm_probability=0.5)
    collate(examples)
    loader = DataLoader([examples[3]] * 4, 2, collate_fn=collate, num_workers=2)
    first, second = (batch["input_ids"].tolist() for batch in loader)
    assert first != second


def test_a_list_that_shrinks_while_it_is_read():
    class Shrinks:
        def __index__(self):
            row.clear()
            return 7

    row = [Shrinks()] * 5
    assert native.pad_lists([row, [1, 2]], 5, 0).tolist() == [[7, 0, 0, 0, 0], [1, 2, 0, 0, 0]]


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
