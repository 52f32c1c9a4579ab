"""Rows of the results table as figures, each with its hardware and date: `bench --plots DIR`, or

    python -P benchmarks/plots.py ROWS.csv ... DIR [--machine NAME]

which draws of several runs of a case the newest.

bars.png        every case, pass and dtype: each provider's speed beside that of (a); where there is
                none, of (b) or else the first
memory.png      peak memory against the length
roofline.png    rate against arithmetic intensity, under the ceilings measured in the same run
scaling.png     tokens per second of steps against batch, length and the share of real positions

A figure for which there are no rows is not drawn.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tinybert_fast.benchmarks.case import BASELINE, CAREFUL, OURS
from tinybert_fast.benchmarks.table import Row, fill_of, newest, read

DPI = 100
BAR_INCHES = 0.22
KEY_INCHES = 0.12  # of a line of the roofline's key
MEANING = {BASELINE: "as it comes (a)", CAREFUL: "careful PyTorch (b)", OURS: "tinybert_fast"}
COLOURS = {BASELINE: "tab:gray", CAREFUL: "tab:orange", OURS: "tab:blue"}
# Of providers by name, before that of their role: ours in blue, shades of careful in orange.
SHADES = {
    "ours graph": "#08306b",
    "ours cached": "#6baed6",
    "ours weighted": "#6baed6",
    "careful graph": "#8c3b00",
    "careful compile": "#fdae6b",
}
OTHER = "tab:green"
MARKERS = {BASELINE: "x", CAREFUL: "s", OURS: "o", "ours graph": "D", "careful graph": "d"}
BY_LENGTH, SCALING = "memory", "scaling"  # suites


def draw(rows: Iterable[Row], folder: Path, machine: str = "") -> list[Path]:
    """Writes the figures that the rows have numbers for; returns their files, whose names end in
    ``-machine``."""
    rows = list(rows)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, figure_of in FIGURES.items():
        figure = figure_of(rows)
        if figure is not None:
            made.append(folder / f"{name}{'-' * bool(machine)}{machine}.png")
            FigureCanvasAgg(figure)  # off screen, whatever backend the process has chosen
            with made[-1].open("wb") as file:
                figure.savefig(file, format="png", dpi=DPI)
    return made


def hardware(rows: list[Row]) -> str:
    """What measured them, with what, of which commit and when."""

    def each(*names: str) -> str:
        return ", ".join(dict.fromkeys(str(row[name]) for row in rows for name in names))

    machine = dict.fromkeys(row["cpu"] if row["gpu"] == "none" else row["gpu"] for row in rows)
    days = dict.fromkeys(str(row["date"])[:10] for row in rows)
    return (
        f"{', '.join(map(str, machine))}; torch {each('torch')}, triton {each('triton')}; commit "
        f"{each('commit')}; {', '.join(days)}"
    )


def colour_of(row: Row) -> str:
    return SHADES.get(row["provider"]) or COLOURS.get(row["role"], OTHER)


def label_of(row: Row) -> str:
    """What a legend calls it: by its role, but those that have a shade of their own by name."""
    return row["provider"] if row["provider"] in SHADES else MEANING.get(row["role"], "others")


def base_of(group: list[Row]) -> Row:
    """Whom the others of a case are beside: (a), else (b), else the first."""
    by_role = {row["role"]: row for row in reversed(group)}
    return by_role.get(BASELINE) or by_role.get(CAREFUL) or group[0]


def bars(rows: list[Row]) -> Figure | None:
    """Speed over the base's, as CUDA graphs where a case has them for all; the time behind each."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["suite"] not in (BY_LENGTH, SCALING):
            key = (row["suite"], row["case"], row["batch"], row["width"], row["pass"], row["dtype"])
            groups.setdefault(key, []).append(row)
    shown: list[tuple[str, float, str, Row]] = []  # label, height, words
    for (_, case, batch, width, phase, dtype), group in groups.items():
        graphs = all(row["graph_ms"] for row in group)
        time, gain = ("graph_ms", "graph_speedup_") if graphs else ("median_ms", "speedup_")
        base = base_of(group)
        which = "" if phase == "both" else f" {phase}"
        beside = "" if base["role"] == BASELINE else f", against {base['provider']}"
        for at, row in enumerate(group):
            title = f"{case} B={batch} N={width}{which} {dtype}{beside}: " if at == 0 else ""
            ratio = row.get(gain + str(base["role"])) or base[time] / row[time]
            words = f"{ratio:.2f}x, {row[time]:.3g} ms{' (graph)' if graphs else ''}"
            shown.append((title + row["provider"], ratio, words, row))
    if not shown:
        return None
    figure = Figure(figsize=(12, 1.6 + BAR_INCHES * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(shown))
    axes.barh(places, [s[1] for s in shown], color=[colour_of(s[3]) for s in shown])
    for place, (_, height, words, _) in enumerate(shown):
        axes.text(height, place, f" {words}", va="center", fontsize="x-small")
    axes.set_yticks(places, [s[0] for s in shown], fontsize="x-small")
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.6)
    axes.margins(x=0.2, y=0.01)
    axes.set_xlabel(
        "times as fast as (a), or as whom the label names; median of the rounds' ratios"
    )
    colours = {label_of(row): colour_of(row) for *_, row in shown}
    figure.legend(
        handles=[Patch(color=colour, label=label) for label, colour in colours.items()],
        loc="outside lower center",
        ncols=len(colours),
        fontsize="small",
    )
    return _titled(figure, "Speed beside what one would use otherwise", rows)


def memory(rows: list[Row]) -> Figure | None:
    """Peak memory against N, a panel for each case."""
    lines: dict[str, dict[tuple[str, str, str], dict[int, float]]] = {}
    for row in rows:
        if row["suite"] == BY_LENGTH and row["peak_mib"]:
            who = (row["provider"], row["dtype"], row["role"])
            lines.setdefault(row["case"], {}).setdefault(who, {})[row["width"]] = row["peak_mib"]
    if not lines:
        return None
    figure = Figure(figsize=(6 * len(lines), 4.6), layout="constrained")
    for at, (case, providers) in enumerate(lines.items(), 1):
        axes = figure.add_subplot(1, len(lines), at)
        for (provider, dtype, role), peaks in providers.items():
            lengths = sorted(peaks)
            axes.plot(
                lengths, [peaks[n] for n in lengths], label=f"{provider} {dtype}",
                color=COLOURS.get(role, OTHER), marker=MARKERS.get(role, "."),
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(case)
        axes.set_xlabel("length N (tokens)")
        axes.set_ylabel("peak memory of one run (MiB)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return _titled(figure, "Peak memory against the length", rows)


def roofline(rows: list[Row]) -> Figure | None:
    """A point per row that has a rate; a roof per dtype, of the run's own product and copy. Cases
    are numbered: names would lie over each other."""
    rated = [r for r in rows if r["tflops"] and r["gbytes_per_s"] and r["matmul_gflops"]]
    points = [r for r in rated if r["suite"] != SCALING]  # dozens of one step
    if not points:
        return None
    cases: dict[str, list[tuple[float, float]]] = {}  # intensity (FLOP per byte), rate
    for row in points:
        phase = "" if row["pass"] == "both" else f" {row['pass']}"
        name = f"{row['case']} B={row['batch']} N={row['width']}{phase} {row['dtype']}"
        at = 1e3 * row["tflops"] / row["gbytes_per_s"], row["tflops"]
        cases.setdefault(name, []).append(at)
    figure = Figure(figsize=(12, max(6.4, 1.6 + KEY_INCHES * len(cases))), layout="constrained")
    axes, key = figure.subplots(1, 2, width_ratios=(3, 1))
    for label in dict.fromkeys(map(label_of, points)):
        of_kind = [row for row in points if label_of(row) == label]
        axes.plot(
            [1e3 * row["tflops"] / row["gbytes_per_s"] for row in of_kind],
            [row["tflops"] for row in of_kind],
            linestyle="none", color=colour_of(of_kind[0]),
            marker=MARKERS.get(of_kind[0]["role"], "."), label=label,
        )  # fmt: skip
    for number, of_case in enumerate(cases.values(), 1):
        highest = max(of_case, key=lambda at: at[1])
        axes.annotate(
            str(number), highest, (0, 5), textcoords="offset points", ha="center", fontsize=7
        )
    intensities = [x for of_case in cases.values() for x, _ in of_case]
    for dtype in dict.fromkeys(r["dtype"] for r in points):
        first = next(r for r in points if r["dtype"] == dtype)
        peak, slope = first["matmul_gflops"] / 1e3, first["copy_gbytes"] / 1e3
        ends = min(*intensities, peak / slope), max(*intensities, 4 * peak / slope)
        axes.plot(
            [ends[0], peak / slope, ends[1]], [ends[0] * slope, peak, peak], linewidth=1,
            color="black", linestyle="-" if dtype == "bf16" else "--",
            label=f"{dtype}: {peak:,.3g} TFLOP/s, {1e3 * slope:,.0f} GB/s, measured",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("needed operations per needed byte (FLOP/byte)")
    axes.set_ylabel("rate of needed operations (TFLOP/s)")
    axes.grid(alpha=0.3, which="both")
    key.axis("off")
    key.legend(*axes.get_legend_handles_labels(), fontsize="small", loc="upper left")
    key.text(
        0, 0, "\n".join(f"{n}  {name}" for n, name in enumerate(cases, 1)),
        transform=key.transAxes, fontsize=6.5, va="bottom",
    )  # fmt: skip
    return _titled(figure, "Roofline", points)


def scaling(rows: list[Row]) -> Figure | None:
    """Tokens per second, a line of panels for each step: what a panel does not vary is as in the
    middle of the grid, where most of the points are; N varies at the positions B N of the middle.
    """
    steps: dict[str, list[Row]] = {}
    for row in rows:
        if row["suite"] == SCALING:
            steps.setdefault(row["case"], []).append(row)
    if not steps:
        return None
    figure = Figure(figsize=(15, 4.2 * len(steps) + 0.6), layout="constrained")
    for line, (case, of_step) in enumerate(steps.items()):
        batch, width, real = (_commonest(of_step, value) for value in (_batch, _width, fill_of))
        panels: tuple[tuple[str, Callable[[Row], Any], Callable[[Row], Any], tuple], ...] = (
            (f"batch B (N={width}, {real:.0%} real)", _batch, lambda r: (_width(r), fill_of(r)),
             (width, real)),
            (f"length N (B N={batch * width:,}, {real:.0%} real)", _width,
             lambda r: (_batch(r) * _width(r), fill_of(r)), (batch * width, real)),
            (f"share of positions that are real (B={batch}, N={width})", fill_of,
             lambda r: (_batch(r), _width(r)), (batch, width)),
        )  # fmt: skip
        for at, (label, x, fixed, middle) in enumerate(panels, 1):
            axes = figure.add_subplot(len(steps), len(panels), line * len(panels) + at)
            lanes: dict[tuple[str, str, str], dict[Any, float]] = {}
            for row in of_step:
                if fixed(row) == middle:
                    who = (row["provider"], row["dtype"], row["role"])
                    lanes.setdefault(who, {})[x(row)] = row["tokens_per_s"]
            for (provider, dtype, role), rates in lanes.items():
                places = sorted(rates)
                axes.plot(
                    places, [rates[place] for place in places], label=f"{provider} {dtype}",
                    color=COLOURS.get(role), marker=MARKERS.get(role, "."),
                )  # fmt: skip
            if x is not fill_of:
                places = sorted({place for rates in lanes.values() for place in rates})
                axes.set_xscale("log", base=2)
                axes.set_xticks(places, [str(place) for place in places])
                axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.set_title(case, fontsize="medium")
            axes.set_xlabel(label)
            axes.set_ylabel("real tokens per second")
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
    return _titled(
        figure,
        "Steps against batch, length and padding",
        [row for of in steps.values() for row in of],
    )


def _batch(row: Row) -> int:
    return int(row["batch"])


def _width(row: Row) -> int:
    return int(row["width"])


def _commonest(rows: list[Row], value: Callable[[Row], Any]) -> Any:
    return Counter(value(row) for row in rows).most_common(1)[0][0]


FIGURES = {"bars": bars, "memory": memory, "roofline": roofline, "scaling": scaling}


def _titled(figure: Figure, title: str, rows: list[Row]) -> Figure:
    figure.suptitle(f"{title}\n{hardware(rows)}", fontsize="medium")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("rows", type=Path, nargs="+", help=".csv or .json")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--machine", default="", help="end of the files' names")
    given = parser.parse_args()
    rows = [row for path in given.rows for row in newest(read(path))]
    for file in draw(rows, given.folder, given.machine):
        print(file)


if __name__ == "__main__":
    main()
