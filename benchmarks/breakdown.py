"""Where the time of one run goes, operator by operator, and the floor its matrix products set; on a
GPU kernel by kernel too, beside the time in which it runs none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from tinybert_fast.benchmarks.case import CAREFUL, OURS, Case
from tinybert_fast.benchmarks.clocks import Clock
from tinybert_fast.benchmarks.memory import QUIET

MATRIX_PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
PROFILED = {"cpu": (OURS,), "cuda": (OURS, CAREFUL)}  # roles
SHOWN = 15  # operators of a printed table
LONGEST_NAME = 70  # characters; names of C++ kernels go on for lines

Breakdown = dict[str, Any]


def breakdowns(case: Case, dtypes: tuple[str, ...], device: torch.device) -> list[Breakdown]:
    """Of one run of each provider of a role that PROFILED names, in each dtype."""
    return [
        {
            "case": case.name,
            "width": case.width,
            "provider": provider.name,
            "dtype": dtype,
            **breakdown(partial(provider.run, dtype), device),
        }
        for dtype in case.dtypes or dtypes
        for provider in case.providers
        if provider.role in PROFILED[device.type]
    ]


def breakdown(call: Callable[[], Any], device: torch.device) -> Breakdown:
    """{"operators": [{"name", "ms", "calls"}, ...], "products_ms", "products_gflop"} of one call.

    An operator's own time on ``device``, callees left out, largest first. On a CPU, recording takes
    time too: the sum is above a run that nobody watches. On a GPU the times are those of kernels,
    and there are "kernels" like "operators", their sum "busy_ms", and "wall_ms" of a run that
    nobody watches: what it has beyond busy_ms are gaps, in which the GPU waits for launches. The
    products are those of MATRIX_PRODUCTS: fused attention is not among them, nor is the product
    that linear_gelu fuses with what follows it.
    """
    os.environ.setdefault(*QUIET)
    cuda = device.type == "cuda"
    wall = 1e3 * Clock(device).best(call) if cuda else None
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, with_flops=True) as recorded:
        call()
        if cuda:
            torch.cuda.synchronize(device)
    # Kernels are counted in the operator that launched them.
    averages = recorded.key_averages()
    events = [e for e in averages if e.device_type == DeviceType.CPU]
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    products = [e for e in events if e.key in MATRIX_PRODUCTS]
    found = {
        "operators": _largest_first(events, own),
        "products_ms": sum(getattr(e, own) for e in products) / 1e3,
        "products_gflop": sum(e.flops for e in products) / 1e9,
    }
    if cuda:
        kernels = _largest_first(filter(_is_kernel, averages), own)
        busy = sum(kernel["ms"] for kernel in kernels)
        found |= {"kernels": kernels, "busy_ms": busy, "wall_ms": wall}
    return found


def _is_kernel(event: Any) -> bool:
    """Or a copy or a fill; not a range that somebody marked, which covers kernels."""
    return event.device_type == DeviceType.CUDA and not event.is_user_annotation


def _largest_first(events: Iterable[Any], own: str) -> list[dict[str, Any]]:
    found = [{"name": e.key, "ms": getattr(e, own) / 1e3, "calls": e.count} for e in events]
    return sorted((o for o in found if o["ms"] > 0), key=lambda o: -o["ms"])


def show(found: Breakdown, title: str, gflops: float, console: Any) -> None:
    """A table of the largest operators; beneath it the products, and the time they would take at
    ``gflops``, the rate of one large product. On a GPU also of kernels; where the profiler saw none
    there is nothing to say but that."""
    if not found.get("kernels", True):
        console.print(
            f"{title}: the profiler saw no kernels in a step of {found['wall_ms']:,.2f} ms; CUPTI, "
            "which tells it of them, is missing or serves another profiler.",
            highlight=False,
        )
        return
    _show_largest(found["operators"], "operator", f"{title}: operators by own time", console)
    if "kernels" in found:
        _show_largest(found["kernels"], "kernel", f"{title}: kernels", console)
        console.print(
            f"Kernels take {found['busy_ms']:,.2f} ms of a step of {found['wall_ms']:,.2f} ms; the "
            f"GPU waits for {1 - found['busy_ms'] / found['wall_ms']:.0%} of it.",
            highlight=False,
        )
    console.print(
        f"Matrix products: {found['products_gflop']:,.0f} GFLOP in {found['products_ms']:,.0f} ms; "
        f"{1e3 * found['products_gflop'] / gflops:,.0f} ms at the rate of one large product.",
        highlight=False,
    )


def _show_largest(rows: list[dict[str, Any]], what: str, title: str, console: Any) -> None:
    from rich.table import Table

    if not rows:
        console.print(f"{title}: none was seen.", highlight=False)
        return
    total = sum(o["ms"] for o in rows)
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(what, max_width=LONGEST_NAME, no_wrap=True)
    for head in ("ms", "share", "calls"):
        table.add_column(head, justify="right")
    for o in rows[:SHOWN]:
        table.add_row(o["name"], f"{o['ms']:,.2f}", f"{o['ms'] / total:.1%}", f"{o['calls']:,}")
    rest = rows[SHOWN:]
    ms, calls = sum(o["ms"] for o in rest), sum(o["calls"] for o in rest)
    table.add_row(f"{len(rest)} others", f"{ms:,.2f}", f"{ms / total:.1%}", f"{calls:,}")
    table.add_row("total", f"{total:,.2f}", "", f"{sum(o['calls'] for o in rows):,}")
    console.print(table)
