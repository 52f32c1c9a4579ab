"""mlm_mask: the native row function against the reference, exact counts and probabilities, units,
replacements, workers, refusal.
"""

import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinybert_fast.ops import MaskingRule, dispatch, mlm_mask
from tinybert_fast.ops.mlm_mask import MOST_TOKENS
from tinybert_fast.reference.mlm_mask import ONE, SPAN_LENGTHS, inclusion_probabilities
from tinybert_fast.testing.proofs import implementations

V, MASK, SPECIAL = 50, 4, range(5)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = implementations("mlm_mask")
CASES = int(os.environ.get("TINYBERT_FAST_FUZZ_CASES", "300"))  # of each fuzz test
needs_native = pytest.mark.skipif(not FAST, reason=str(dispatch.UNAVAILABLE["native"]))


def rule(**options):
    return MaskingRule.of(V, MASK, SPECIAL, **options)


def tokens(*shape, seed=0, low=0):
    return torch.randint(low, V, shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def calls(draw, widths=(0, 1, 2, 7, 15, 16, 33, 100)):
    """(ids, rule, options): every unit, weights of any skew, flags of every dtype."""
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def uniform(*shape):
        return torch.rand(*shape, generator=source)

    batch, width = draw(st.integers(0, 4)), draw(st.sampled_from(widths))
    unit = draw(st.sampled_from(["token", "word", "span"]))
    weights = None
    if draw(st.booleans()):
        weights = uniform(V) ** draw(st.sampled_from([1, 8, 40]))  # 40: most are capped or tiny
        weights[uniform(V) < draw(st.sampled_from([0.0, 0.5, 0.95]))] = 0
        weights[10] = 1.0
    places = uniform(draw(st.sampled_from([1, 3, 10, 200]))) + 0.01
    made = rule(
        token_weights=weights,
        position_weights=places if draw(st.booleans()) else None,
        ratio=draw(st.sampled_from([0.01, 0.15, 0.5, 1.0])),
        unit=unit,
    )
    options = {
        "seed": draw(st.integers(0, 2**63 - 1)),
        "step": draw(st.integers(0, 2**32 - 1)),
        "dense_labels": draw(st.booleans()),
        "allow_empty_rows": True,
    }
    dtypes = st.sampled_from([torch.bool, torch.uint8, torch.int64])
    if draw(st.booleans()):
        numbers = torch.randint(-(2**62), 2**62, (batch,), generator=source)
        options["example_ids"] = numbers.to(DEVICE)
    for name, share in (("special_tokens_mask", 0.2), ("attention_mask", 0.8)):
        if draw(st.booleans()):
            options[name] = (uniform(batch, width) < share).to(DEVICE, draw(dtypes))
    if unit != "token":
        options["word_starts"] = (uniform(batch, width) < 0.6).to(DEVICE)
    if draw(st.booleans()):
        options["capacity"] = batch * made.most([width]) + draw(st.sampled_from([0, 5]))
    ids = torch.randint(0, V, (batch, width), generator=source)
    return ids.to(DEVICE), made.to(DEVICE), options


def expected_budget(ids, made, options):
    """k of each row, by its definition; and which tokens are eligible."""
    table = made.table.to("cpu", torch.int64) & 0xFFFFFFFF
    eligible = (table & 1).bool()[ids.cpu()]
    for name, wanted in (("special_tokens_mask", False), ("attention_mask", True)):
        if name in options:
            eligible &= (options[name].cpu() != 0) == wanted
    positive = eligible & (table >> 1 > 0)[ids.cpu()]
    n = eligible.sum(1)
    ratio = round(made.ratio * ONE)
    k = [max(1, (int(m) * ratio + ONE // 2) // ONE) for m in n]
    return [min(a, int(b)) for a, b in zip(k, positive.sum(1))], eligible, positive


@needs_native
@settings(max_examples=CASES, deadline=None)
@given(calls())
def test_native_equals_the_reference(call):
    from tinybert_fast import _native

    ids, made, options = call
    want = mlm_mask(ids, made, **options, impl="reference")
    try:
        for isa in (0, 1, 2):
            _native.limit_isa(isa)
            got = mlm_mask(ids, made, **options, impl="native")
            for name, a, b in zip(want._fields, got, want):
                assert (a is None and b is None) or torch.equal(a, b), (name, isa)
    finally:
        _native.limit_isa(-1)


@settings(max_examples=CASES, deadline=None)
@given(calls(widths=(0, 1, 2, 15, 16, 33, 100, 513, MOST_TOKENS)), st.booleans())
def test_invariants(call, in_place):
    ids, made, options = call
    given_ids = ids.clone()
    got = mlm_mask(given_ids, made, **options, in_place=in_place)
    assert torch.equal(given_ids, got.input_ids if in_place else ids)
    if int(got.offsets[-1]) and DEVICE == "cpu":  # a GPU would stop: test_device_stops.py
        short = {**options, "capacity": int(got.offsets[-1]) - 1}
        kept = ids.clone()
        with pytest.raises(ValueError, match="tokens are masked and capacity is"):
            mlm_mask(kept, made, **short, in_place=True)
        assert torch.equal(kept, ids)
    budget, eligible, positive = expected_budget(ids, made, options)
    counts = got.offsets.diff().tolist()
    total = int(got.offsets[-1])
    assert int(got.offsets[0]) == 0
    assert len(got.rows) == len(got.labels) == options.get("capacity", total)
    assert not got.rows[total:].any()
    assert bool((got.labels[total:] == -100).all())
    got = got._replace(rows=got.rows[:total], labels=got.labels[:total])
    assert torch.equal(ids.flatten()[got.rows], got.labels)
    chosen = torch.zeros(ids.numel(), dtype=torch.bool)
    chosen[got.rows.cpu()] = True
    assert torch.equal(chosen.nonzero().flatten(), got.rows.cpu())  # increasing, each once
    assert not (chosen & ~eligible.flatten()).any()
    unchosen = ~chosen.view_as(eligible).to(ids.device)
    assert torch.equal(got.input_ids[unchosen], ids[unchosen])
    new = got.input_ids.flatten()[got.rows]
    moved = new[new != got.labels]
    assert not ((moved < len(SPECIAL)) & (moved != MASK)).any()
    if got.dense_labels is not None:
        assert torch.equal(got.dense_labels.flatten()[got.rows], got.labels)
        assert bool((got.dense_labels[unchosen] == -100).all())
    if made.unit == "token":
        assert counts == budget
        assert not (chosen & ~positive.flatten()).any()
    else:
        assert all(count <= k for count, k in zip(counts, budget))


@pytest.mark.parametrize("unit", ["word", "span"])
def test_units_are_whole_and_fill_the_budget(unit):
    ids, starts = tokens(40, 60, seed=1, low=5), tokens(40, 60, seed=2) < V // 2
    made = rule(unit=unit, ratio=0.3)
    got = mlm_mask(ids, made, seed=3, word_starts=starts)
    chosen = torch.zeros(ids.shape, dtype=torch.bool).flatten()
    chosen[got.rows] = True
    chosen, k = chosen.view_as(ids), round(0.3 * 60)
    starts[:, 0] = True
    for row, begins in zip(chosen.tolist(), starts.tolist()):
        bounds = [i for i, begin in enumerate(begins) if begin] + [60]
        words = [row[a:b] for a, b in pairwise(bounds)]
        assert all(len(set(word)) == 1 for word in words)
        longest = max(map(len, words)) if unit == "word" else 10 * max(map(len, words))
        assert k - longest < sum(row) <= k


def test_span_lengths_and_their_replacement():
    """Words of one token, and room for all spans but those that do not fit: the drawn lengths."""
    ids = torch.full((400, 512), 7)
    made = rule(unit="span", ratio=0.2)
    got = mlm_mask(ids, made, seed=5, word_starts=torch.ones_like(ids, dtype=torch.bool))
    masked = torch.zeros(ids.shape, dtype=torch.bool)
    masked.view(-1)[got.rows] = got.input_ids.flatten()[got.rows] == MASK
    runs = Counter()
    for row in masked.tolist():
        run = 0
        for token in [*row, False]:
            if not token and run:
                runs[run] += 1
            run = run + 1 if token else 0
    total = sum(runs.values())
    # Spans that touch run together, which makes runs longer than spans: only the order is sure.
    shares = [runs[n] / total for n in range(1, 6)]
    drawn = [(b - a) / ONE for a, b in zip((0, *SPAN_LENGTHS), SPAN_LENGTHS)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(drawn[0], abs=0.06)
    assert sum(n * runs[n] for n in runs) / total > 2.5


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=40), st.data())
def test_probabilities_add_up(weights, data):
    positive = sum(w > 0 for w in weights)
    k = data.draw(st.integers(0, positive))
    p = inclusion_probabilities(weights, k)
    assert sum(p) == k * ONE
    assert all(0 <= x <= ONE and (w or not x) for x, w in zip(p, weights))
    ordered = [x for _, x in sorted(zip(weights, p))]
    assert all(b >= a - 1 for a, b in pairwise(ordered))  # heavier, likelier


def frequencies(made, ids, draws, **options):
    """How often each token of one row was chosen, with its p."""
    batch = 1000
    total = torch.zeros(ids.shape[1], dtype=torch.int64)
    for step in range(draws // batch):
        got = mlm_mask(ids.expand(batch, -1).contiguous(), made, seed=11, step=step, **options)
        total += torch.bincount(got.rows % ids.shape[1], minlength=ids.shape[1])
    weights = ((made.table.long() & 0xFFFFFFFF) >> 1)[ids[0]].tolist()
    k = max(1, round(made.ratio * sum(w > 0 for w in weights)))
    return total / draws, torch.tensor(inclusion_probabilities(weights, k)) / ONE


@needs_native
@pytest.mark.parametrize("skew", [0, 1, 6])
def test_inclusion_is_exactly_p(skew):
    """200,000 draws; skew 6 caps some tokens at 1."""
    ids = tokens(1, 32, seed=skew, low=5)
    weights = torch.linspace(0.2, 1, V) ** skew
    found, p = frequencies(rule(token_weights=weights, ratio=0.2), ids, 200_000)
    error = (p * (1 - p) / 200_000).sqrt()
    assert bool(((found - p).abs() <= 4 * error).all()), ((found - p) / error).abs().max()
    assert (skew == 6) == bool((p == 1).any())


@needs_native
def test_replacements_follow_their_shares():
    ids = torch.full((2000, 128), 9)
    got = mlm_mask(ids, rule(mask_share=0.6, random_share=0.3), seed=1)
    new = got.input_ids.flatten()[got.rows]
    n = len(new)
    mask, stays = (new == MASK).sum() / n, (new == 9).sum() / n
    assert abs(mask - 0.6) < 4 * (0.6 * 0.4 / n) ** 0.5
    assert abs(stays - (0.1 + 0.3 / 45)) < 4 * (0.1 * 0.9 / n) ** 0.5
    others = torch.bincount(new[(new != MASK) & (new != 9)], minlength=V)
    assert others[:5].sum() == 0
    expected = 0.3 * n / 45
    chi2 = (((others[5:] - expected) ** 2)[torch.arange(5, V) != 9] / expected).sum()
    assert chi2 < 44 + 4 * (2 * 44) ** 0.5


def test_draws_depend_on_the_example_alone():
    """Not on the rest of the batch, its order or its width."""
    ids = tokens(6, 40, seed=3, low=5)
    examples = torch.tensor([7, 2**40, 3, -1, 5, 6])
    whole = mlm_mask(ids, rule(), seed=1, step=2, example_ids=examples)
    order = torch.tensor([4, 1, 0, 5])
    padded = torch.zeros(4, 55, dtype=torch.int64)
    padded[:, :40] = ids[order]
    part = mlm_mask(padded, rule(), seed=1, step=2, example_ids=examples[order])
    assert torch.equal(part.input_ids[:, :40], whole.input_ids[order])
    for other in ({"seed": 2, "step": 2}, {"seed": 1, "step": 3}):
        again = mlm_mask(ids, rule(), **other, example_ids=examples)
        assert not torch.equal(again.input_ids, whole.input_ids)


def test_ratio_follows_a_schedule():
    ids = tokens(3, 100, seed=4, low=5)
    low = mlm_mask(ids, replace(rule(), ratio=0.1), seed=1)
    high = mlm_mask(ids, replace(rule(), ratio=0.4), seed=1)
    assert low.offsets.diff().tolist() == [10] * 3
    assert high.offsets.diff().tolist() == [40] * 3


def test_capacity_and_in_place(impl):
    ids = tokens(3, 20, seed=5, low=5)
    want = mlm_mask(ids, rule(), seed=1, impl=impl)
    most = rule().most([20, 20, 20])
    assert most == 9 == len(want.rows)
    options = {"seed": 1, "impl": impl, "allow_empty_rows": True}
    fixed = mlm_mask(ids, rule(), capacity=most + 2, **options)
    assert fixed.rows.tolist() == [*want.rows.tolist(), 0, 0]
    assert fixed.labels.tolist() == [*want.labels.tolist(), -100, -100]
    kept = ids.clone()
    with pytest.raises(ValueError, match="9 tokens are masked and capacity is 8"):
        mlm_mask(kept, rule(), capacity=8, in_place=True, **options)
    assert torch.equal(kept, ids)
    got = mlm_mask(kept, rule(), in_place=True, seed=1, impl=impl)
    assert got.input_ids is kept
    assert torch.equal(kept, want.input_ids)


def test_contract(impl):
    ids = tokens(2, 20, seed=5, low=5).to(DEVICE)
    plan = rule(device=DEVICE).plan
    torch.library.opcheck(
        torch.ops.tinybert_fast.mlm_mask_.default,
        (ids, None, None, None, None, plan.table, None, plan.ordinary, plan.mask_id, plan.ratio,
         plan.mask_below, plan.random_below, 1, 2, "token", 8, True, True, impl),
    )  # fmt: skip


def test_compiles_whole(impl):
    ids = tokens(2, 20, seed=5, low=5).to(DEVICE)
    made = rule(device=DEVICE)

    def run(ids):
        got = mlm_mask(ids, made, seed=1, capacity=8, allow_empty_rows=True, impl=impl)
        return got.input_ids, got.rows, got.labels

    whole = torch.compile(run, fullgraph=True, backend="aot_eager")
    for a, b in zip(whole(ids), run(ids)):
        assert torch.equal(a, b)


def test_numpy_arrays_are_read_where_they_are():
    ids = tokens(2, 20, seed=6, low=5)
    array = ids.numpy().copy()
    got = mlm_mask(array, rule(), seed=1, in_place=True)
    assert got.input_ids.data_ptr() == array.__array_interface__["data"][0]
    assert np.array_equal(array, mlm_mask(ids, rule(), seed=1).input_ids.numpy())


@needs_native
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_same_draws_in_a_worker(method):
    """After this process has used threads of its own, of which a forked one has none."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    run = partial(mlm_mask, tokens(64, 64, low=5), rule(), seed=1)
    try:
        want = run().input_ids
        with multiprocessing.get_context(method).Pool(1) as pool:
            got = pool.apply_async(run).get(timeout=60).input_ids
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(got, want)


def strange_id(ids, draw):
    wrong = ids.clone()
    wrong.view(-1)[draw(st.integers(0, ids.numel() - 1))] = draw(
        st.sampled_from([V, -1, 2**31, 2**32 + 7, 2**63 - 1, -(2**63)])
    )
    return {"input_ids": wrong}


WRONG = {
    **({"id": strange_id} if DEVICE == "cpu" else {}),  # a GPU would stop: test_device_stops.py
    "ids": lambda ids, draw: {
        "input_ids": draw(st.sampled_from([ids.int(), ids[0], ids[None], ids.mT, ids[:, ::2]]))
    },
    "flag": lambda ids, draw: {
        draw(st.sampled_from(["special_tokens_mask", "attention_mask", "word_starts"])): draw(
            st.sampled_from([ids.float(), ids[:-1], ids[:, :-1] > 0, ids.mT > 0, ids.to("meta")])
        )
    },
    "examples": lambda ids, draw: {
        "example_ids": torch.arange(len(ids) + draw(st.sampled_from([-1, 1])))
    },
    "seed": lambda ids, draw: {"seed": draw(st.sampled_from([-1, 2**63, 0.5, None, "1"]))},
    "step": lambda ids, draw: {"step": draw(st.sampled_from([-1, 2**32, 1.5, None]))},
    "capacity": lambda ids, draw: {"capacity": draw(st.sampled_from([-1, 2**31, 2.5]))},
}


@settings(max_examples=CASES, deadline=None)
@given(calls(widths=(3, 16, 33)), st.sampled_from(sorted(WRONG)), st.booleans(), st.data())
def test_refuses_and_writes_nothing(call, what, in_place, data):
    """One operand of a sound call is wrong: ValueError, whatever the rest is like."""
    ids, made, options = call
    if len(ids) < 2:
        return
    options.pop("attention_mask", None)  # behind which a strange id would be none of the row's
    changed = {"input_ids": ids.clone(), **options, **WRONG[what](ids, data.draw)}
    kept = {k: v.clone() for k, v in changed.items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError, match="mlm_mask: "):
        mlm_mask(rule=made, **changed, in_place=in_place)
    assert all(v.is_meta or torch.equal(changed[k], v) for k, v in kept.items())


IDS = tokens(2, 20, seed=7, low=5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": IDS.clone().fill_(V)}, r"input_ids\[0, 0\] is 50; expected 0 to 49"),
        ({"input_ids": IDS - V}, r"input_ids\[0, 0\] is -"),
        (
            {"special_tokens_mask": torch.tensor([[0] * 20, [1] * 20])},
            "row 1 has no token that may be masked",
        ),
        ({"input_ids": IDS.T}, r"input_ids is not contiguous \(strides"),
        ({"input_ids": IDS.int()}, "dtype torch.int32 is not one of torch.int64"),
        ({"input_ids": IDS[0]}, r"must be \(B, N\) with N up to 8192 .*; got shape \(20,\)"),
        ({"input_ids": torch.full((1, MOST_TOKENS + 1), 9)}, "N up to 8192"),
        ({"input_ids": [[1]]}, "input_ids is list; expected a tensor or array"),
        ({"attention_mask": IDS.float()}, "attention_mask must be .*; got torch.float32"),
        ({"attention_mask": IDS[:1]}, r"attention_mask must be .*; got torch.int64 \(1, 20\)"),
        ({"attention_mask": IDS.to("meta")}, "attention_mask is on meta"),
        ({"example_ids": torch.arange(3)}, r"example_ids must be int64 \(2,\)"),
        ({"word_starts": IDS > 9}, "unit 'token' takes no word_starts"),
        ({"rule": rule(unit="word")}, "unit 'word' needs word_starts"),
        ({"seed": -1}, "seed=-1; expected an integer from 0 to 9223372036854775807"),
        ({"step": 2**32}, "step=4294967296; expected an integer from 0 to 4294967295"),
    ],
)
def test_refuses(impl, change, message):
    call = {"input_ids": IDS.clone(), "rule": rule(), "seed": 1, "in_place": True, **change}
    before = call["input_ids"].clone() if isinstance(call["input_ids"], torch.Tensor) else None
    with pytest.raises(ValueError, match=message):
        mlm_mask(**call, impl=impl)
    assert before is None or torch.equal(call["input_ids"], before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ratio": 0.0}, "ratio=0.0; expected above 0, at most 1"),
        ({"ratio": 1.1}, "ratio=1.1"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"mask_share": 0.8, "random_share": 0.3}, "add up to at most 1"),
        ({"unit": "letter"}, "unit='letter' is not one of token, word, span"),
        ({"token_weights": [1.0]}, "token_weights has 1 numbers; expected 50"),
        ({"token_weights": [-1.0] + [1.0] * 49}, "must be finite numbers of 0 or more"),
        ({"token_weights": [float("nan")] * V}, "must be finite numbers of 0 or more"),
        ({"token_weights": [0.0] * V}, "one of them above 0"),
        ({"token_weights": [1.0] * 5 + [0.0] * 45}, "one of them above 0"),
        ({"position_weights": []}, "position_weights must be finite"),
        ({"special_ids": [V]}, "special_ids=50; expected an integer from 0 to 49"),
        ({"special_ids": range(V)}, "all 50 tokens are special"),
        ({"mask_id": V}, "mask_id=50; expected an integer from 0 to 49"),
    ],
)
def test_rule_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        MaskingRule.of(**{"vocab_size": V, "mask_id": MASK, "special_ids": SPECIAL, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"places": torch.ones(3)},
            r"places must be torch.int32 \(n,\), .*; got torch.float32 \(3,\)",
        ),
        ({"places": torch.ones(0, dtype=torch.int32)}, r"places must be .*not empty"),
        ({"table": torch.ones(V - 1, dtype=torch.int32)}, r"table must be torch.int32 \(50,\)"),
        ({"ordinary": torch.ones(3, dtype=torch.int32)}, "ordinary must be torch.int64"),
        ({"ordinary": torch.arange(4, 8)[::2]}, "ordinary must be .*contiguous"),
        ({"ordinary": torch.tensor([5, V])}, "ordinary has ids from 5 to 50; expected 0 to 49"),
        ({"ordinary": torch.tensor([-1, 5])}, "ordinary has ids from -1 to 5"),
        ({"ratio": "0.15"}, "ratio='0.15'; expected a number from 0 to 1"),
        ({"mask_share": None}, "mask_share=None; expected a number"),
    ],
)
def test_rule_made_by_hand_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        replace(rule(position_weights=[1.0, 2.0]), **change)


def test_numbers_of_numpy():
    made = rule(ratio=np.float32(0.25), mask_share=np.float64(0.5), random_share=np.int64(0))
    assert made.plan[3:] == rule(ratio=0.25, mask_share=0.5, random_share=0.0).plan[3:]


@pytest.mark.parametrize("late", [False, True])
def test_in_place_undone_where_a_row_is_empty(late, impl, monkeypatch):
    """Also as on a GPU, which tells when the other rows have been masked."""
    if late:
        module = sys.modules["tinybert_fast.ops.mlm_mask"]  # whose name is the function's too
        monkeypatch.setattr(module, "_told_late", lambda ids: True)
    ids = tokens(3, 20, seed=7, low=5)
    ids[1] = 0
    before = ids.clone()
    with pytest.raises(ValueError, match="row 1 has no token that may be masked"):
        mlm_mask(ids, rule(), seed=1, in_place=True, impl=impl)
    assert torch.equal(ids, before)


def test_refuses_arrays_that_torch_cannot_hold():
    array = IDS.numpy().copy()
    array.setflags(write=False)
    with pytest.raises(ValueError, match="input_ids is a read-only array"):
        mlm_mask(array, rule(), seed=1)
    with pytest.raises(ValueError, match="input_ids is not contiguous"):
        mlm_mask(IDS.numpy()[:, ::2], rule(), seed=1)


def test_autograd_notices_ids_that_changed():
    ids, table = tokens(2, 8, seed=1, low=5), torch.rand(V, 3, requires_grad=True)
    read = torch.nn.functional.embedding(ids, table.to(ids.device)).sum()
    mlm_mask(ids, rule(), seed=1, in_place=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        read.backward()


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("first", ["nothing", "load", "run"])
def test_a_forked_child_does_not_wait_for_its_parents_threads(first, tmp_path):
    """The parent has run torch on two threads, and loaded the module, used it or neither."""
    script = tmp_path / "fork.py"
    script.write_text(
        """
import os, signal, sys, torch
from tinybert_fast.ops import MaskingRule, mlm_mask, native
torch.set_num_threads(2)
torch.rand(1000, 1000).exp_().sum()
rule = MaskingRule.of(50, 4, range(5))
ids = torch.randint(5, 50, (64, 64))
if sys.argv[1] == "load":
    native.module()
elif sys.argv[1] == "run":
    mlm_mask(ids, rule, seed=1)
child = os.fork()
if child == 0:
    signal.alarm(20)
    mlm_mask(ids, rule, seed=1)
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )
    subprocess.run([sys.executable, script, first], check=True, timeout=120, cwd=tmp_path)
