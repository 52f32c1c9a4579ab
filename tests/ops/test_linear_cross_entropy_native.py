"""csrc/cross_entropy.cpp: each instruction set, words beside a vector, blocks of rows, threads."""

import pytest
import torch
import torch.nn.functional as F

from tinybert_fast import ops
from tinybert_fast.ops import dispatch, native
from tinybert_fast.testing.budgets import assert_within_budget
from tinybert_fast.testing.operands import linear_cross_entropy, normal

pytestmark = pytest.mark.skipif(
    dispatch.UNAVAILABLE["native"] is not None, reason=str(dispatch.UNAVAILABLE["native"])
)
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("words", [1, 3, 16, 31, 2048, 2055])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_words(words, smoothing, dtype, isa):
    """Fewer than a vector, whole vectors and not, a whole run and more."""
    case = linear_cross_entropy(9, 5, 8, words, dtype=dtype, label_smoothing=smoothing)
    assert_within_budget(case, "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_beyond_a_block(dtype, isa):
    """A block is 32 rows."""
    assert_within_budget(linear_cross_entropy(40, 77, 8, 101, dtype=dtype), "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(dtype):
    logits, bias = normal((77, 101), 1, dtype), normal((101,), 2)
    labels, weights = torch.arange(77), torch.ones(77)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            z, dbias = logits.clone(), torch.zeros(101)
            losses = native.cross_entropy(z, bias, labels, weights, 0.1, True, dbias)
            found.append((losses, z, dbias))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0.0, atol=0.0)


def test_large_logits(isa):
    """Far apart, and far from 0, where an exponential alone would end."""
    logits = normal((8, 50), 3) * 200 + torch.tensor([[-3e4], [3e4]]).repeat(4, 1)
    labels = torch.arange(8)
    found = native.cross_entropy(logits.clone(), None, labels, torch.ones(8), 0.0, False, None)
    want = F.cross_entropy(logits.double(), labels, reduction="none")
    torch.testing.assert_close(found.double(), want, rtol=1e-6, atol=1e-2)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_nan_stays_in_its_row(number):
    hidden, weight = normal((5, 8), 4), normal((21, 8), 5)
    hidden[3] = number
    losses = ops.linear_cross_entropy(
        hidden, weight, None, torch.arange(5), torch.arange(5), reduction="none", impl="native"
    )
    assert losses.isfinite().tolist() == [True, True, True, False, True]


def test_rows_apart_are_refused():
    with pytest.raises(ValueError, match="reads rows of stride 1"):
        native.cross_entropy(
            normal((3, 8), 6).mT, None, torch.zeros(8).long(), torch.ones(8), 0.0, False, None
        )
