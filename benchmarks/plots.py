"""Rows of the results table as figures, each with its hardware and date: `bench --plots DIR`, or

    python benchmarks/plots.py ROWS.csv ... DIR [--machine NAME]

which draws of several runs of a case the newest.

bars.png        every case, pass and dtype: each provider's speed beside that of (a); where there is
                none, of (b) or else the first
memory.png      peak memory against the length, or the batch
roofline.png    rate against arithmetic intensity, under the ceilings measured in the same run;
                of ops without products, bytes per second beside those of a large copy
scaling.png     tokens per second of steps against batch, length and the share of real positions

A provider has one colour everywhere, which a CUDA graph of it shares (hatched bars, hollow
markers); a dtype has one style of lines. A figure for which there are no rows is not drawn.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Iterable
from operator import itemgetter
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from tinybert_fast.benchmarks.case import BASELINE, CAREFUL, OURS, REFERENCE
from tinybert_fast.benchmarks.table import Row, axis_of, fill_of, newest, read

DPI = 100
BAR_INCHES = 0.22
KEY_INCHES = 0.12  # of a line of the roofline's key
KEY_COLUMNS = 6  # of the bars' key
MEANING = {BASELINE: "as it comes (a)", CAREFUL: "careful PyTorch (b)", OURS: "tinybert_fast"}
COLOURS = {BASELINE: "tab:gray", CAREFUL: "tab:orange", OURS: "tab:blue"}
# Of providers by name, before that of their role. Blue is ours alone.
SHADES = {
    "ours cached": "#6baed6",
    "ours fp8": "#08519c",
    "ours bf16": "#6baed6",
    "ours weighted": "#6baed6",
    REFERENCE: "#c6dbef",
    "careful compile": "#fdae6b",
    "flash": "tab:green",
    "efficient": "tab:olive",
    "cudnn": "tab:pink",
    "flash varlen": "tab:brown",
    "flex": "gold",
    "xformers": "tab:red",
    "liger": "#006d2c",
    "cce": "#a50f15",
    "textbrewer": "#7a0177",
}
OTHER = "black"
MARKERS = {BASELINE: "x", CAREFUL: "s", OURS: "o"}
GRAPH = " graph"  # ends the name of a provider that is a CUDA graph of another one
ROLES = {"careful": CAREFUL, "ours": OURS}  # of which graphs are made
HATCH = "////"
LINES = {"bf16": "-", "fp32": "--"}
MEMORY, SCALING = "memory", "scaling"  # suites


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


def is_graph(row: Row) -> bool:
    return str(row["provider"]).endswith(GRAPH)


def who_of(row: Row) -> tuple[str, str]:
    """Name and role, of a graph those of what was captured."""
    name = str(row["provider"]).removesuffix(GRAPH)
    return name, ROLES.get(name, row["role"])


def colour_of(row: Row) -> str:
    name, role = who_of(row)
    return SHADES.get(name) or COLOURS.get(role, OTHER)


def label_of(row: Row) -> str:
    """What a legend calls it: by its role, but those that have a shade of their own by name."""
    name, role = who_of(row)
    label = name if name in SHADES else MEANING.get(role, "others")
    return f"{label}, as a CUDA graph" if is_graph(row) else label


def bar_of(row: Row) -> dict[str, Any]:
    """Of a bar and its key."""
    return {"facecolor": colour_of(row), "hatch": HATCH if is_graph(row) else ""}


def line_of(row: Row) -> dict[str, Any]:
    """Of a line with markers."""
    colour = colour_of(row)
    return {
        "color": colour,
        "linestyle": LINES.get(row["dtype"], ":"),
        "marker": MARKERS.get(who_of(row)[1], "."),
        "markerfacecolor": "white" if is_graph(row) else colour,
    }


def base_of(group: list[Row]) -> Row:
    """Whom the others of a case are beside: (a), else (b), else the first."""
    by_role = {row["role"]: row for row in reversed(group)}
    return by_role.get(BASELINE) or by_role.get(CAREFUL) or group[0]


def bars(rows: list[Row]) -> Figure | None:
    """Speed over the base's, as CUDA graphs where a case has them for all; the time behind each."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["suite"] not in (MEMORY, SCALING):
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
    for place, (_, height, words, row) in enumerate(shown):
        axes.barh(place, height, **bar_of(row), edgecolor="white", linewidth=0)
        axes.text(height, place, f" {words}", va="center", fontsize="x-small")
    axes.set_yticks(places, [s[0] for s in shown], fontsize="x-small")
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.6)
    axes.margins(x=0.2, y=0.01)
    axes.set_xlabel(
        "times as fast as (a), or as whom the label names; median of the rounds' ratios"
    )
    kinds = {label_of(row): bar_of(row) for *_, row in shown}
    figure.legend(
        handles=[Patch(label=label, edgecolor="white", **kind) for label, kind in kinds.items()],
        loc="outside lower center",
        ncols=min(len(kinds), KEY_COLUMNS),
        fontsize="small",
    )
    return _titled(figure, "Speed beside what one would use otherwise", rows)


def memory(rows: list[Row]) -> Figure | None:
    """Peak memory against N, or B where N is fixed, a panel for each case."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if row["suite"] == MEMORY and row["peak_mib"]:
            cases.setdefault(row["case"], []).append(row)
    if not cases:
        return None
    figure = Figure(figsize=(6 * len(cases), 4.6), layout="constrained")
    for at, (case, of_case) in enumerate(cases.items(), 1):
        axes = figure.add_subplot(1, len(cases), at)
        axis = axis_of(of_case)
        _lines(axes, of_case, itemgetter(axis), "peak_mib")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(case)
        axes.set_xlabel("length N (tokens)" if axis == "width" else "batch B (sequences)")
        axes.set_ylabel("peak memory of one run (MiB)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return _titled(figure, "Peak memory", rows)


def roofline(rows: list[Row]) -> Figure | None:
    """Of rows that have a rate those with operations under roofs, those without beside a copy."""
    rated = [r for r in rows if r["gbytes_per_s"] and r["matmul_gflops"] and r["suite"] != SCALING]
    points, moves = [r for r in rated if r["tflops"]], [r for r in rated if r["tflops"] == 0]
    if not points and not moves:
        return None
    heights = []  # inches
    if points:
        heights.append(max(6.4, 1.6 + KEY_INCHES * len(set(map(_place_of, points)))))
    if moves:
        heights.append(1.2 + BAR_INCHES * len(moves))
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    panels = figure.add_gridspec(len(heights), 2, width_ratios=(3, 1), height_ratios=heights)
    if points:
        _roofs(figure.add_subplot(panels[0, 0]), figure.add_subplot(panels[0, 1]), points)
    if moves:
        _bandwidth(figure.add_subplot(panels[-1, :]), moves)
    return _titled(figure, "Roofline", [*points, *moves])


def _place_of(row: Row) -> str:
    phase = "" if row["pass"] == "both" else f" {row['pass']}"
    return f"{row['case']} B={row['batch']} N={row['width']}{phase} {row['dtype']}"


def _roofs(axes: Any, key: Any, points: list[Row]) -> None:
    """A point per row; a roof per dtype, of the run's own product and copy. Cases are numbered:
    names would lie over each other."""

    def at(row: Row) -> tuple[float, float]:
        return 1e3 * row["tflops"] / row["gbytes_per_s"], row["tflops"]  # FLOP per byte, rate

    cases: dict[str, list[tuple[float, float]]] = {}
    for row in points:
        cases.setdefault(_place_of(row), []).append(at(row))
    for label in dict.fromkeys(map(label_of, points)):
        of_kind = [row for row in points if label_of(row) == label]
        style = {**line_of(of_kind[0]), "linestyle": "none"}
        axes.plot(*zip(*map(at, of_kind)), **style, label=label)
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
            color="black", linestyle=LINES.get(dtype, ":"),
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


def _bandwidth(axes: Any, moves: list[Row]) -> None:
    """A bar per row, cases together; across it, what a copy reached in the same run."""
    cases: dict[str, list[Row]] = {}
    for row in moves:
        cases.setdefault(_place_of(row), []).append(row)
    names: list[str] = []
    for case, of_case in cases.items():
        for row in of_case:
            place, rate, copied = len(names), row["gbytes_per_s"], row["copy_gbytes"]
            names.append(f"{case}: {row['provider']}" if row is of_case[0] else row["provider"])
            axes.barh(place, rate, **bar_of(row), edgecolor="white", linewidth=0)
            axes.vlines(copied, place - 0.5, place + 0.5, color="black", linewidth=1)
            words = f" {rate:,.0f} GB/s, {rate / copied:.0%} of a copy"
            axes.text(max(rate, copied), place, words, va="center", fontsize="x-small")
    axes.set_yticks(range(len(names)), names, fontsize="x-small")
    axes.invert_yaxis()
    axes.margins(x=0.25, y=0.01)
    axes.set_xlabel("rate of needed bytes (GB/s) of ops without products; black: one large copy")


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
            shown = [row for row in of_step if fixed(row) == middle]
            _lines(axes, shown, x, "tokens_per_s")
            if x is not fill_of:
                places = sorted({x(row) for row in shown})
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


def _lines(axes: Any, rows: list[Row], x: Callable[[Row], Any], column: str) -> None:
    """``column`` against ``x``, a line for each provider and dtype."""
    lanes: dict[tuple[str, str], dict[Any, Row]] = {}
    for row in rows:
        lanes.setdefault((row["provider"], row["dtype"]), {})[x(row)] = row
    for (provider, dtype), lane in lanes.items():
        places = sorted(lane)
        style = line_of(lane[places[0]])
        axes.plot(places, [lane[at][column] for at in places], label=f"{provider} {dtype}", **style)


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
