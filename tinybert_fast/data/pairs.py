"""Which tokens become one example: sentence pairs as BERT makes them, or whole sentences in a row.

Sentences lie one behind the other in one array of tokens, so every segment is a range of it, and
everything here is arithmetic on ``bounds``: sentence i is tokens bounds[i] to bounds[i + 1].
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple


class Range(NamedTuple):
    start: int
    stop: int


class Pair(NamedTuple):
    """Segment A, segment B, and 1 if B is from another document (BERT's next_sentence_label)."""

    a: Range
    b: Range
    unrelated: int


def key(seed: int, duplicate: int, part: int) -> Random:
    """The draws of one part of the corpus, whoever makes them."""
    return Random(seed << 96 | duplicate << 64 | part)


def sentence_pairs(
    bounds: list[int],
    room: int,
    short: float,
    draw: Random,
    other: Callable[[int], Range],
) -> Iterator[Pair]:
    """The pairs of one document.

    Sentences are taken until they reach a target, ``room`` tokens or, with probability ``short``,
    any number from 2 (BERT draws that once for a document, we for each pair: one long document must
    not be short as a whole). They are split at a random sentence end. In half of the cases B is
    what follows A; else, and always where one sentence fills the target, B is ``other(n)``,
    sentences of another document that reach n tokens if they can, and those that B would have had
    come again in the next pair. What does not fit comes off the longer segment, at its front or
    back alike.
    """
    sentences = len(bounds) - 1
    first = 0
    while first < sentences:
        target = _target(room, short, draw)
        stop = bisect_left(bounds, bounds[first] + target, first + 1, sentences)
        taken = stop - first
        middle = first + 1 + (int(draw.random() * (taken - 1)) if taken > 1 else 0)
        a = Range(bounds[first], bounds[middle])
        unrelated = taken == 1 or draw.random() < 0.5
        if unrelated:
            b, stop = other(target - (a.stop - a.start)), middle
        else:
            b = Range(bounds[middle], bounds[stop])
        yield Pair(*_fitted(a, b, room, draw), int(unrelated))
        first = stop


def packed_sentences(bounds: list[int], room: int, short: float, draw: Random) -> Iterator[Range]:
    """As many whole sentences of one document as fit; a sentence that alone does not is cut."""
    at, end = bounds[0], bounds[-1]
    while at < end:
        most = at + _target(room, short, draw)
        whole = bounds[bisect_right(bounds, most) - 1]
        stop = whole if whole > at else most
        yield Range(at, stop)
        at = stop


def _target(room: int, short: float, draw: Random) -> int:
    if short and draw.random() < short:
        return 2 + int(draw.random() * (room - 1))
    return room


def _fitted(a: Range, b: Range, room: int, draw: Random) -> tuple[Range, Range]:
    """Each token too many comes off the longer one, off B where they are equally long."""
    lead = (a.stop - a.start) - (b.stop - b.start)
    excess = max(0, (a.stop - a.start) + (b.stop - b.start) - room)
    uneven = min(excess, abs(lead))
    even = excess - uneven
    from_a = even // 2 + (uneven if lead > 0 else 0)
    return _cut(a, from_a, draw), _cut(b, excess - from_a, draw)


def _cut(segment: Range, tokens: int, draw: Random) -> Range:
    front = draw.getrandbits(tokens).bit_count() if tokens else 0  # a coin for each token
    return Range(segment.start + front, segment.stop - (tokens - front))
