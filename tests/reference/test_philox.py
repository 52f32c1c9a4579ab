"""The counter-based generator against its published vectors, and the masks that are built on it."""

import pytest
import torch

from tinybert_fast.reference import philox

# Random123 1.09, tests/kat_vectors: philox 4x32, 10 rounds; counter, key, result.
VECTORS = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def words(text):
    return tuple(torch.tensor(int(word, 16)) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), VECTORS)
def test_published_vectors(counter, key, result):
    assert philox.philox(words(counter), words(key)) == words(result)


def test_works_on_tensors_of_counters():
    counters, keys, results = (
        [torch.stack(column) for column in zip(*map(words, texts))] for texts in zip(*VECTORS)
    )
    assert all(map(torch.equal, philox.philox(tuple(counters), tuple(keys)), results))


def seed_of(*pair):
    return torch.tensor(pair, dtype=torch.int64)


def attention(seed=(1, 2), site=0, sequence=0, heads=3, n=40, p=0.1):
    return philox.attention_keep(seed_of(*seed), site, sequence, heads, n, n, p)


def hidden(seed=(1, 2), site=0, rows=120, columns=312, p=0.1):
    sequences = torch.arange(rows, dtype=torch.int32) // 40
    positions = torch.arange(rows, dtype=torch.int32) % 40
    return philox.hidden_keep(seed_of(*seed), site, sequences, positions, columns, p)


@pytest.mark.parametrize("mask", [attention, hidden])
@pytest.mark.parametrize("p", [1 / 511, 0.1, 0.5, 0.9, 1 - 1 / 511])
def test_keep_rate_and_scale(mask, p):
    """The exact rate is a multiple of 1/256, within 5 sigma; scaled cells average to 1."""
    exact = round(256 * p) / 256
    assert abs(exact - p) <= 1 / 512
    keep = mask(p=p)
    sigma = (exact * (1 - exact) / keep.numel()) ** 0.5
    assert abs((~keep).double().mean() - exact) <= 5 * sigma
    assert (1 - exact) * philox.keep_scale(p) == 1.0


@pytest.mark.parametrize("mask", [attention, hidden])
def test_every_word_of_the_key_counts(mask):
    masks = [mask(), mask(site=1), mask(seed=(1, 3)), mask(seed=(0, 2))]
    masks += [mask(seed=(1 + 2**40, 2)), mask(seed=(1, 2 - 2**62)), mask(seed=(-1, -1))]
    assert len({tuple(keep.flatten().tolist()) for keep in masks}) == len(masks)


def test_heads_and_sequences_differ():
    planes = [*attention(sequence=0), *attention(sequence=1)]
    assert len({tuple(plane.flatten().tolist()) for plane in planes}) == len(planes)


@pytest.mark.parametrize("cells", ["attention", "hidden"])
def test_no_two_cells_share_a_byte(cells):
    """Over 64 seeds at rate 1/2, equal histories mean one byte that serves two cells."""
    draw = {
        "attention": lambda s: attention(seed=(s, 0), heads=2, n=33, p=0.5),
        "hidden": lambda s: hidden(seed=(s, 0), rows=50, columns=33, p=0.5),
    }[cells]
    history = torch.stack([draw(s).flatten() for s in range(64)])
    assert len(torch.unique(history, dim=1).T) == history.shape[1]


def test_larger_mask_extends_a_smaller_one():
    """A cell depends on its own indices, not on the size of the mask: padding changes nothing."""
    assert torch.equal(attention(n=40)[:2, :9, :9], attention(heads=2, n=9))
    assert torch.equal(hidden(columns=312)[:, :33], hidden(columns=33))


def test_hidden_rows_are_free_of_order():
    rows = torch.tensor([7, 3, 3])
    seed, zero = seed_of(1, 2), torch.zeros(3, dtype=torch.int32)
    picked = philox.hidden_keep(seed, 0, zero, rows.int(), 312, 0.1)
    assert torch.equal(picked, hidden()[rows])


@pytest.mark.parametrize("p", [0.0, 1 / 512, 1 - 1 / 512, 1.0, -0.1, float("nan"), float("inf")])
def test_rate_that_8_bits_cannot_express(p):
    with pytest.raises(ValueError, match=r"dropout_p=.* above 1/512 and below 1 - 1/512"):
        philox.threshold(p)
