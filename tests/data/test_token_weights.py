"""Weights of tokens and positions, their bounds and files; losses; ratios over time."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from tinybert_fast.data.token_weights import (
    LossWeights,
    RatioSchedule,
    bounded,
    count_weights,
    idf_weights,
    read_position_weights,
    read_token_weights,
)
from tinybert_fast.ops import MaskingRule
from tinybert_fast.testing.tiny_models import tiny_tokenizer

COUNTS = [0, 1, 100, 10_000]


def test_directions():
    more = count_weights(COUNTS, "important-more", alpha=0.5, most=1e9)
    assert np.allclose(more / more[3], [100, 100, 10, 1])
    less = count_weights(COUNTS, "important-less", alpha=0.5, most=1e9)
    assert np.allclose(less * more, less[0] * more[0])
    idf = idf_weights([0, 1, 80, 900], 1000, COUNTS, "important-more", most=1e9)
    assert np.allclose(idf / idf[3], np.log1p([1000, 1000, 12.5, 10 / 9]) / np.log1p(10 / 9))
    assert (np.diff(idf_weights([0, 1, 80, 900], 1000, COUNTS, "important-less")) >= 0).all()
    assert np.allclose(count_weights(COUNTS, "important-more", alpha=0), 1)


@given(
    arrays(float, 20, elements=st.floats(1e-6, 1e6)),
    arrays(int, 20, elements=st.integers(0, 1000)),
    st.floats(1, 1e4),
)
def test_bounds(weights, counts, most):
    out = bounded(weights, counts, most)
    assert out.max() / out.min() <= most * (1 + 1e-9)
    order = np.argsort(weights, kind="stable")
    assert (np.diff(out[order]) >= 0).all()


def test_ordinary_tokens_keep_their_proportions():
    out = bounded(np.array([1e-6, 1.0, 2.0, 1e6]), [1, 500, 500, 1], 100.0)
    assert out[2] / out[1] == pytest.approx(2)
    assert out.max() / out.min() == pytest.approx(100)


def test_refusals():
    with pytest.raises(ValueError, match="direction is 'up'; expected one of important-more, "):
        count_weights(COUNTS, "up")
    with pytest.raises(ValueError, match=r"alpha is -1; expected 0 \(uniform\) to 2"):
        count_weights(COUNTS, "important-more", alpha=-1)
    with pytest.raises(ValueError, match=r"most is nan; expected a ratio of 1"):
        count_weights(COUNTS, "important-more", most=float("nan"))
    with pytest.raises(ValueError, match=r"decay is 1\.0; expected 0 to less than 1"):
        LossWeights(3, decay=1.0)


def test_files(tmp_path):
    tokenizer = tiny_tokenizer(tmp_path / "tokenizer")
    file = tmp_path / "weights.tsv"
    file.write_text("the\t0.5\n\nfilm\t3\n")
    weights = read_token_weights(file, tokenizer)
    assert weights[tokenizer.convert_tokens_to_ids(["the", "film", "a"])].tolist() == [0.5, 3, 1]
    places = tmp_path / "places.txt"
    places.write_text("1\n2.5\n0\n")
    assert read_position_weights(places).tolist() == [1, 2.5, 0]
    MaskingRule.of(len(tokenizer), 4, range(5), token_weights=weights, position_weights=[1, 2.5, 0])
    for content, complaint in (
        ("the 1", "line 1 is 'the 1'; expected token, tab, number"),
        ("a\t1\nqueen\t2", "line 2: 'queen' is not in the vocabulary"),
        ("the\t-1", "line 1: '-1' is no weight; expected a number >= 0"),
        ("the\tinf", "line 1: 'inf' is no weight"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=complaint):
            read_token_weights(file, tokenizer)
    places.write_text("\n")
    with pytest.raises(ValueError, match="holds no weights"):
        read_position_weights(places)


def test_losses_are_averaged():
    weights = LossWeights(4, decay=0.5, most=100.0)
    assert weights.weights().tolist() == [1, 1, 1, 1]
    weights.update(torch.tensor([0, 2, 0]), torch.tensor([1.0, 6.0, 3.0]))
    assert weights.average.tolist() == [2, 0, 6, 0]  # the first time, the mean itself
    weights.update(torch.tensor([0]), torch.tensor([4.0]))
    assert weights.average.tolist() == [3, 0, 6, 0]
    assert torch.allclose(weights.weights(), torch.tensor([3 / 4.5, 1, 6 / 4.5, 1]))
    resumed = LossWeights(4, decay=0.5, most=100.0)
    resumed.load_state_dict(weights.state_dict())
    weights.update(torch.tensor([1]), torch.tensor([1.0]))
    assert resumed.average.tolist() == [3, 0, 6, 0]  # a copy
    with pytest.raises(ValueError, match="losses of 4 tokens cannot go on with 5 tokens"):
        LossWeights(5).load_state_dict(weights.state_dict())


def test_losses_do_not_depend_on_their_order():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, (3000,), generator=generator)
    losses = 10 * torch.rand(3000, generator=generator)
    one, other = LossWeights(5), LossWeights(5)
    one.update(ids, losses)
    other.update(ids.flip(0), losses.flip(0))
    assert torch.equal(one.average, other.average)
    exact = torch.stack([losses[ids == i].double().mean() for i in range(5)])
    assert torch.allclose(one.average.double(), exact, rtol=1e-5)


def test_schedules():
    assert RatioSchedule(0.2)(7, 10) == 0.2
    linear = RatioSchedule(0.3, 0.1, "linear")
    assert [linear(step, 10) for step in (0, 5, 10, 99)] == pytest.approx([0.3, 0.2, 0.1, 0.1])
    cosine = RatioSchedule(0.1, 0.3, "cosine")
    assert [cosine(step, 8) for step in (0, 2, 4, 8)] == pytest.approx(
        [0.1, 0.12929, 0.2, 0.3], 1e-4
    )
    for fields, complaint in (
        ((0.1, 0.2, "steps"), "schedule is 'steps'; expected one of constant, linear, cosine"),
        ((0.1, 0.2), r"ends at 0\.2 is not constant; choose .*--ratio-schedule"),
        ((0.1, None, "linear"), r"a linear masking ratio needs an end \(--ratio-end\)"),
        ((0.0,), r"a masking ratio is 0\.0; expected above 0"),
    ):
        with pytest.raises(ValueError, match=complaint):
            RatioSchedule(*fields)


def test_losses_of_several_processes_are_one_batch():
    ids, losses = torch.tensor([0, 1, 1, 3]), torch.tensor([1.0, 2.0, 4.0, 0.5])
    whole = LossWeights(4)
    whole.update(ids, losses)
    shares, sums = (slice(0, 2), slice(2, 4)), []
    for share in shares:
        LossWeights(4).update(ids[share], losses[share], lambda x: sums.append(x) or x)
    for share in shares:
        one = LossWeights(4)
        one.update(ids[share], losses[share], lambda x: sum(sums))
        assert torch.equal(one.average, whole.average)
