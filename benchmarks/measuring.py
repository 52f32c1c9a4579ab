"""The rows of one case, measured at full size:

1. each provider that has settings times them and keeps its fastest, by all sweeps so far (those
   far from it in two sweeps are out of the race);
2. at dropout 0 the providers must agree in loss and gradients, or there are no rows (checking.py);
3. warm-up, then rounds A B C A B C ..., on a CPU with nobody else on its cores (clocks.py); a
   speed-up is the median of its rounds' ratios (rounds.py);
4. on a GPU, calls of a single op are timed as CUDA graphs too, in rounds of their own; a graph of a
   whole step is a provider of its own;
5. one more run of each under the allocation profiler gives its peak memory.
A provider that cannot run here says so in 1, on stderr, and the case goes on without it.

Further sweeps, later and with tensors made anew, repeat 1, 3 and 4; their rounds count together.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from tinybert_fast.benchmarks.case import BASELINE, CAREFUL, CAREFUL_GRAPH, Case, Work
from tinybert_fast.benchmarks.checking import check, may_miss
from tinybert_fast.benchmarks.clocks import Clock
from tinybert_fast.benchmarks.hardware import has_bf16
from tinybert_fast.benchmarks.memory import peak_bytes
from tinybert_fast.benchmarks.rounds import (
    SECONDS,
    SECONDS_OF_OPS,
    in_a_row,
    interleave,
    quantiles,
    repetitions,
    replays,
    speedup,
)
from tinybert_fast.benchmarks.table import COLUMNS, Row, digits

FAR = 1.25  # times the fastest setting's seconds: more than another place of its tensors moves it
Say = Callable[[str], None]


class Who(NamedTuple):
    provider: str
    role: str
    dtype: str


@dataclass(eq=False)
class Sweeps:
    """What the sweeps over a case gave so far."""

    count: int = 0
    pulses: list[float] = field(default_factory=list)  # seconds, of each sweep
    left_out: dict[tuple[str, str], str] = field(default_factory=dict)  # (provider, dtype): why
    checked: set[tuple[str, str, str]] = field(default_factory=set)  # provider, setting, dtype
    errors: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    peaks: dict[Who, int] = field(default_factory=dict)  # bytes
    settings: dict[Who, list[str]] = field(default_factory=dict)
    times: dict[Who, list[float]] = field(default_factory=dict)  # seconds of a call
    graphs: dict[Who, list[float]] = field(default_factory=dict)
    work: dict[Who, Work] = field(default_factory=dict)  # of those who do another job than others
    tried: dict[tuple[Who, str], list[float]] = field(default_factory=dict)  # setting: seconds

    def add(self, into: str, who: Who, seconds: list[float] | None) -> None:
        """The rounds of this sweep to ``times`` or ``graphs``. Who has none in one sweep has none
        at all: ratios are of rounds in which both took part."""
        found: dict[Who, list[float]] = getattr(self, into)
        if seconds is None:
            found.pop(who, None)
        elif who in found or not self.count:
            found.setdefault(who, []).extend(seconds)

    def forget_left_out(self) -> None:
        """Who could run in earlier sweeps alone."""
        for who in [who for who in self.times if (who.provider, who.dtype) in self.left_out]:
            for found in (self.peaks, self.settings, self.times, self.graphs):
                found.pop(who, None)


def measure(
    case: Case,
    dtypes: tuple[str, ...],
    rounds: int | None,
    warm_up: int | None,
    clock: Clock,
    common: dict[str, Any],
    say: Say = lambda _: None,
    ceilings: dict[str, dict[str, float]] | None = None,
    sweeps: Sweeps | None = None,
) -> list[Row]:
    """The rows of one case; ``common`` are the columns that all rows of a run share, ``ceilings``
    those that rows of a dtype do. ``rounds``, ``warm_up``: None lets their time decide. Providers
    that cannot run here are left out, and stderr says why. ``sweeps``: of this case, made anew,
    earlier in the run; this one is added."""
    sweeps = Sweeps() if sweeps is None else sweeps
    dtypes = case.dtypes or dtypes
    known = set(sweeps.left_out)
    tune(case, dtypes, clock, say, sweeps)
    for dtype in dtypes:
        settings = {(p.name, p.setting(dtype), dtype) for p in case.providers}
        if settings <= sweeps.checked:
            continue
        say(f"{dtype}: comparing losses and gradients")
        for name, errors in check(case, dtype, sweeps.left_out).items():
            before = sweeps.errors.get((name, dtype), (0.0, 0.0))
            sweeps.errors[name, dtype] = max(before[0], errors[0]), max(before[1], errors[1])
        sweeps.checked |= settings
    for (name, dtype), why in sweeps.left_out.items():
        if (name, dtype) not in known:
            print(f"{case.title}: no {name} in {dtype}: {why.strip()[:400]}", file=sys.stderr)
    sweeps.forget_left_out()
    lanes = [
        (provider, dtype)
        for dtype in dtypes
        for provider in case.providers
        if (provider.name, dtype) not in sweeps.left_out
    ]
    if rounds is None or warm_up is None:
        given = SECONDS_OF_OPS if case.optimizer == "none" else SECONDS
        fitting = repetitions(lanes, clock, case.calls, given)
        rounds, warm_up = rounds or fitting[0], warm_up or fitting[1]
    clock.pulse()  # of what was before
    times = interleave(lanes, rounds, warm_up, clock, say, case.calls)
    if (pulse := clock.pulse()) is not None:
        sweeps.pulses.append(pulse)
    graphs = replays(lanes, case.calls, rounds, clock, say) if case.captured else {}
    for lane in lanes:
        provider, dtype = lane
        who = Who(provider.name, provider.role, dtype)
        sweeps.add("times", who, times[lane])
        sweeps.add("graphs", who, graphs.get(lane))
        sweeps.settings.setdefault(who, []).append(provider.setting(dtype))
        if who not in sweeps.peaks:
            say(f"{provider.name} {dtype}: peak memory")
            run = partial(getattr(provider, "run_uncaptured", provider.run), dtype)
            sweeps.peaks[who] = peak_bytes(run, clock.device)
            if hasattr(provider, "work"):
                sweeps.work[who] = provider.work(dtype)
    sweeps.count += 1
    rows = []
    for who, peak in sweeps.peaks.items():
        ceiling = (ceilings or {}).get(who.dtype, {})
        loss_error, gradient_error = sweeps.errors.get((who.provider, who.dtype), (None, None))
        rows.append(
            {
                **dict.fromkeys(COLUMNS),
                **common,
                **ceiling,
                **inputs_of(case),
                **times_of(case, who, sweeps, ceiling),
                "peak_mib": digits(peak / 2**20),
                "loss_error": digits(loss_error),
                "gradient_error": digits(gradient_error),
            }
        )
    return rows


def tune(
    case: Case,
    dtypes: tuple[str, ...],
    clock: Clock,
    say: Say,
    sweeps: Sweeps,
) -> None:
    """Every provider keeps its fastest setting; who can't run is left out."""

    def seconds(provider: Any, dtype: str, call: Callable[[], Any]) -> float:
        """Of this sweep and those before, as one may be disturbed, which only adds: of two the
        lower; what was far from the fastest in two of them is not run again. A first call, which
        may compile, is not timed."""
        who = Who(provider.name, provider.role, dtype)
        setting = who, provider.setting(dtype)
        tried = sweeps.tried.get(setting, [])
        all_tried = [t for (one, _), times in sweeps.tried.items() if one == who for t in times]
        if len(tried) < 2 or min(tried) < FAR * min(all_tried):
            call()
            tried.append(clock.best(partial(in_a_row, call, case.calls)) / case.calls)
            sweeps.tried[setting] = tried
        return statistics.median_low(tried)

    # Emulated bf16 is too slow to try every setting in: it takes fp32's choice.
    for dtype in dtypes if has_bf16(clock.device) else ("fp32",):
        for provider in case.providers:
            if (provider.name, dtype) in sweeps.left_out:
                continue
            say(f"{provider.name} {dtype}: choosing its fastest setting")
            try:
                provider.tune(dtype, partial(seconds, provider, dtype))
                if provider.name in case.optional:
                    provider.run(dtype)  # the check, at dropout 0, may be another kernel's
            except Exception as refusal:
                if not may_miss(case, provider.name, refusal):
                    raise
                sweeps.left_out[provider.name, dtype] = str(refusal)


def tried(case: Case, sweeps: Sweeps) -> list[Row]:
    """What each setting that a provider chose from took, the fastest of its runs: as columns of
    rows, and "chosen"."""
    return [
        {
            **inputs_of(case),
            **who._asdict(),
            "setting": setting,
            "ms": digits(1e3 * min(seconds)),
            "chosen": setting in sweeps.settings.get(who, ()),
        }
        for (who, setting), seconds in sweeps.tried.items()
    ]


def inputs_of(case: Case) -> Row:
    return {
        "case": case.name,
        "pass": case.phase,
        "batch": case.batch,
        "width": case.width,
        "valid_tokens": case.valid_tokens,
        "valid_fraction": round(case.valid_fraction, 4),
        "dropout": case.dropout,
        "optimizer": case.optimizer,
    }


def times_of(case: Case, who: Who, sweeps: Sweeps, ceiling: dict[str, float]) -> Row:
    """Who it was, how long it took, and how that compares with the others of the same rounds; who
    does another job is compared with nobody."""

    def ratio(role: str, of: dict[Who, list[float]], dtype: str = who.dtype) -> float | None:
        theirs = [of[other] for other in of if (other.role, other.dtype) == (role, dtype)]
        return speedup(theirs[0], of[who]) if theirs and who in of and not own else None

    times, graphs, own = sweeps.times, sweeps.graphs, sweeps.work.get(who)
    work = own or (None if case.work is None else case.work(who.dtype))
    p20, median, p80 = quantiles(times[who], (0.2, 0.5, 0.8))
    graph = quantiles(graphs[who], (0.5,))[0] if who in graphs else None
    least = median if graph is None else graph
    return {
        **who._asdict(),
        "setting": " / ".join(dict.fromkeys(sweeps.settings[who])),
        "sweeps": sweeps.count,
        "rounds": len(times[who]),
        "pulse_us": digits(1e6 * statistics.median(sweeps.pulses)) if sweeps.pulses else None,
        "median_ms": digits(1e3 * median),
        "p20_ms": digits(1e3 * p20),
        "p80_ms": digits(1e3 * p80),
        "tokens_per_s": digits(case.valid_tokens / median),
        "speedup_a": ratio(BASELINE, times),
        "speedup_b": ratio(CAREFUL, times),
        "speedup_a_fp32": ratio(BASELINE, times, "fp32"),
        "speedup_graph": ratio(CAREFUL_GRAPH, times),
        "graph_ms": digits(None if graph is None else 1e3 * graph),
        "graph_speedup_a": ratio(BASELINE, graphs),
        "graph_speedup_b": ratio(CAREFUL, graphs),
        **({} if work is None else achieved(work, least, ceiling)),
    }


def achieved(work: Work, seconds: float, ceiling: dict[str, float]) -> dict[str, float | None]:
    """Rates of a job, and the least time that the machine's ceilings allow it."""
    bound = None
    if ceiling:
        arithmetic = work.flops / (1e9 * ceiling["matmul_gflops"])
        bound = max(arithmetic, work.bytes / (1e9 * ceiling["copy_gbytes"]))
    return {
        "tflops": digits(1e-12 * work.flops / seconds),
        "gbytes_per_s": digits(1e-9 * work.bytes / seconds),
        "bound_ms": digits(None if bound is None else 1e3 * bound),
        "of_bound": digits(None if bound is None else bound / seconds),
    }
