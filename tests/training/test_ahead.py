"""Ahead: what is made while something else runs, one at a time; errors, and the thread's end."""

import threading
import time

import pytest

from tinybert_fast.training.ahead import Ahead


def threads() -> list[str]:
    return [one.name for one in threading.enumerate() if one.name.startswith("ahead")]


def where() -> str:
    return threading.current_thread().name


def test_made_on_the_thread_or_else_here():
    with Ahead() as ahead:
        assert ahead.take("a", where) == where()
        ahead.begin("a", where)
        assert ahead.take("a", lambda: "made twice") == "ahead_0"
        assert ahead.take("a", where) == where()  # nothing was begun
    assert not threads()


def test_what_was_begun_of_another_source_is_done_first():
    """It is lost, but never runs beside what is wanted."""
    running, done = threading.Event(), []

    def slow():
        running.set()
        time.sleep(0.05)
        done.append("slow")
        raise ValueError("nobody asks")

    with Ahead() as ahead:
        ahead.begin("a", slow)
        running.wait()
        assert ahead.take("b", lambda: list(done)) == ["slow"]


def test_an_error_is_raised_where_its_result_is_wanted():
    def fail():
        raise ValueError("a damaged shard")

    with Ahead() as ahead:
        ahead.begin("a", fail)
        with pytest.raises(ValueError, match="a damaged shard"):
            ahead.take("a", where)
        ahead.begin("a", where)
        assert ahead.take("a", where) == "ahead_0"


def test_the_thread_ends_after_an_interrupt():
    running = threading.Event()

    def interrupted():
        with Ahead() as ahead:
            ahead.begin("a", lambda: (running.set(), time.sleep(0.05)))
            running.wait()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not threads()
