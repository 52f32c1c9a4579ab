"""Padding and the length-grouped order."""

import tracemalloc

import datasets
import numpy as np
import pytest
import torch

from tinybert_fast.data import LengthCollator, LengthGroupedSampler, sort_by_length
from tinybert_fast.data.collate import Rows


class Tokenizer:
    pad_token_id = 9


def example(n, **more):
    return {"input_ids": list(range(1, n + 1)), "token_type_ids": [0] * (n - 1) + [1], **more}


@pytest.mark.parametrize(("multiple", "width"), [(None, 5), (4, 8), (5, 5)])
def test_pads_right(multiple, width):
    batch = LengthCollator(Tokenizer(), multiple)([example(5, label=1), example(2, label=0)])
    pad = width - 5
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5] + [9] * pad, [1, 2] + [9] * (width - 2)]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * pad, [1, 1] + [0] * (width - 2)]
    assert batch["token_type_ids"].tolist()[1] == [0, 1] + [0] * (width - 2)
    assert batch["labels"].tolist() == [1, 0]
    assert {name: value.dtype for name, value in batch.items()} == dict.fromkeys(batch, torch.int64)


def test_labels_are_floats_or_absent():
    collate = LengthCollator(Tokenizer())
    assert collate([example(2, label=0.5)])["labels"].dtype == torch.float32
    assert "labels" not in collate([example(2)])


@pytest.mark.parametrize(
    "label", [{"label": 1}, {"label": 0.5}, {}], ids=["class", "score", "none"]
)
@pytest.mark.parametrize("multiple", [None, 4])
def test_rows_of_a_table_make_the_same_batches(label, multiple):
    """Of a dataset in several pieces, in another order, some rows twice."""
    parts = [
        datasets.Dataset.from_list([example(n, index=n, length=n, attention_mask=[1] * n, **label)])
        for n in (5, 2, 7, 3)
    ]
    whole = datasets.concatenate_datasets(parts).select([3, 0, 2, 1])
    collate = LengthCollator(Tokenizer(), multiple, lengths=True)
    loader = torch.utils.data.DataLoader(
        Rows(whole), batch_size=3, sampler=[2, 0, 0, 3, 1], collate_fn=collate
    )
    for batch, rows in zip(loader, ([2, 0, 0], [3, 1]), strict=True):
        want = collate([whole[i] for i in rows])
        assert batch.keys() == want.keys()
        for name, value in want.items():
            if isinstance(value, torch.Tensor):
                assert batch[name].dtype == value.dtype
                assert torch.equal(batch[name], value), name
            else:
                assert batch[name] == value, name


@pytest.mark.parametrize(("rows", "batch"), [(103, 4), (103, 8), (3, 4), (1, 1), (1000, 6)])
def test_order_is_a_permutation_grouped_by_length(rows, batch):
    lengths = np.random.default_rng(1).integers(3, 60, rows)
    sampler = LengthGroupedSampler(lengths, batch, seed=5)
    order = list(sampler)
    assert len(sampler) == rows
    assert sorted(order) == list(range(rows))
    assert order == list(LengthGroupedSampler(lengths, batch, seed=5))
    whole = rows // batch * batch
    if whole:
        chunks = lengths[order[:whole]].reshape(-1, batch)
        assert chunks[0].max() == chunks.max()  # the longest comes first
        if len(chunks) > 10:
            assert np.ptp(chunks, axis=1).mean() < 10 < np.ptp(lengths)  # a random order: about 35


@pytest.mark.parametrize(("rows", "batch"), [(103, 4), (3, 4), (8, 4)])
def test_the_incomplete_batch_is_left_out(rows, batch):
    lengths = np.random.default_rng(1).integers(3, 60, rows)
    whole = LengthGroupedSampler(lengths, batch, seed=5)
    sampler = LengthGroupedSampler(lengths, batch, seed=5, drop_last=True)
    assert len(sampler) == rows // batch * batch
    assert list(sampler) == list(whole)[: len(sampler)]


def test_an_order_is_no_list_of_numbers():
    """Of which each takes 32 bytes, and 8 in the list."""
    sampler = LengthGroupedSampler(np.ones(100_000, np.int8), 32)
    tracemalloc.start()
    try:
        order = iter(sampler)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 10 * len(sampler)
    assert len(set(order)) == len(sampler)


def test_order_depends_on_seed_and_epoch_but_not_on_torch():
    lengths = list(range(64))
    orders = set()
    for seed, epoch in [(0, 0), (0, 1), (1, 0)]:
        sampler = LengthGroupedSampler(lengths, 4, seed=seed)
        sampler.set_epoch(epoch)
        before = torch.get_rng_state()
        orders.add(tuple(sampler))
        assert torch.equal(before, torch.get_rng_state())
    assert len(orders) == 3


def test_sort_by_length_returns_the_way_back():
    data = datasets.Dataset.from_dict({"length": [2, 5, 3], "row": [0, 1, 2]})
    ordered, order = sort_by_length(data)
    assert ordered["length"][:] == [5, 3, 2]
    assert ordered["row"][:] == order.tolist()
