"""How far apart the ratios of two runs of the same cases lie.

A ratio compares times of the same rounds, so a machine that is slower on one day moves it little.
How much it moves between two runs of one code is how well it is known.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from tinybert_fast.benchmarks.case import BASELINE, CAREFUL
from tinybert_fast.benchmarks.clocks import BESIDE
from tinybert_fast.benchmarks.table import Row, case_of, newest, read, runs

WITHIN = 0.10  # that two runs of a suite are to agree within
WORST = 5  # ratios of the printed table
RATIOS = {  # column -> its words, and whose time is divided
    "speedup_a": ("x (a)", BASELINE),
    "speedup_b": ("x (b)", CAREFUL),
    "graph_speedup_a": ("graph x (a)", BASELINE),
    "graph_speedup_b": ("graph x (b)", CAREFUL),
    "speedup_a_fp32": ("x (a) fp32", BASELINE),
}
# Where these differ, two runs are not of one code on one machine.
CONDITIONS = (
    "cpu", "cpu_instructions", "cores", "allocator", "gpu", "driver", "torch", "transformers",
    "triton", "tinybert_fast", "commit",
)  # fmt: skip


class Spread(NamedTuple):
    """One ratio, a column of RATIOS, of one provider in two runs."""

    ratio: str
    before: Row
    now: Row

    @property
    def values(self) -> tuple[float, float]:
        return self.before[self.ratio], self.now[self.ratio]

    @property
    def apart(self) -> float:
        """By how much the larger exceeds the smaller, as a share of it."""
        return max(self.values) / min(self.values) - 1

    @property
    def words(self) -> tuple[str, ...]:
        """Case, provider, dtype and ratio."""
        row = self.now
        phase = "" if row["pass"] == "both" else f" {row['pass']}"
        case = f"{row['case']} B={row['batch']} N={row['width']}{phase}"
        return case, row["provider"], row["dtype"], RATIOS[self.ratio][0]


def spreads(before: Iterable[Row], now: Iterable[Row]) -> list[Spread]:
    """Of each ratio that both have, the largest first."""
    earlier = {_who(row): row for row in before}
    pairs = [(earlier[_who(row)], row) for row in now if _who(row) in earlier]
    return _largest_first(
        Spread(ratio, *pair)
        for pair in pairs
        for ratio in RATIOS
        if all(_compares(row, ratio) for row in pair)
    )


def repeats(rows: Iterable[Row]) -> list[Spread]:
    """Those between the newest two runs of each case by one and the same commit."""
    found = []
    for by_date in runs(rows):
        dates: dict[str, list[str]] = {}
        for date in sorted(by_date):
            dates.setdefault(by_date[date][0]["commit"], []).append(date)
        twice = [of[-2:] for commit, of in dates.items() if len(of) > 1 and _is_one_code(commit)]
        if twice:
            before, now = max(twice, key=lambda pair: pair[1])
            found += spreads(by_date[before], by_date[now])
    return _largest_first(found)


def read_earlier(path: Path, suite: str) -> list[Row]:
    """The newest run of each case of a suite. ValueError: the file has none."""
    if not path.is_file():
        raise ValueError(
            f"--against {path}: no such file; expected rows of an earlier run, which --csv and "
            "--json write"
        )
    try:
        rows = read(path)
        there = ", ".join(dict.fromkeys(row["suite"] for row in rows)) or "no rows"
        found = newest(row for row in rows if row["suite"] == suite)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--against {path}: expected benchmark rows, .csv or .json") from error
    if not found:
        raise ValueError(f"--against {path}: expected rows of suite {suite!r}, found {there}")
    return found


def summary(found: list[Spread]) -> str:
    """``found``: the largest first, and at least one."""
    first = found[0]
    count = f"{len(found)} ratio{'s' * (len(found) > 1)}"
    which = ", ".join(first.words)
    median = statistics.median(one.apart for one in found)
    return f"{count}, largest difference {first.apart:.1%} ({which}), median {median:.1%}"


def show(found: list[Spread], console: Any) -> None:
    """The largest, what they come to, and in what the runs' conditions differ."""
    from rich.table import Table

    if not found:
        console.print("Two runs: they have no ratio in common.", highlight=False)
        return
    table = Table(title="Two runs, furthest apart", title_justify="left", title_style="bold")
    for head in ("case", "provider", "dtype", "ratio"):
        table.add_column(head, no_wrap=True)
    for head in ("before", "now", "apart"):
        table.add_column(head, justify="right", no_wrap=True)
    for one in found[:WORST]:
        table.add_row(*one.words, *(f"{value:.2f}" for value in one.values), f"{one.apart:.1%}")
    console.print(table)
    lines = [f"Two runs: {summary(found)}."]
    over = sum(one.apart > WITHIN for one in found)
    lines.append(
        f"{over} of them differ by more than {WITHIN:.0%}. Leave the machine alone while it "
        "measures, and take more --sweeps."
        if over
        else f"All agree within {WITHIN:.0%}."
    )
    if (state := _state(found)) is not None:
        lines.append(state)
    changed = dict.fromkeys(
        f"{name} {one.before[name]}, now {one.now[name]}"
        for name in CONDITIONS
        for one in found
        if one.before[name] != one.now[name]
    )
    if changed:
        lines.append(f"The runs are not of one code on one machine: {'; '.join(changed)}.")
    for line in lines:
        console.print(line, highlight=False)


def _state(found: list[Spread]) -> str | None:
    """Where the cores were not equally free: what is not the code's."""
    unlike = []
    for one in found:
        pulses = [row["pulse_us"] for row in (one.before, one.now)]
        if all(pulses) and max(pulses) > BESIDE * min(pulses):
            unlike.append(one)
    if not unlike:
        return None
    over = sum(one.apart > WITHIN for one in unlike)
    return (
        f"{len(unlike)} of the ratios, {over} of those above {WITHIN:.0%}, are of runs of which "
        f"one had free cores and the other had not (pulse_us differs by more than {BESIDE} times)."
    )


def _who(row: Row) -> tuple[Any, ...]:
    same = ("provider", "dtype", "threads", "dropout", "device")
    return *case_of(row), *(row[name] for name in same)


def _compares(row: Row, ratio: str) -> bool:
    """Whether it says something of its own. A baseline beside itself does not, nor (a) beside (b),
    which is (b) beside (a) upside down; and in fp32 that to (a) in fp32 is said already."""
    of = RATIOS[ratio][1]
    again = ratio == "speedup_a_fp32" and row["dtype"] == "fp32"
    return bool(row[ratio]) and row["role"] not in (BASELINE, of) and not again


def _is_one_code(commit: str | None) -> bool:
    return commit is not None and commit != "none" and not commit.endswith("+")


def _largest_first(found: Iterable[Spread]) -> list[Spread]:
    return sorted(found, key=lambda one: -one.apart)
