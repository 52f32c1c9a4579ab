"""The one results table: what a row holds, and how it is written and shown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tinybert_fast.benchmarks.case import BASELINE, CAREFUL, OURS
from tinybert_fast.data.atomic import atomic_write

Row = dict[str, Any]
LONGEST = 3  # widths that a growth exponent is fitted to
# Speed of inference over BERT-base's that the TinyBERT paper reports (Jiao et al. 2020, table 1).
TEACHER, PUBLISHED = "12l_768", {"4l_312": 9.4, "6l_768": 2.0}

# Column -> what it says. A cell that does not apply, or was not measured, is empty (null in JSON).
COLUMNS = {
    "suite": "step, ops, memory, masking, inference or scaling",
    "case": "what is computed (benchmarks/cases)",
    "provider": "who computes it",
    "role": "a: as it comes; b: as a careful user writes it; ours; others by their own name",
    "pass": "forward, backward or both",
    "dtype": "fp32; bf16: autocast over fp32 weights in steps, the operands of ops, the weights of "
    "inference; int64",
    "batch": "sequences B",
    "width": "padded length N",
    "valid_tokens": "real positions of the batch",
    "valid_fraction": "valid_tokens / (B N)",
    "dropout": "probability while timed",
    "optimizer": "inside what is timed; none if it is not",
    "setting": "what the provider chose by timing itself before the rounds",
    "sweeps": "over the whole suite, each with tensors made anew",
    "rounds": "interleaved repetitions of all sweeps: one run of every provider and dtype each",
    "pulse_us": "CPU: what a computation that always takes the same time on free cores took before "
    "these runs, median; beside somebody else on the cores 1.6 to 2 times as long (clocks.py)",
    "median_ms": "over the rounds",
    "p20_ms": "over the rounds",
    "p80_ms": "over the rounds",
    "tokens_per_s": "real tokens / median",
    "speedup_a": "median over rounds of time(a) / time, same dtype",
    "speedup_b": "median over rounds of time(b) / time, same dtype",
    "speedup_a_fp32": "median over rounds of time(a in fp32) / time",
    "speedup_graph": "median over rounds of time(b as one CUDA graph) / time, same dtype",
    "graph_ms": "GPU: the same calls as one CUDA graph, which leaves out launches; median. Empty "
    "where they cannot be captured, and for attention's backward alone: the random state of "
    "PyTorch's fused forward is then on the host",
    "graph_speedup_a": "as speedup_a, of graph_ms",
    "graph_speedup_b": "as speedup_b, of graph_ms",
    "tflops": "needed operations / (graph_ms, or median_ms without it), 1e12/s",
    "gbytes_per_s": "needed bytes, likewise: each operand read once, each result written once",
    "bound_ms": "predicted least time: at matmul_gflops or at copy_gbytes, whichever takes longer",
    "of_bound": "bound_ms / (graph_ms, or median_ms without it)",
    "peak_mib": "largest memory alive during one run beyond what was alive before it; of a graph, "
    "of the step before it was captured",
    "growth": "exponent of peak_mib in N, or in B where N is fixed, over the three largest",
    "loss_error": "of the result: relative difference from the check's reference at dropout 0",
    "gradient_error": "the same, the largest of any gradient",
    "device": "where it ran",
    "cpu": "model",
    "cpu_instructions": "what PyTorch's kernels use",
    "cores": "usable by the process",
    "threads": "used",
    "allocator": "keeps: of host memory what was freed (tinybert_fast/allocator.py); system: "
    "as it comes",
    "gpu": "model",
    "driver": "version",
    "matmul_gflops": "of one large matrix product in the row's dtype, measured in the same run",
    "copy_gbytes": "GB/s read and written by one large copy, measured in the same run",
    "bf16_hardware": "no: bf16 is emulated here, its times say nothing about hardware that has it",
    "tinybert_fast": "version",
    "torch": "version",
    "cuda": "version",
    "cudnn": "version",
    "transformers": "version",
    "triton": "version",
    "python": "version",
    "platform": "system and machine",
    "commit": "of the checkout, + if its code is changed; none if installed",
    "date": "UTC, when the run began",
}

WORDS = ("commit", "date", "torch", "triton")  # even where they look like a number


def to_csv(rows: list[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(COLUMNS), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


class CsvFile:
    """A file that rows are appended to, header first in a new one.

    Raises:
        ValueError: the file is there and has other columns: rows must not shift them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        header = ",".join(COLUMNS)
        self._before = path.read_text(encoding="utf-8") if path.exists() else header + "\n"
        found = self._before.partition("\n")[0]
        if found != header:
            raise ValueError(
                f"{path} has other columns than the benchmark table ({found[:60]!r} ...); "
                "rows are appended, so name a new file"
            )
        self._before = self._before.removesuffix("\n") + "\n"

    def write(self, rows: list[Row]) -> None:
        """All rows of this run, behind those that were there before it."""
        atomic_write(self._path, self._before + to_csv(rows).partition("\n")[2])


def write_json(
    path: Path,
    suite: str,
    rows: list[Row],
    profiles: Sequence[dict[str, Any]] = (),
    tried: Sequence[Row] = (),
) -> None:
    """{"suite", "columns": {name: meaning}, "rows": [...]}, and if there are any "profiles" and the
    settings that were "tried"; whole or not at all."""
    found: dict[str, Any] = {"suite": suite, "columns": COLUMNS, "rows": rows}
    more = {"profiles": profiles, "tried": tried}
    found |= {name: value for name, value in more.items() if value}
    atomic_write(path, json.dumps(found, indent=1) + "\n")


def read(path: Path) -> list[Row]:
    """Rows of a .csv or .json file, numbers as numbers."""
    if path.suffix == ".json":
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        if not isinstance(rows, list):
            rows = [row for suite in rows.values() for row in suite]
        return [{**dict.fromkeys(COLUMNS), **row} for row in rows]  # a column may be newer than it
    with path.open(encoding="utf-8", newline="") as file:
        return [{k: _value(k, v) for k, v in row.items()} for row in csv.DictReader(file)]


def _value(column: str, cell: str) -> Any:
    if cell == "":
        return None
    if column in WORDS:
        return cell
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def runs(rows: Iterable[Row]) -> list[dict[str, list[Row]]]:
    """Of each case, dtype and number of threads its runs by date: those with all of its baselines,
    if there are any."""
    found: dict[tuple[Any, ...], dict[str, list[Row]]] = {}
    for row in rows:
        by_date = found.setdefault((*case_of(row), row["dtype"], row["threads"]), {})
        by_date.setdefault(row["date"], []).append(row)
    kept = []
    for by_date in found.values():
        roles = {date: {row["role"] for row in run} for date, run in by_date.items()}
        every = {BASELINE, CAREFUL, OURS} & set[str]().union(*roles.values())
        whole = {date: run for date, run in by_date.items() if roles[date] >= every}
        kept.append(whole or by_date)
    return kept


def newest(rows: Iterable[Row]) -> list[Row]:
    """The newest of each of ``runs``."""
    return [row for by_date in runs(rows) for row in by_date[max(by_date)]]


def case_of(row: Row) -> tuple[Any, ...]:
    return row["case"], row["batch"], row["width"], fill_of(row), row["pass"]


def fill_of(row: Row) -> float:
    """The share of real positions that was asked for, which drawn lengths have but for some."""
    return round(row["valid_fraction"], 1)


def digits(value: Any) -> Any:
    """Four significant digits, more would be noise; None as it is."""
    return None if value is None else float(f"{value:.4g}")


def growth_exponents(rows: list[Row]) -> None:
    """Fill ``growth`` where one provider was measured at several widths, or else batches: the slope
    of log peak against log N, or B, over the largest ones (below, scratch of a fixed size may be
    most of it). 1 is memory linear in the length, 2 its square."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((row["case"], row["provider"], row["dtype"]), []).append(row)
    for group in groups.values():
        axis = axis_of(group)
        points = {row[axis]: row["peak_mib"] for row in group if row["peak_mib"]}
        points = dict(sorted(points.items())[-LONGEST:])
        if len(points) > 1:
            exponent = slope([math.log(n) for n in points], [math.log(m) for m in points.values()])
            for row in group:
                row["growth"] = round(exponent, 3)


def axis_of(rows: Iterable[Row]) -> str:
    """What a case's peaks are measured against: "width", or "batch" where the width is fixed."""
    return "width" if len({row["width"] for row in rows}) > 1 else "batch"


def slope(x: list[float], y: list[float]) -> float:
    """Least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    over = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return over / sum((a - mean_x) ** 2 for a in x)


def show(rows: list[Row], console: Any) -> None:
    """A printed table per case, and beneath it where it was measured."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        whole = row["growth"] is not None or row["suite"] == "scaling"
        key = (row["case"],) if whole else (row["case"], row["width"], row["pass"])
        groups.setdefault(key, []).append(row)
    for group in groups.values():
        scales = _scaling if group[0]["suite"] == "scaling" else _speed
        console.print((_growth if group[0]["growth"] is not None else scales)(group))
    last = rows[-1]
    lines = [
        f"{last['cpu']} ({last['cpu_instructions']}), {last['cores']} cores, {last['threads']} "
        f"threads; GPU {last['gpu']}; torch {last['torch']}, transformers {last['transformers']}, "
        f"tinybert_fast {last['tinybert_fast']}, commit {last['commit']}; {last['date']}",
        f"{last['rounds']} interleaved rounds; x (a), x (b): times faster than baseline a, b "
        "(median of the rounds' ratios).",
    ]
    rates = {row["dtype"]: row["matmul_gflops"] for row in rows if row["matmul_gflops"]}
    if rates:
        each = ", ".join(f"{rate:,.0f} GFLOP/s in {dtype}" for dtype, rate in rates.items())
        lines.append(f"One large matrix product in this run: {each}.")
    errors = [
        (row["loss_error"], row["gradient_error"]) for row in rows if row["loss_error"] is not None
    ]
    if errors:
        loss, gradient = (max(column) for column in zip(*errors, strict=True))
        found = f"losses within {loss:.1e}, gradients within {gradient:.1e}"
        if last["suite"] == "inference":
            found = f"results within {loss:.1e}"
        lines.append(f"At dropout 0 the providers agree: {found} (relative).")
    if any(_emulated(row) for row in rows):
        lines.append(
            "* this processor has no bf16 instructions: bf16 is emulated, and these times say "
            "nothing about one that has them."
        )
    gains = over_teacher(rows)
    if gains:
        console.print(_gains(gains))
    for line in lines:
        console.print(line, highlight=False)


def over_teacher(rows: list[Row]) -> list[Row]:
    """How many times as fast as the teacher each student of the inference suite answers under the
    same provider, at the same batch, beside the published figure."""

    def lane(row: Row, case: str) -> tuple[Any, ...]:
        return case, row["provider"], row["dtype"], row["threads"]

    rows = [row for row in rows if row["suite"] == "inference"]
    medians = {lane(row, row["case"]): row["median_ms"] for row in rows}
    found = []
    for row in rows:
        for student, published in PUBLISHED.items():
            teacher = medians.get(lane(row, row["case"].replace(student, TEACHER)))
            if student in row["case"] and teacher is not None:
                same = ("case", "provider", "dtype", "threads", "batch", "valid_fraction")
                found.append(
                    {
                        "student": student,
                        "teacher": TEACHER,
                        **{name: row[name] for name in same},
                        "times": round(teacher / row["median_ms"], 3),
                        "published": published,
                    }
                )
    return found


def _gains(found: list[Row]) -> Any:
    """What ``over_teacher`` found, a column per batch."""
    table = _titled(f"Times as fast as {TEACHER} under the same provider")
    for head in ("student", "provider", "dtype"):
        table.add_column(head, no_wrap=True)
    batches = list(dict.fromkeys((one["batch"], one["valid_fraction"]) for one in found))
    for head in (*(f"B={batch}, {real:.0%} real" for batch, real in batches), "published"):
        table.add_column(head, justify="right", no_wrap=True)
    lines: dict[tuple, dict[tuple, str]] = {}
    for one in found:
        line = (one["student"], one["provider"], one["dtype"], one["published"])
        at = (one["batch"], one["valid_fraction"])
        lines.setdefault(line, {})[at] = f"{one['times']:.2f}"
    for (*who, published), times in sorted(lines.items()):
        table.add_row(*who, *(times.get(at, "") for at in batches), f"{published}")
    return table


def _scaling(rows: list[Row]) -> Any:
    """A line per point, tokens per second side by side."""
    table = _titled(f"{rows[0]['case']}: real tokens per second")
    whos = list(dict.fromkeys(_who(row) for row in rows))
    for head in ("B", "N", "real", *(" ".join(who) for who in whos), "ours x (b)"):
        table.add_column(head, justify="right", no_wrap=True)
    points: dict[tuple, dict[tuple, Row]] = {}
    for row in rows:
        point = (row["batch"], row["width"], row["valid_fraction"])
        points.setdefault(point, {})[_who(row)] = row
    for (batch, width, real), of in sorted(points.items()):
        gains = [_number(row["speedup_b"], ".2f") for row in of.values() if row["role"] == OURS]
        table.add_row(
            str(batch),
            str(width),
            f"{real:.0%}",
            *(_number(of[who]["tokens_per_s"], ",.0f") if who in of else "" for who in whos),
            ", ".join(gains),
        )
    return table


def _speed(rows: list[Row]) -> Any:
    first = rows[0]
    answers = first["suite"] == "inference"
    table = _titled(
        f"{first['case']}: B={first['batch']} N={first['width']}, "
        f"{first['valid_fraction']:.0%} real positions, dropout {first['dropout']}, "
        + ("no optimizer" if first["optimizer"] == "none" else f"{first['optimizer']} inside")
        + ("" if first["pass"] == "both" else f", {first['pass']} alone")
    )
    for head in ("provider", "dtype"):
        table.add_column(head, no_wrap=True)
    across = len({row["dtype"] for row in rows}) > 1
    ratios = ["speedup_a", "speedup_b", *(["speedup_a_fp32"] if across else [])]
    heads = ("x (a)", "x (b)", "x (a) fp32")
    graphs = any(row["graph_ms"] for row in rows)
    graph_heads = ("graph ms", "x (a)", "x (b)", "bound ms") if graphs else ()
    bounds = not graphs and any(row["gpu"] != "none" and row["bound_ms"] for row in rows)
    bound_heads = ("TFLOP/s", "bound ms") if bounds else ()
    more = (*heads[: len(ratios)], *graph_heads, *bound_heads)
    for head in ("ms", "p20 - p80", *more, f"{'sentences' if answers else 'tokens'}/s", "peak MiB"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("setting")
    for row in rows:
        per_second = 1e3 * row["batch"] / row["median_ms"] if answers else row["tokens_per_s"]
        table.add_row(
            *_who(row),
            _milliseconds(row["median_ms"]),
            f"{_milliseconds(row['p20_ms'])} - {_milliseconds(row['p80_ms'])}",
            *(_number(row[ratio], ".2f") for ratio in ratios),
            *(_graph(row) if graphs else ()),
            *((_number(row["tflops"], ".0f"), _number(row["bound_ms"], ".2f")) if bounds else ()),
            _number(per_second, ",.1f" if per_second < 100 else ",.0f"),
            _number(row["peak_mib"], ",.1f"),
            row["setting"],
        )
    return table


def _graph(row: Row) -> tuple[str, ...]:
    return (
        _number(row["graph_ms"], ".4f"),
        _number(row["graph_speedup_a"], ".2f"),
        _number(row["graph_speedup_b"], ".2f"),
        _number(row["bound_ms"], ".4f"),
    )


def _growth(rows: list[Row]) -> Any:
    """Peaks side by side, one column per N, or per B where N is fixed."""
    axis = axis_of(rows)
    letter, other = ("N", "batch") if axis == "width" else ("B", "width")
    fixed = {row[other] for row in rows}
    said = f", {'B' if other == 'batch' else 'N'}={fixed.pop()}" if len(fixed) == 1 else ""
    table = _titled(f"{rows[0]['case']}{said}: peak MiB, and time of the largest {letter}")
    for head in ("provider", "dtype"):
        table.add_column(head, no_wrap=True)
    sizes = sorted({row[axis] for row in rows})
    for head in (*(f"{letter}={n}" for n in sizes), f"peak ~ {letter}^", "ms", "x (a)"):
        table.add_column(head, justify="right", no_wrap=True)
    by_lane: dict[tuple, dict[int, Row]] = {}
    for row in rows:
        by_lane.setdefault(_who(row), {})[row[axis]] = row
    for who, at in by_lane.items():
        longest = at[sizes[-1]]
        table.add_row(
            *who,
            *(_number(at[n]["peak_mib"], ",.1f") for n in sizes),
            _number(longest["growth"], ".2f"),
            _number(longest["median_ms"], ",.1f"),
            _number(longest["speedup_a"], ".2f"),
        )
    return table


def _titled(title: str) -> Any:
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold")


def _who(row: Row) -> tuple[str, str]:
    role = "" if row["role"] == row["provider"] else f" ({row['role']})"
    return row["provider"] + role, row["dtype"] + ("*" if _emulated(row) else "")


def _emulated(row: Row) -> bool:
    return row["dtype"] == "bf16" and row["bf16_hardware"] == "no"


def _milliseconds(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
