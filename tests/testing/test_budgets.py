"""Budgets: what must be over them, and how a verdict is of the worst sequence."""

import math

import pytest
import torch
import torch.nn.functional as F

from tinybert_fast.testing.budgets import SLACK, Verdict, compare, rounding, sequences_of
from tinybert_fast.testing.operands import DTYPES, attention, attention_score_mse, normal
from tinybert_fast.testing.validation import MIXED

LENGTHS = (*MIXED, 512)  # of `tinybert-fast validate`
HALF = (torch.float16, torch.bfloat16)


def attention_of(keys, q, k, v):
    """Attention of sequences each with so many keys: zeros behind its own, or not all of these."""
    found = []
    for length, *rows in zip(LENGTHS, *(x.split(LENGTHS) for x in (q, k, v))):
        queries, *others = (x.transpose(0, 1) for x in rows)
        others = (F.pad(x, (0, 0, 0, keys(length) - length)) for x in others)
        found.append(F.scaled_dot_product_attention(queries, *others).transpose(0, 1))
    return torch.cat(found)


def scores_mse_of(keys, q, k, p, r):
    total = 0.0
    for length, *rows in zip(LENGTHS, *(x.split(LENGTHS) for x in (q, k, p, r))):
        q_, k_, p_, r_ = (x.transpose(0, 1) for x in rows)
        k_, r_ = (x[:, : keys(length)] for x in (k_, r_))
        scores = (a @ b.mT * a.shape[-1] ** -0.5 for a, b in ((q_, k_), (p_, r_)))
        total = total + (next(scores) - next(scores)).square().sum()
    return total / (q.shape[1] * sum(length**2 for length in LENGTHS))


def held(case, wrong):
    """Verdicts of ``wrong(*operands)``, computed in fp64 and rounded once."""
    low = case.run("reference")
    wide = case.to(torch.float64)
    exact = wide.run("reference", upstream_dtype=case.dtype)
    value = wrong(*wide.operands)
    upstream = normal(value.shape, 99, torch.float64).to(case.dtype).double()
    gradients = torch.autograd.grad(value, wide.leaves(), upstream)
    found = [value.detach(), *gradients]
    actual = {name: x.to(low[name].dtype) for name, x in zip(exact, found, strict=True)}
    allowed = SLACK[case.served] * rounding(case.dtype)
    return compare(actual, low, exact, allowed, pieces=sequences_of(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_keys_are_within(dtype):
    case = attention(LENGTHS, 1, 26, dtype=dtype)
    assert all(one.share < 0.2 for one in held(case, lambda *x: attention_of(int, *x)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", [26, 64])
@pytest.mark.parametrize(
    "keys",
    [
        lambda length: length + 64 if length == 512 else length,
        lambda length: length - 1 if length == 512 else length,
        lambda length: length - 1 if length in (127, 129) else length,
    ],
    ids=["phantoms", "last lost", "last lost of a tile"],
)
def test_wrong_keys_of_long_sequences_are_over(keys, width, dtype):
    """Each tensor shows them beside short sequences, whose entries are larger."""
    case = attention(LENGTHS, 1, width, dtype=dtype)
    assert not any(one.passed for one in held(case, lambda *x: attention_of(keys, *x)))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_lost_key_of_the_attention_loss_is_over(dtype):
    case = attention_score_mse(LENGTHS, 2, 26, 64, dtype=dtype)

    def wrong(*operands):
        return scores_mse_of(lambda length: length - (length > 100), *operands)

    assert [one.name for one in held(case, wrong) if not one.passed][-2:] == [
        "dq_student", "dk_student",
    ]  # fmt: skip
    right = held(case, lambda *operands: scores_mse_of(int, *operands))
    assert all(one.passed for one in right)


@pytest.mark.parametrize("padded", [False, True])
def test_the_worst_sequence_is_the_verdict(padded):
    case = attention((5, 0, 9), 2, 26, padded=padded, dtype=torch.float16)
    low = case.run("reference")
    exact = case.to(torch.float64).run("reference", upstream_dtype=torch.float16)
    pieces = sequences_of(case)
    actual = {name: x.clone() for name, x in low.items()}
    pieces(actual["dv"])[2].mul_(1.5)
    found = {
        one.name: one for one in compare(actual, low, exact, rounding(case.dtype), pieces=pieces)
    }
    alone = [{name: pieces(x)[2] for name, x in side.items()} for side in (actual, low, exact)]
    assert found["dv"] == compare(*alone, rounding(case.dtype))[-1]
    assert not found["dv"].passed
    assert all(one.passed for name, one in found.items() if name != "dv")


def test_an_infinite_budget_is_the_worst():
    assert [Verdict("x", e, b).share for e, b in ((0.0, 0.0), (0.0, 1.0), (1.0, 2.0))] == [
        0,
        0,
        0.5,
    ]
    for error, budget in ((1.0, 0.0), (0.0, math.inf), (math.nan, 1.0), (0.0, math.nan)):
        verdict = Verdict("x", error, budget)
        assert (verdict.passed, verdict.share) == (False, math.inf)
    want = {"value": torch.ones(2, 1, 1, dtype=torch.float64)}
    low = {"value": torch.tensor([math.inf, 1.0]).view(2, 1, 1)}
    (found,) = compare({"value": 2 * low["value"]}, low, want, 0.1, pieces=lambda x: x.split(1))
    assert not found.passed
