"""A call on a CPU counts when nobody else was on its cores."""

import pytest
import torch

from tinybert_fast.benchmarks import clocks
from tinybert_fast.benchmarks.clocks import BESIDE, FIRST_PULSES, PATIENCE, QuietClock

FREE, SHARED = 1.0, BESIDE + 0.1


@pytest.fixture
def now(monkeypatch):
    """The wall's clock, which calls and pulses put forward."""
    time = [0.0]
    monkeypatch.setattr(clocks.time, "perf_counter", lambda: time[0])
    return time


def quiet_clock(now, *states, free=float("inf"), first=FREE):
    """Pulses that take so long after the first ones, a millisecond of the wall each; the last one
    for ever."""
    pulses = iter([first] * FIRST_PULSES + [*states])

    def pulse():
        now[0] += 1e-3
        return next(pulses, states[-1])

    return QuietClock(pulse, free)


def call_of(now, *seconds):
    taken = iter(seconds)

    def call():
        now[0] += next(taken)

    return call


def test_a_quiet_call_is_timed_once(now):
    clock = quiet_clock(now, FREE)
    assert clock(call_of(now, 3.0)) == pytest.approx(3.0)
    assert clock.pulse() == FREE


def test_a_call_that_somebody_was_beside_is_timed_again(now):
    """Before and after: free, free; free, shared; free, free."""
    clock = quiet_clock(now, FREE, FREE, FREE, SHARED, FREE)
    clock(call_of(now, 5.0))
    assert clock(call_of(now, 4.0, 3.5)) == pytest.approx(3.5)


def test_free_cores_are_waited_for(now):
    clock = quiet_clock(now, FREE, FREE, *[SHARED] * 1000, FREE)
    clock(call_of(now, 3.0))
    before = now[0]
    assert clock(call_of(now, 2.0)) == pytest.approx(2.0)
    assert now[0] - before == pytest.approx(1.0 + 2.0, abs=5e-3)


def test_patience_ends(now):
    """The first call has none, the next one as much as the first one took."""
    clock = quiet_clock(now, SHARED)
    assert clock(call_of(now, 3.0)) == pytest.approx(3.0)
    before = now[0]
    assert clock(call_of(now, 5.0)) == pytest.approx(5.0)
    assert now[0] - before == pytest.approx(PATIENCE * 3.0 + 5.0, abs=5e-3)
    assert clock.pulse() == SHARED


def test_the_fastest_run_counts_if_somebody_was_beside_each(now):
    clock = quiet_clock(now, FREE, FREE, FREE, SHARED, FREE, SHARED, FREE, SHARED)
    clock(call_of(now, 7.0))
    assert clock(call_of(now, 3.5, 3.0, 3.2)) == pytest.approx(3.0)  # 3.5 + 3.0 of 7 are spent


def test_another_time_may_know_free_cores_better(now):
    """A run that somebody is beside from its start to its end does not take that for free."""
    kept = quiet_clock(now, FREE, first=FREE)
    told = quiet_clock(now, FREE, first=FREE, free=FREE / SHARED)
    for clock in (kept, told):
        clock(call_of(now, 3.0))
    before = now[0]
    kept(call_of(now, 1.0))
    told(call_of(now, 1.0))
    assert now[0] - before == pytest.approx(1.0 + 3.0 + 1.0, abs=1e-2)


def test_the_pulse_is_the_median_since_it_was_asked_last(now):
    clock = quiet_clock(now, 1.0, 1.0, 1.1, 1.0, 1.3, 1.0)
    for _ in range(3):
        clock(call_of(now, 1.0))
    assert clock.pulse() == 1.1
    assert clock.pulse() is None
    assert clocks.Clock(torch.device("cpu")).pulse() is None


def test_a_pulse_takes_two_threads():
    """Chunks of 32,768 numbers, which PyTorch's parallel loops are cut into."""
    assert clocks.PULSE == 2 * 32768
    pulse = clocks.Pulse()
    assert 0 < pulse() < 1
    torch.testing.assert_close(pulse._y, torch.lgamma(pulse._x))
