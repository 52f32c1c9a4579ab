"""Pairs and packed sentences as ranges of tokens."""

from itertools import accumulate, pairwise
from random import Random
from statistics import fmean

from hypothesis import given
from hypothesis import strategies as st

from tinybert_fast.data.pairs import Range, key, packed_sentences, sentence_pairs

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)
ROOM = st.integers(2, 50)
FAR = 10_000  # tokens of another document


def bounds_of(lengths, start=0):
    return list(accumulate(lengths, initial=start))


def pairs_of(lengths, room, short=0.0, seed=0, start=0):
    draw = Random(seed)
    return list(
        sentence_pairs(
            bounds_of(lengths, start), room, short, draw, lambda n: Range(FAR, FAR + max(1, n))
        )
    )


@given(LENGTHS, ROOM, st.sampled_from([0.0, 0.1, 1.0]), st.integers(0, 99), st.integers(0, 99))
def test_what_a_pair_is(lengths, room, short, seed, start):
    bounds = bounds_of(lengths, start)
    pairs = pairs_of(lengths, room, short, seed, start)
    assert pairs == pairs_of(lengths, room, short, seed, start)
    for a, b, unrelated in pairs:
        assert start <= a.start < a.stop <= bounds[-1]
        assert b.start < b.stop
        assert a.stop - a.start + b.stop - b.start <= room
        assert unrelated == (b.start >= FAR)
        if not unrelated:  # a sentence ends between them, and what is left out was cut
            assert a.stop <= b.start
            assert any(a.stop <= end <= b.start for end in bounds)
    assert all(one.a.stop <= other.a.start for one, other in pairwise(pairs))


@given(LENGTHS)
def test_with_room_every_sentence_comes(lengths):
    """Those behind an unrelated pair come again, so A and related B cover the document."""
    covered = []
    for a, b, unrelated in pairs_of(lengths, room=3000):
        covered += range(*a)
        covered += [] if unrelated else range(*b)
    assert covered == list(range(sum(lengths)))


def test_half_are_unrelated_and_splits_are_even():
    pairs = pairs_of([5] * 40_000, room=20, seed=1)
    share = sum(pair.unrelated for pair in pairs) / len(pairs)
    assert abs(share - 0.5) < 4 * 0.5 / len(pairs) ** 0.5
    first = [a.stop - a.start for a, b, unrelated in pairs]
    for length in (5, 10, 15):
        assert abs(first.count(length) / len(first) - 1 / 3) < 0.02


def test_short_targets():
    lengths = [1] * 60_000
    sizes = [a.stop - a.start + b.stop - b.start for a, b, _ in pairs_of(lengths, 50, short=0.1)]
    share = sum(size < 50 for size in sizes) / len(sizes)
    assert abs(share - 0.1 * 48 / 49) < 0.02  # of 2 to 50, one is no shorter
    assert min(sizes) == 2


def test_the_longer_segment_is_cut_at_both_ends():
    """18 and 30 tokens in room for 20: 12 of B come off first, then 8 of each."""
    fronts = []
    for seed in range(400):
        a, b, unrelated = pairs_of([18, 30], room=20, seed=seed)[0]
        if not unrelated:
            assert a.stop - a.start == b.stop - b.start == 10
            fronts.append((a.start, b.start - 18))
    tolerance = 4 / len(fronts) ** 0.5
    for cut, mean in zip((8, 20), map(fmean, zip(*fronts))):
        assert abs(mean - cut / 2) < tolerance * (cut / 4) ** 0.5  # a fair coin for each token


@given(LENGTHS, ROOM, st.sampled_from([0.0, 0.3]), st.integers(0, 9))
def test_packed_sentences_cover_and_fit(lengths, room, short, start):
    bounds = bounds_of(lengths, start)
    ranges = list(packed_sentences(bounds, room, short, Random(0)))
    assert [i for r in ranges for i in range(*r)] == list(range(start, bounds[-1]))
    for r in ranges:
        assert 0 < r.stop - r.start <= room
        assert r.stop in bounds or not any(r.start < end <= r.stop for end in bounds)
    if not short:
        for r in ranges[:-1]:  # the next sentence did not fit
            assert r.stop not in bounds or bounds[bounds.index(r.stop) + 1] > r.start + room


def test_keys_differ():
    draws = {key(*k).random() for k in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]}
    assert len(draws) == 5
