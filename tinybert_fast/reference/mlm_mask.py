"""Exact-count masking for masked language models, in integers of any size.

    w_i = eligible_i * g(place_i) * h(token_i)                       31 bits
    k   = min(#{w_i > 0}, max(1, round(ratio * #eligible)))          tokens of a row
    p_i = min(1, lambda * w_i), lambda such that sum p_i = k         in units of 2^-32

Unit "token": systematic sampling (Madow 1949) on a random permutation: in the order of (random
word, position), token i is chosen where the running sum of p crosses offset + j * 2^32. Exactly k
tokens are chosen, token i with probability exactly p_i.

Units "word" and "span": whole words, or spans of 1 to 10 words whose length is geometric (Joshi et
al. 2020, arXiv:1907.10529), by sequential Poisson sampling (Ohlsson 1998): in the order of random
word / mean weight, a unit is taken if it still fits into k. The count is at most k, and more than k
minus the longest unit. Spans come from cutting the row into spans from its first word on, so chosen
ones never overlap; a span ends early at a token that is not eligible.

A chosen token becomes [MASK], a random ordinary token, or stays: by a random word of its own, or of
its span's first token. Every word is Philox of (stream and index, example id, step) under the seed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tinybert_fast.reference.philox import WORD, philox

ONE = 1 << 32  # probability 1
ORDER, OFFSET, ACTION, SPAN = range(4)  # streams of random words
STREAM_BITS = 28
IGNORE = -100
SPAN_LENGTHS = tuple(round(ONE * (1 - 0.8**n) / (1 - 0.8**10)) for n in range(1, 11))


class Plan(NamedTuple):
    """What a masking is made of: tables and quantised numbers, on the device of the tokens.

    table: int32 (V,), the bits of weight << 1 | eligible; places: int32 (P,), the bits of 32-bit
    weights over a row's real tokens, or None; ordinary: int64, ids that may replace a token.
    """

    table: Tensor
    places: Tensor | None
    ordinary: Tensor
    mask_id: int
    ratio: int
    mask_below: int
    random_below: int
    unit: str


def mlm_mask(
    input_ids: Tensor,
    special: Tensor | None,
    attention: Tensor | None,
    starts: Tensor | None,
    examples: Tensor | None,
    plan: Plan,
    seed: int,
    step: int,
) -> tuple[Tensor, list[Tensor]]:
    """(B, N) int64 ids -> the corrupted ids, and for each row the chosen positions."""
    out, chosen = input_ids.clone(), []
    table = [entry & WORD for entry in plan.table.tolist()]
    for b, ids in enumerate(input_ids.tolist()):
        example = b if examples is None else int(examples[b])
        real = [True] * len(ids) if attention is None else (attention[b] != 0).tolist()
        barred = [False] * len(ids) if special is None else (special[b] != 0).tolist()
        entries = [
            table[token] if here and not closed else 0
            for token, here, closed in zip(ids, real, barred)
        ]
        eligible = [entry & 1 for entry in entries]
        weights = _weights(entries, real, plan.places)
        k = min(sum(w > 0 for w in weights), max(1, (sum(eligible) * plan.ratio + ONE // 2) // ONE))
        draw = _Words(seed, step, example, input_ids.device)
        first = list(range(len(ids)))  # whose random word decides what becomes of a token
        if plan.unit == "token":
            picked = _choose_tokens(weights, k, draw)
        else:
            assert starts is not None
            units = _units(eligible, (starts[b] != 0).tolist(), plan.unit, draw)
            if plan.unit == "span":
                for unit in units:
                    for i in unit:
                        first[i] = unit[0]
            picked = _choose_units(units, weights, k, draw)
        for i in picked:
            action = draw(ACTION, first[i])[0]
            if action < plan.mask_below:
                out[b, i] = plan.mask_id
            elif action < plan.random_below:
                other = draw(ACTION, i)[1] * len(plan.ordinary) >> 32
                out[b, i] = plan.ordinary[other]
        chosen.append(torch.tensor(picked, dtype=torch.int64, device=input_ids.device))
    return out, chosen


def inclusion_probabilities(weights: list[int], k: int) -> list[int]:
    """min(1, lambda * w), in units of 2^-32, that add up to exactly k."""
    capped = [False] * len(weights)
    left, total = k, sum(weights)
    while left and total:
        new = [i for i, w in enumerate(weights) if not capped[i] and w * left >= total > 0 < w]
        if not new:
            break
        for i in new:
            capped[i] = True
        left -= len(new)
        total -= sum(weights[i] for i in new)
    p = [ONE if cap else w * left * ONE // total if w else 0 for w, cap in zip(weights, capped)]
    rest = k * ONE - sum(p)
    open_ = [i for i, w in enumerate(weights) if w and not capped[i]]
    for i in open_[:rest]:  # what rounding down left over, one unit each
        p[i] += 1
    return p


def _weights(entries: list[int], real: list[bool], places: Tensor | None) -> list[int]:
    """g(place) * h(token), rounded, 0 only where one of them is."""
    tokens = [entry >> 1 for entry in entries]
    if places is None:
        return tokens
    table, length, rank = [g & WORD for g in places.tolist()], sum(real), 0
    weights = []
    for h, here in zip(tokens, real):
        g = table[rank * len(table) // length] if here else 0
        weights.append(max(1, (g * h + ONE // 2) // ONE) if g and h else 0)
        rank += here
    return weights


class _Words:
    """The random words of one row: words(stream, index) -> four of them."""

    def __init__(self, seed: int, step: int, example: int, device: torch.device):
        def at(value: int) -> Tensor:
            return torch.tensor([value & WORD], device=device)

        self._key = at(seed), at(seed >> 32)
        self._rest = at(example), at(example >> 32), at(step)
        self._at = at

    def __call__(self, stream: int, index: int) -> list[int]:
        counter = (self._at(stream << STREAM_BITS | index), *self._rest)
        return [int(word) for word in philox(counter, self._key)]

    def first(self, stream: int, count: int) -> list[int]:
        """The words of indices 0, 1, ... one after the other: ``count`` of them."""
        index = torch.arange((count + 3) // 4, device=self._rest[0].device)
        counter = ((stream << STREAM_BITS) + index, *(x.expand_as(index) for x in self._rest))
        words = philox(counter, tuple(x.expand_as(index) for x in self._key))
        return torch.stack(words, 1).flatten()[:count].tolist()


def _choose_tokens(weights: list[int], k: int, draw: _Words) -> list[int]:
    p = inclusion_probabilities(weights, k)
    words = draw.first(ORDER, len(weights))
    order = sorted((words[i], i) for i in range(len(weights)) if p[i])
    offset = draw(OFFSET, 0)[0]
    picked, before = [], 0
    for _, i in order:
        # Is offset + j * 2^32 in [before, before + p) for some j?
        first, stop = (-(-(x - offset) // ONE) for x in (before, before + p[i]))
        if first < stop:
            picked.append(i)
        before += p[i]
    return sorted(picked)


def _units(eligible: list[int], starts: list[bool], unit: str, draw: _Words) -> list[list[int]]:
    """Words, or spans of words, of neighbouring eligible tokens."""
    words: list[list[int]] = []
    for i, may in enumerate(eligible):
        if may and i and eligible[i - 1] and not starts[i]:
            words[-1].append(i)
        elif may:
            words.append([i])
    if unit == "word":
        return words
    spans: list[list[int]] = []
    room = 0  # words that still belong to the last span
    for word in words:
        if room and spans[-1][-1] + 1 == word[0]:
            spans[-1] += word
        else:
            spans.append(list(word))
            drawn = draw(SPAN, word[0])[0]
            room = 1 + sum(drawn >= bound for bound in SPAN_LENGTHS[:-1])
        room -= 1
    return spans


def _choose_units(units: list[list[int]], weights: list[int], k: int, draw: _Words) -> list[int]:
    ranked = []
    for unit in units:
        weight = sum(weights[i] for i in unit)
        if weight:
            mean = max(1, weight // len(unit) >> 15)  # 16 bits
            ranked.append(((draw(ORDER, unit[0])[0] << 16) // mean, unit))
    picked: list[int] = []
    for _, unit in sorted(ranked):
        if len(picked) + len(unit) <= k:
            picked += unit
    return sorted(picked)
