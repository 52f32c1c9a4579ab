"""Tokens per second of the masked-LM and the distillation step against the batch B, the length N
and the share of positions that are real.

One of the three moves at a time, from a common middle; N at a fixed number of positions B N. The
careful baseline, which tries fewer settings than in the step suite so that many points fit into
minutes, and ours are compared; in the middle also what comes without care. On a GPU both are also
replayed as CUDA graphs, the baseline without a compiler, which would take longer than all the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from tinybert_fast.benchmarks.case import BASELINE, Case, Cases, Check, Setup
from tinybert_fast.benchmarks.cases import distill_step, mlm_step

COMPARED = ("careful", "careful graph", "ours", "ours graph")
BUCKETS = (1, 4)  # tried, where the batch has so many sequences; 1 without padding


class Point(NamedTuple):
    batch: int
    width: int
    fill: float


def grid(middle: Point, batches: tuple[int, ...], widths: tuple[int, ...]) -> list[Point]:
    """The middle comes first."""
    positions = middle.batch * middle.width
    points = [middle, *(middle._replace(batch=batch) for batch in batches)]
    points += [Point(positions // width, width, middle.fill) for width in widths]
    points += [middle._replace(fill=fill) for fill in FILLS]
    return list(dict.fromkeys(points))


FILLS = (1.0, 0.6, 0.3)
WIDTHS = (64, 128, 256, 512)
MLM_GRID = grid(Point(16, 128, 0.6), (8, 16, 32), WIDTHS)
DISTILL_GRID = grid(Point(8, 128, 0.6), (2, 8), (64, 128, 512))
GPU_GRID = grid(Point(256, 128, 0.6), (32, 64, 128, 256, 512, 1024), WIDTHS)
SMOKE_GRID = [Point(2, 16, 0.6), Point(4, 16, 0.6), Point(4, 8, 0.6), Point(2, 16, 1.0)]


def cases(
    setup: Setup, *, name: str, build: Callable[..., Iterator[Case]], points: list[Point]
) -> Iterator[Case]:
    for at, point in enumerate(SMOKE_GRID if setup.smoke else points):
        (case,) = build(setup, name=name, batch=point.batch, width=point.width, fill=point.fill)
        yield compared(case, as_it_comes=at == 0)


def compared(case: Case, as_it_comes: bool) -> Case:
    """The case with the providers that are compared, held to the first of them."""
    case.providers = [
        one
        for one in case.providers
        if one.name in COMPARED or (as_it_comes and one.role == BASELINE)
    ]
    names = [one.name for one in case.providers]
    checks = [
        Check(one.what, one.reference, tuple(name for name in one.others if name in names))
        for one in case.checks
        if one.reference in names
    ]
    case.checks = tuple(checks) or (Check(case.checks[0].what, names[0], tuple(names[1:])),)
    for provider in case.providers:
        step = getattr(provider, "step", provider)  # of a graph
        step.settings = few(step.settings)
    return case


def few(settings: tuple[Any, ...]) -> tuple[Any, ...]:
    """Those of BUCKETS, none compiled; ours has a single one, which says nothing."""
    plain = (one._replace(compiled=False) if hasattr(one, "compiled") else one for one in settings)
    kept = [one for one in plain if one == "" or getattr(one, "buckets", one) in BUCKETS]
    return tuple(dict.fromkeys(kept))


def _named(mlm: list[Point], distill: list[Point]) -> Cases:
    return {
        "mlm_step": partial(cases, name="mlm_step", build=mlm_step.cases, points=mlm),
        "distill_step": partial(
            cases, name="distill_step", build=distill_step.cases, points=distill
        ),
    }


CASES, GPU_CASES = _named(MLM_GRID, DISTILL_GRID), _named(GPU_GRID, GPU_GRID)
