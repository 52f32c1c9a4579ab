"""Seconds that a call takes.

A machine in a cloud shares its cores. For seconds or for minutes somebody on the other half of one
makes transcendental functions up to twice as slow and a matrix product hardly slower: a ratio of
calls with more and less of them is then another one, however many rounds it is of. So on a CPU a
call is timed when nobody is there, which a computation that always takes the same time, just before
and just after the call, tells (`QuietClock`); rows say how long that took.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

TUNING_RUNS, TUNING_SECONDS = 2, 0.2  # at least both, of each setting
PATIENCE = 1.0  # seconds of waiting and repeating, for each second of a call that counts
BESIDE = 1.4  # times the fastest pulse. On free cores 1.0 to 1.2, beside somebody 1.6 to 2
PULSE = 1 << 16  # numbers: two of the chunks that PyTorch's threads take, within a core's own cache
PULSE_RUNS = 3  # of which the fastest counts: an interrupt is no neighbour
FIRST_PULSES = 200  # a tenth of a second


class Clock:
    """Of the wall on a CPU, of the device on a GPU, by its events."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, call: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        torch.cuda.synchronize(self.device)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    def best(self, call: Callable[[], object]) -> float:
        """The fastest of a few runs, of many where they are short."""
        taken: list[float] = []
        while len(taken) < TUNING_RUNS or sum(taken) < TUNING_SECONDS:
            taken.append(self(call))
        return min(taken)

    def pulse(self) -> float | None:
        """Seconds of the pulses before the calls since it was asked last; None: it takes none."""
        return None


class QuietClock(Clock):
    """On a CPU: waits until nobody else is on the cores that PyTorch's threads use, and times a
    call again that somebody was beside. Both take PATIENCE times the seconds that count at most;
    beyond that the fastest run of a call counts. What a pulse says depends on the machine alone, so
    a fast call and a slow one are treated alike.

    Args:
        pulse: seconds of a computation that always takes the same time on free cores.
        free: what it took on these cores at other times, if that is known.
    """

    def __init__(
        self, pulse: Callable[[], float] | None = None, free: float = float("inf")
    ) -> None:
        super().__init__(torch.device("cpu"))
        self._beat = Pulse() if pulse is None else pulse
        self._free = min(free, *(self._beat() for _ in range(FIRST_PULSES)))
        self._spare = 0.0  # seconds
        self._pulses: list[float] = []

    def __call__(self, call: Callable[[], object]) -> float:
        taken: list[float] = []
        while True:
            before = self._wait()
            taken.append(super().__call__(call))
            if self._is_quiet(self._beat()):
                seconds = taken[-1]
                break
            if self._spare < taken[-1]:
                seconds = min(taken)
                break
            self._spare -= taken[-1]
        self._spare += PATIENCE * seconds
        self._pulses.append(before)
        return seconds

    def pulse(self) -> float | None:
        pulses, self._pulses = self._pulses, []
        return statistics.median(pulses) if pulses else None

    def _wait(self) -> float:
        """The last pulse."""
        start = time.perf_counter()
        while True:
            beat = self._beat()
            waited = time.perf_counter() - start
            if self._is_quiet(beat) or waited > self._spare:
                self._spare = max(0.0, self._spare - waited)
                return beat

    def _is_quiet(self, beat: float) -> bool:
        self._free = min(self._free, beat)
        return beat < BESIDE * self._free


class Pulse:
    """A fraction of a millisecond of arithmetic on all of PyTorch's threads, within the cores' own
    caches; as long as the slowest of them takes."""

    def __init__(self) -> None:
        self._x = torch.linspace(0.5, 5.0, PULSE)
        self._y = torch.empty_like(self._x)

    def __call__(self) -> float:
        taken = []
        for _ in range(PULSE_RUNS):
            start = time.perf_counter()
            torch.lgamma(self._x, out=self._y)
            taken.append(time.perf_counter() - start)
        return min(taken)
