"""Runs a suite: its cases one after the other (measuring.py), then the printed table and the files.

Where tensors happen to lie, and what else the machine does for a minute, move a ratio more than its
rounds show: several sweeps over all cases, each of which makes its tensors anew, average over both.
If asked for, one more run of ours in each case goes through the time profiler, which shows where
its time goes (breakdown.py), and on a GPU one of the careful baseline too.
"""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from tinybert_fast.benchmarks.agreement import read_earlier, spreads
from tinybert_fast.benchmarks.agreement import show as show_spreads
from tinybert_fast.benchmarks.breakdown import Breakdown, breakdowns
from tinybert_fast.benchmarks.breakdown import show as show_breakdown
from tinybert_fast.benchmarks.case import (
    DTYPES,
    PASSES,
    REFERENCE,
    Case,
    Cases,
    Disagreement,
    Failed,
    Setup,
    one_line,
)
from tinybert_fast.benchmarks.clocks import Clock, QuietClock
from tinybert_fast.benchmarks.hardware import copy_gbytes, facts, has_bf16, matmul_gflops
from tinybert_fast.benchmarks.measuring import Sweeps, inputs_of, measure, tried
from tinybert_fast.benchmarks.rounds import ROUNDS, ROUNDS_SHORT, WARM_UP
from tinybert_fast.benchmarks.suites import keep, load_cases, selected
from tinybert_fast.benchmarks.table import CsvFile, Row, digits, growth_exponents, show, write_json

DTYPE_CHOICES = {"fp32": ("fp32",), "bf16": ("bf16",), "both": ("fp32", "bf16")}
Key = tuple[Any, ...]  # what a case is, of inputs_of
ENTRIES = 6  # of the traceback of a case that failed, the last ones
WIDTH = 120  # columns of the printed table


def run_suite(
    suite: str = "step",
    *,
    cases: Collection[str] = (),
    providers: Collection[str] = (),
    passes: Collection[str] = (),
    widths: Collection[int] = (),
    dtype: str = "fp32",
    rounds: int | None = None,
    sweeps: int = 1,
    threads: int | None = 2,
    dropout: float = 0.1,
    device: str = "auto",
    seed: int = 0,
    smoke: bool = False,
    profile: bool = False,
    minutes: float | None = None,
    json_path: str | Path | None = None,
    csv_path: str | Path | None = None,
    plots_path: str | Path | None = None,
    against: str | Path | None = None,
    console: Any = None,
) -> list[Row]:
    """Run a suite, print its table, write what was asked for, and return the rows (table.COLUMNS).

    Files are written anew after every case, so what ends a run early leaves the rows before it.

    Args:
        suite: "step" (training steps), "ops" (each by itself: forward, backward and both), "memory"
            (attention loss against the length), "masking" (mlm_mask and collators, of integers
            whatever the dtype), "inference" (encoders that answer) or "scaling" (steps against
            batch, length and padding).
        cases: names, or beginnings of names, of the cases to run; all by default.
        providers: names of those to run, beside the one that others are held to; all by default,
            but for ops' references on a GPU.
        passes: "forward", "backward", "both": of ops, only these; all by default.
        widths: tokens a sequence, N of the table: only cases of these; all by default.
        dtype: "fp32", "bf16" (autocast) or "both", which also compares across the two.
        rounds: repetitions in each sweep; by default 10 on a CPU (3 where bf16 is emulated); on a
            GPU what fits into SECONDS, from 10 to 50.
        sweeps: over all cases, each of which is built anew in every one.
        threads: of PyTorch on the CPU, None leaves them as they are.
        dropout: while timed. Values are always checked at 0.
        device: "auto" takes a GPU if there is one.
        smoke: tiny models, seconds: shows that it works, its times mean nothing.
        profile: also show, and write to ``json_path``, where the time of our runs goes.
        minutes: after which no further case begins, in whichever sweep.
        json_path: file to write; csv_path: file to append to; plots_path: folder to draw to.
        against: .csv or .json of an earlier run, also ``csv_path`` itself: how far the ratios are
            from its last ones is shown.
        console: a rich Console for the table (stdout by default); progress goes to stderr.

    Raises:
        Disagreement: providers of a case differ in loss or gradients; no row of it is written.
        Failed: cases failed, for whatever reason. Rows of sweeps before the failure are written.
        ValueError: an argument that cannot be served.
    """
    from rich.console import Console

    if console is None:
        console = Console()
        console.width = max(console.width, WIDTH)  # a wrapped line is better than a cut number
    on = _device(device)
    builders = selected(load_cases(suite, on_gpu=on.type == "cuda"), cases)
    for one in passes:
        if one not in PASSES:
            raise ValueError(f"--pass {one!r} is not one of {', '.join(PASSES)}")
    _refuse(dtype, rounds, sweeps, threads, dropout, minutes)
    earlier = read_earlier(Path(against), suite) if against is not None else []
    file = CsvFile(Path(csv_path)) if csv_path is not None else None
    # On a GPU, where rounds have to fit into seconds, a slow one would take them from the others.
    reference = on.type == "cpu" or REFERENCE in providers
    setup = Setup(on, dropout=dropout, seed=seed, smoke=smoke, reference=reference)
    dtypes = DTYPE_CHOICES[dtype]
    emulated = "bf16" in dtypes and not has_bf16(setup.device)
    warm_up: int | None = None
    if emulated or smoke:
        rounds, warm_up = rounds or ROUNDS_SHORT, 1
    elif on.type == "cpu":
        rounds, warm_up = rounds or ROUNDS["cpu"], WARM_UP["cpu"]

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    profiles: list[Breakdown] = []
    found: dict[Key, Sweeps] = {}
    of_case: dict[Key, list[Row]] = {}
    settings: dict[Key, list[Row]] = {}
    failures: dict[Key, Exception] = {}
    there: set[int] = set()  # widths
    rows: list[Row] = []
    begun = False  # to write
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes

    def late() -> str | None:
        return f"not begun after {minutes} minutes" if time.monotonic() > deadline else None

    try:
        common = {"suite": suite, **facts(setup.device)}
        ceilings = _ceilings(setup.device, dtypes)
        clock = Clock(on) if smoke or on.type != "cpu" else QuietClock(free=_free(earlier, common))
        for first, name, case in _in_turn(builders, setup, sweeps, late):
            if isinstance(case, Exception):
                failures.setdefault((name,), case)
                continue
            there.add(case.width)
            if (passes and case.phase not in passes) or (widths and case.width not in widths):
                del case
                continue
            key = tuple(inputs_of(case).values())
            if first and (why := late()) is not None:
                failures[key] = Failed(f"{case.title}: {why}")
            if late() or key in failures:
                del case
                continue
            if providers:
                keep(case, providers)
            try:
                with _progress(case.title) as say, _stream(setup.device):
                    of_case[key] = measure(
                        case, dtypes, rounds, warm_up, clock, common, say, ceilings,
                        found.setdefault(key, Sweeps()),
                    )  # fmt: skip
                    settings[key] = tried(case, found[key])
                    if profile and first:
                        say("profile")
                        profiles += breakdowns(case, dtypes, setup.device)
            except Exception as error:  # noqa: BLE001  whatever a kernel or a compiler raises
                failures[key] = _told(error, case.title)
                if isinstance(error, Disagreement):
                    of_case.pop(key, None)  # of sweeps in which another setting was chosen
            finally:
                del case
            rows = list(chain.from_iterable(of_case.values()))
            if suite == "memory":
                growth_exponents(rows)
            begun = begun or bool(rows)
            if json_path is not None and begun:
                choices = list(chain.from_iterable(settings.values()))
                write_json(Path(json_path), suite, rows, profiles, choices)
            if file is not None and begun:
                file.write(rows)
    finally:
        torch.set_num_threads(before)
    if rows:
        show(rows, console)
    if rows and earlier:
        show_spreads(spreads(earlier, rows), console)
    if rows and plots_path is not None:
        from tinybert_fast.benchmarks.plots import draw

        draw(rows, Path(plots_path))
    for one in profiles:
        title = f"{one['case']} N={one['width']}, {one['provider']} {one['dtype']}"
        rate = ceilings[one["dtype"]]["matmul_gflops"]
        show_breakdown(one, title, rate, console)
    errors = list(failures.values())
    if len(errors) == 1 and isinstance(errors[0], Failed):
        raise errors[0]
    if errors:
        raise Failed("\n".join(map(one_line, errors))) from errors[0]
    if not there.issuperset(widths):
        asked, has = (", ".join(map(str, sorted(n))) for n in (set(widths) - there, there))
        raise ValueError(f"--width {asked}: these cases have {has}")
    return rows


def _in_turn(
    builders: Cases, setup: Setup, sweeps: int, late: Callable[[], str | None]
) -> Iterator[tuple[bool, str, Case | Exception]]:
    """Whether it is the first sweep, a builder's name, and one of its cases, built one at a time
    and freed before the next, or why there is none."""
    for number in range(sweeps):
        for name, build in builders.items():
            if (why := late()) is not None:
                if number == 0:
                    yield True, name, Failed(f"{name}: {why}")
                continue
            cases = build(setup)
            while True:
                try:
                    case = next(cases, None)
                except Exception as error:  # noqa: BLE001  memory, or a check of the inputs
                    yield number == 0, name, _told(error, name)
                    break
                if case is None:
                    break
                yield number == 0, name, case
                del case
                gc.collect()
                if setup.on_gpu:
                    torch.cuda.empty_cache()
            torch.compiler.reset()  # of code compiled for this case's shapes


def _told(error: Exception, title: str) -> Exception:
    """An error after stderr has it; it no longer keeps the models of its case alive."""
    print(f"{title} failed:", file=sys.stderr)
    traceback.print_exception(error, limit=-ENTRIES)
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    return error


def _refuse(
    dtype: str,
    rounds: int | None,
    sweeps: int,
    threads: int | None,
    dropout: float,
    minutes: float | None,
) -> None:
    if dtype not in DTYPE_CHOICES:
        raise ValueError(f"--dtype {dtype!r} is not one of {', '.join(DTYPE_CHOICES)}")
    for what, value in (("--rounds", rounds), ("--sweeps", sweeps), ("--threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{what} {value}: at least 1 is needed")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes {minutes}: more than 0 are needed")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"--dropout {dropout}: a probability in [0, 1) is needed")


def _ceilings(device: torch.device, dtypes: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """What the machine gives at best, by dtype, in the columns of a row."""
    copied = copy_gbytes(device)
    return {
        dtype: {
            "matmul_gflops": digits(matmul_gflops(device, DTYPES[dtype])),
            "copy_gbytes": digits(copied),
        }
        for dtype in dtypes
    }


def _free(earlier: list[Row], common: Row) -> float:
    """Seconds of the fastest pulse that the same cores had in earlier rows."""
    same = ("cpu", "cores", "threads")
    pulses = [
        row["pulse_us"]
        for row in earlier
        if row["pulse_us"] and all(row[name] == common[name] for name in same)
    ]
    return 1e-6 * min(pulses, default=math.inf)


def _stream(device: torch.device) -> Any:
    """All of a case on one stream that can be captured, which the default one cannot."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    torch.cuda.synchronize(device)  # it does not wait for the default one, which made the models
    return torch.cuda.stream(torch.cuda.Stream(device))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ROUNDS:
        raise ValueError(f"--device {name!r} is not one of auto, {', '.join(ROUNDS)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here")
    return torch.device(name)


class _progress:
    """A line on stderr that says what is running, gone when it is done."""

    def __init__(self, title: str) -> None:
        from rich.console import Console

        self._title = title
        self._status = Console(stderr=True).status(title)

    def __enter__(self) -> Callable[[str], None]:
        self._status.__enter__()
        return lambda text: self._status.update(f"{self._title}: {text}")

    def __exit__(self, *raised: Any) -> None:
        self._status.__exit__(*raised)
