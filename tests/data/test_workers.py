"""in_order: the same from any number of processes, few items in flight, errors as raised."""

import os
import signal

import pytest

from tinybert_fast.data.workers import AHEAD, in_order


class Adder:
    def __init__(self, term):
        self.term = term

    def __call__(self, number):
        if number < 0:
            raise OSError(28, "full")
        if number == 999:
            os.kill(os.getpid(), signal.SIGKILL)
        return number + self.term


@pytest.mark.parametrize("processes", [1, 2])
def test_order_and_flow(processes):
    taken = []
    items = (taken.append(i) or i for i in range(200))
    answers = in_order(Adder, (10,), items, processes)
    assert next(answers) == 10
    assert len(taken) <= AHEAD * processes + 1
    assert list(answers) == list(range(11, 210))


@pytest.mark.parametrize("processes", [1, 2])
def test_errors_come_through(processes):
    with pytest.raises(OSError, match="full") as caught:
        list(in_order(Adder, (0,), [1, -1, *range(50)], processes))
    assert caught.value.errno == 28


def test_a_killed_worker_is_an_error():
    with pytest.raises(ChildProcessError, match="a worker process was ended from outside"):
        list(in_order(Adder, (0,), [1, 999, 2], 2))
