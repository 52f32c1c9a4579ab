"""Where the time of one run goes, operator by operator, and the floor its matrix products set."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tinybert_fast.benchmarks.memory import QUIET

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
SHOWN = 15  # operators of a printed table

Breakdown = dict[str, Any]


def breakdown(call: Callable[[], Any], device: torch.device) -> Breakdown:
    """{"operators": [{"name", "ms", "calls"}, ...], "products_ms", "products_gflop"} of one call.

    An operator's own time on ``device``, callees left out, largest first. On a CPU, recording takes
    time too: the sum is above a run that nobody watches. On a GPU the times are those of kernels:
    the sum leaves out the gaps between them. The products are those of MATRIX_PRODUCTS: fused
    attention is not among them.
    """
    os.environ.setdefault(*QUIET)
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, with_flops=True) as recorded:
        call()
        if cuda:
            torch.cuda.synchronize(device)
    # Kernels are counted in the operator that launched them.
    events = [e for e in recorded.key_averages() if e.device_type == DeviceType.CPU]
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    operators = [{"name": e.key, "ms": getattr(e, own) / 1e3, "calls": e.count} for e in events]
    products = [e for e in events if e.key in MATRIX_PRODUCTS]
    return {
        "operators": sorted((o for o in operators if o["ms"] > 0), key=lambda o: -o["ms"]),
        "products_ms": sum(getattr(e, own) for e in products) / 1e3,
        "products_gflop": sum(e.flops for e in products) / 1e9,
    }


def show(found: Breakdown, title: str, gflops: float, console: Any) -> None:
    """A table of the largest operators; beneath it the products, and the time they would take at
    ``gflops``, the rate of one large product."""
    from rich.table import Table

    operators = found["operators"]
    total = sum(o["ms"] for o in operators)
    table = Table(title=f"{title}: operators by own time", title_justify="left", title_style="bold")
    table.add_column("operator")
    for head in ("ms", "share", "calls"):
        table.add_column(head, justify="right")
    for o in operators[:SHOWN]:
        table.add_row(o["name"], f"{o['ms']:,.1f}", f"{o['ms'] / total:.1%}", f"{o['calls']:,}")
    rest = operators[SHOWN:]
    ms, calls = sum(o["ms"] for o in rest), sum(o["calls"] for o in rest)
    table.add_row(f"{len(rest)} others", f"{ms:,.1f}", f"{ms / total:.1%}", f"{calls:,}")
    table.add_row("total", f"{total:,.1f}", "", "")
    console.print(table)
    console.print(
        f"Matrix products: {found['products_gflop']:,.0f} GFLOP in {found['products_ms']:,.0f} ms; "
        f"{1e3 * found['products_gflop'] / gflops:,.0f} ms at the rate of one large product.",
        highlight=False,
    )
