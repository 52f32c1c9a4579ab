"""Times in turns: rounds A B C, A B C, ..., so that what disturbs the machine for a while disturbs
everybody; and the figures that are made of them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from tinybert_fast.benchmarks.clocks import Clock
from tinybert_fast.benchmarks.graphs import Replay

ROUNDS = {"cpu": 10, "cuda": 50}
WARM_UP = {"cpu": 1, "cuda": 20}
# A case of long steps takes fewer on a GPU: what fits into so many seconds, but not below these.
SECONDS = {"rounds": 3.0, "warm-up": 0.5}
SECONDS_OF_OPS = {"rounds": 0.4, "warm-up": 0.1}  # of which there are a hundred, and short
LEAST_ROUNDS, LEAST_WARM_UP = 10, 3
ROUNDS_SHORT = 3  # bf16 without instructions for it (slow, and nobody's figure), smoke runs

Lane = tuple[Any, str]  # provider, dtype


def interleave(
    lanes: list[Lane],
    rounds: int,
    warm_up: int,
    clock: Callable[[Callable[[], Any]], float],
    say: Callable[[str], None] = lambda _: None,
    calls: int = 1,
) -> dict[Lane, list[float]]:
    """Seconds of every lane in every round: A B C, A B C, ...; the mean of ``calls`` in a row."""
    times: dict[Lane, list[float]] = {lane: [] for lane in lanes}
    gc.collect()
    gc.freeze()  # what is there by now need not be looked through in each round
    try:
        for number in range(-warm_up, rounds):
            say("warm-up" if number < 0 else f"round {number + 1} of {rounds}")
            gc.collect()  # rather now than inside somebody's time
            for lane in lanes:
                provider, dtype = lane
                seconds = clock(partial(in_a_row, partial(provider.run, dtype), calls))
                if number >= 0:
                    times[lane].append(seconds / calls)
    finally:
        gc.unfreeze()
    return times


def replays(
    lanes: list[Lane],
    calls: int,
    rounds: int,
    clock: Clock,
    say: Callable[[str], None] = lambda _: None,
) -> dict[Lane, list[float]]:
    """As ``interleave``, of ``calls`` in a row as one CUDA graph; without the lanes that can't be
    captured, of which stderr says why. On a CPU there are none."""
    if clock.device.type == "cpu":
        return {}
    graphs: dict[Lane, Lane] = {}
    for provider, dtype in lanes:
        say(f"{provider.name} {dtype}: capturing")
        try:
            replay = Replay(partial(in_a_row, partial(provider.run, dtype), calls))
        except RuntimeError as error:
            why = str(error).strip().partition("\n")[0]
            print(f"{provider.name} {dtype} is not captured: {why}", file=sys.stderr)
            continue
        graphs[provider, dtype] = replay, dtype
    times = interleave(list(graphs.values()), rounds, 1, clock, say)
    return {lane: [t / calls for t in times[graph]] for lane, graph in graphs.items()}


def repetitions(
    lanes: list[Lane],
    clock: Callable[[Callable[[], Any]], float],
    calls: int,
    given: dict[str, float],
) -> tuple[int, int]:
    """Rounds and warm-ups on a GPU, by the second run of each lane, within ``given`` seconds."""
    one = 0.0
    for lane in lanes:
        call = partial(in_a_row, partial(lane[0].run, lane[1]), calls)
        call()
        one += clock(call)
    rounds, warm_up = (int(seconds / one) for seconds in given.values())
    return (
        min(ROUNDS["cuda"], max(LEAST_ROUNDS, rounds)),
        min(WARM_UP["cuda"], max(LEAST_WARM_UP, warm_up)),
    )


def in_a_row(call: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        call()


def quantiles(values: list[float], at: tuple[float, ...]) -> list[float]:
    """By linear interpolation between the sorted values."""
    ranked = torch.tensor(values, dtype=torch.float64)
    return ranked.quantile(torch.tensor(at, dtype=torch.float64)).tolist()


def speedup(baseline: list[float] | None, mine: list[float]) -> float | None:
    """How many times faster than the baseline: the median of the rounds' ratios."""
    if baseline is None:
        return None
    ratios = [theirs / ours for theirs, ours in zip(baseline, mine, strict=True)]
    return round(quantiles(ratios, (0.5,))[0], 3)
