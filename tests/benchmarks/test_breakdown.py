"""What is said of a breakdown, of a GPU's too."""

import io

import pytest
from rich.console import Console

from tinybert_fast.benchmarks.breakdown import show

ADDMM = [{"name": "aten::addmm", "ms": 1.5, "calls": 2}]
GEMM = [{"name": "gemm", "ms": 1.5, "calls": 2}]
PRODUCTS = {"products_ms": 1.5, "products_gflop": 3.0}


@pytest.mark.parametrize(
    ("found", "says", "leaves_out"),
    [
        (
            {"operators": ADDMM, "kernels": GEMM, "busy_ms": 1.5, "wall_ms": 2.0},
            ["gemm", "waits for 25% of it", "3 GFLOP in 2 ms; 1 ms at"],
            "none was seen",
        ),
        (
            {"operators": [], "kernels": [], "busy_ms": 0.0, "wall_ms": 2.0},
            ["mlm_step: the profiler saw no kernels in a step of 2.00 ms; CUPTI"],
            "GFLOP",
        ),
        ({"operators": []}, ["operators by own time: none was seen"], "kernels"),
    ],
    ids=["kernels", "no kernels", "no operators"],
)
def test_what_was_not_seen_is_said(found, says, leaves_out):
    said = io.StringIO()
    show({**PRODUCTS, **found}, "mlm_step", 3000.0, Console(file=said, width=200))
    assert all(words in said.getvalue() for words in says)
    assert leaves_out not in said.getvalue()
