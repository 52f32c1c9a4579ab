"""benchmarks/test_speed.py runs, at sizes that mean nothing and without pytest-benchmark."""

import pytest
import torch

from tinybert_fast.benchmarks import test_speed as suite
from tinybert_fast.benchmarks.case import Setup


class Once:
    """In the place of the fixture."""

    def pedantic(self, run, args, rounds, warmup_rounds):
        assert rounds > 1
        run(*args)


@pytest.fixture(autouse=True)
def smoke(monkeypatch):
    monkeypatch.setattr(suite, "SETUP", Setup(torch.device("cpu"), smoke=True))


@pytest.mark.parametrize("name", suite.OPS)
def test_op(name):
    suite.test_op(Once(), name)


@pytest.mark.parametrize("name", suite.STEPS)
def test_step(name):
    suite.test_step(Once(), name)
