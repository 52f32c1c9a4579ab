"""Uninitialised memory holds NaN in every test here, so that an unwritten output shows."""

import pytest
import torch

from tinybert_fast.ops import dispatch
from tinybert_fast.testing.proofs import implementations


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_generate_tests(metafunc):
    """``fast``: each fast implementation of the file's op; ``impl``: the reference too."""
    op = metafunc.module.__name__.rpartition("test_")[2]
    if op not in dispatch.OPS:
        return
    if "fast" in metafunc.fixturenames:
        metafunc.parametrize("fast", implementations(op))
    if "impl" in metafunc.fixturenames:
        metafunc.parametrize("impl", [*implementations(op), "reference"])
