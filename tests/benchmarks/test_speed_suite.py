"""benchmarks/test_speed.py runs, at sizes that mean nothing and without pytest-benchmark. What it
times is run by the tests of the suites that it is from.
"""

import pytest
import torch

from tinybert_fast.benchmarks import test_speed as suite
from tinybert_fast.benchmarks.case import Setup
from tinybert_fast.benchmarks.suites import load_cases


class Once:
    """In the place of the fixture."""

    def pedantic(self, run, args, rounds, warmup_rounds):
        assert rounds > 1
        run(*args)


@pytest.fixture(autouse=True)
def smoke(monkeypatch):
    monkeypatch.setattr(suite, "SETUP", Setup(torch.device("cpu"), smoke=True))


def test_op():
    assert load_cases("ops").keys() >= set(suite.OPS)
    suite.test_op(Once(), suite.OPS[-1])


def test_step():
    suite.test_step(Once(), "mlm_step")
