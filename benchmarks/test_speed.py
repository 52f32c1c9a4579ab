"""CPU times of a few ops and of small steps, to compare with an earlier run's: pytest-benchmark.

    pytest benchmarks/test_speed.py --benchmark-autosave                      # before a change
    pytest benchmarks/test_speed.py --benchmark-compare --benchmark-compare-fail=median:25%

For changes of one's own on one machine: what a reader is told comes from `tinybert-fast bench`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from tinybert_fast.benchmarks.case import Case, Setup
from tinybert_fast.benchmarks.cases import distill_step, mlm_step
from tinybert_fast.benchmarks.suites import load_cases

SETUP = Setup(torch.device("cpu"))
ROUNDS = {"op": 15, "step": 5}
OPS = (
    "attention_d26",
    "attention_score_mse_d26",
    "dropout_add_layer_norm_d312",
    "hidden_mse_d312",
    "linear_cross_entropy_d312",
)
STEPS: dict[str, Callable[..., Any]] = {
    "mlm_step": partial(mlm_step.cases, batch=4, width=128),
    "distill_step": partial(distill_step.cases, batch=1, width=128),
}


def ours(cases: Any) -> Any:
    """Our provider of the first case that times forward and backward."""
    case: Case = next(one for one in cases if one.phase == "both")
    return next(one for one in case.providers if one.name == "ours")


def time_of(benchmark: Any, run: Callable[[str], Any], rounds: int) -> None:
    benchmark.pedantic(run, args=("fp32",), rounds=rounds, warmup_rounds=2)


@pytest.mark.parametrize("name", OPS)
def test_op(benchmark: Any, name: str) -> None:
    time_of(benchmark, ours(load_cases("ops")[name](SETUP)).run, ROUNDS["op"])


@pytest.mark.parametrize("name", STEPS)
def test_step(benchmark: Any, name: str) -> None:
    time_of(benchmark, ours(STEPS[name](SETUP, name=name)).run, ROUNDS["step"])
