"""The benchmark runner: tune, check, time in interleaved rounds, one row per provider and dtype.

For every case, at full size:
1. each provider that has settings times them and keeps its fastest;
2. at dropout 0 the providers must agree in loss and gradients, or no speed is printed at all;
3. warm-up, then rounds A B C A B C ...; a speed-up is the median of its rounds' ratios, so what
   disturbs the machine for a while disturbs both sides;
4. on a GPU, calls of a single op are timed as CUDA graphs too, in rounds of their own; a graph of a
   whole step is a provider of its own;
5. one more run of each under the allocation profiler gives its peak memory;
6. if asked for, one more of ours under the time profiler shows where its time goes (breakdown.py),
   and on a GPU one of the careful baseline too.
A provider that cannot run here says so in 1, on stderr, and the case goes on without it.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import traceback
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tinybert_fast.benchmarks.breakdown import Breakdown, breakdown
from tinybert_fast.benchmarks.breakdown import show as show_breakdown
from tinybert_fast.benchmarks.case import (
    BASELINE,
    CAREFUL,
    DTYPES,
    OURS,
    Case,
    Cases,
    Disagreement,
    Failed,
    Outcome,
    Setup,
    Unavailable,
    Work,
)
from tinybert_fast.benchmarks.graphs import Replay
from tinybert_fast.benchmarks.hardware import (
    Clock,
    copy_gbytes,
    facts,
    has_bf16,
    matmul_gflops,
)
from tinybert_fast.benchmarks.memory import peak_bytes
from tinybert_fast.benchmarks.table import (
    COLUMNS,
    CsvFile,
    Row,
    growth_exponents,
    show,
    write_json,
)

SUITES = ("step", "ops", "memory", "masking", "inference", "scaling")
DTYPE_CHOICES = {"fp32": ("fp32",), "bf16": ("bf16",), "both": ("fp32", "bf16")}

# Relative differences allowed at dropout 0 in fp32, where the order of additions differs. In bf16:
# twice the reference's own distance from its fp32 answer, and these on top; of a loss, which may be
# near by chance, an eighth of a rounding to bf16 at least.
LOSS_TOLERANCE = 1e-5
LOSS_TOLERANCE_BF16 = 2.0**-12
GRADIENT_TOLERANCE = 2e-4
# A gradient is compared with its own norm, but with no less than this share of the largest one: the
# key biases' is zero but for rounding.
SMALLEST_NORM = 1e-3

ROUNDS = {"cpu": 10, "cuda": 50}
WARM_UP = {"cpu": 1, "cuda": 20}
# A case of long steps takes fewer on a GPU: what fits into so many seconds, but not below these.
SECONDS = {"rounds": 3.0, "warm-up": 0.5}
SECONDS_OF_OPS = {"rounds": 0.4, "warm-up": 0.1}  # of which there are a hundred, and short
LEAST_ROUNDS, LEAST_WARM_UP = 10, 3
PROFILED = {"cpu": (OURS,), "cuda": (OURS, CAREFUL)}  # roles
ROUNDS_SHORT = 3  # bf16 without instructions for it (slow, and nobody's figure), smoke runs
ENTRIES = 6  # of the traceback of a case that failed, the last ones
WIDTH = 120  # columns of the printed table

Lane = tuple[Any, str]  # provider, dtype


def load_cases(suite: str, *, on_gpu: bool = False) -> Cases:
    """Name -> builder of every case of a suite. Training steps are larger on a GPU."""
    if suite not in SUITES:
        raise ValueError(f"--suite {suite!r} is not one of {', '.join(SUITES)}")
    if suite == "ops":
        from tinybert_fast.benchmarks.cases import (
            attention,
            attention_relation_kl,
            attention_score_mse,
            bias_gelu,
            dropout_add_layer_norm,
            embedding_layer_norm,
            hidden_mse,
            layer_norm,
            linear_cross_entropy,
        )

        return {  # what matters most first: ``minutes`` cuts the end off
            **attention.CASES,
            **dropout_add_layer_norm.CASES,
            **attention_score_mse.CASES,
            **linear_cross_entropy.CASES,
            **attention.MORE_CASES,
            **hidden_mse.CASES,
            **layer_norm.CASES,
            **embedding_layer_norm.CASES,
            **attention_relation_kl.CASES,
            **bias_gelu.CASES,
        }
    if suite == "memory":
        from tinybert_fast.benchmarks.cases import attention_score_mse_memory

        return attention_score_mse_memory.CASES
    if suite == "masking":
        from tinybert_fast.benchmarks.cases import masking

        return masking.CASES
    if suite == "inference":
        from tinybert_fast.benchmarks.cases import inference

        return inference.GPU_CASES if on_gpu else inference.CASES
    if suite == "scaling":
        from tinybert_fast.benchmarks.cases import scaling

        return scaling.GPU_CASES if on_gpu else scaling.CASES
    from tinybert_fast.benchmarks.cases import distill_step, mlm_step

    if on_gpu:
        return {**mlm_step.GPU_CASES, **distill_step.GPU_CASES}
    return {**mlm_step.CASES, **distill_step.CASES}


def run_suite(
    suite: str = "step",
    *,
    cases: Collection[str] = (),
    providers: Collection[str] = (),
    dtype: str = "fp32",
    rounds: int | None = None,
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
        providers: names of those to run, beside the one that others are held to; all by default.
        dtype: "fp32", "bf16" (autocast) or "both", which also compares across the two.
        rounds: repetitions; by default 10 on a CPU (3 where bf16 is emulated); on a GPU what fits
            into SECONDS, from 10 to 50.
        threads: of PyTorch on the CPU, None leaves them as they are.
        dropout: while timed. Values are always checked at 0.
        device: "auto" takes a GPU if there is one.
        smoke: tiny models, seconds: shows that it works, its times mean nothing.
        profile: also show, and write to ``json_path``, where the time of our runs goes.
        minutes: after which no further case begins.
        json_path: file to write; csv_path: file to append to; plots_path: folder to draw to.
        console: a rich Console for the table (stdout by default); progress goes to stderr.

    Raises:
        Disagreement: providers of a case differ in loss or gradients; no row of it is written.
        Failed: several cases gave no rows. What a single one raised is raised as it is.
        ValueError: an argument that cannot be served.
    """
    from rich.console import Console

    if console is None:
        console = Console()
        console.width = max(console.width, WIDTH)  # a wrapped line is better than a cut number
    on = _device(device)
    builders = _selected(load_cases(suite, on_gpu=on.type == "cuda"), cases)
    if dtype not in DTYPE_CHOICES:
        raise ValueError(f"--dtype {dtype!r} is not one of {', '.join(DTYPE_CHOICES)}")
    for what, value in (("--rounds", rounds), ("--threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{what} {value}: at least 1 is needed")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes {minutes}: more than 0 are needed")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"--dropout {dropout}: a probability in [0, 1) is needed")
    file = CsvFile(Path(csv_path)) if csv_path is not None else None
    setup = Setup(on, dropout=dropout, seed=seed, smoke=smoke)
    dtypes = DTYPE_CHOICES[dtype]
    emulated = "bf16" in dtypes and not has_bf16(setup.device)
    warm_up: int | None = None
    if emulated or smoke:
        rounds, warm_up = rounds or ROUNDS_SHORT, 1
    elif on.type == "cpu":
        rounds, warm_up = rounds or ROUNDS["cpu"], WARM_UP["cpu"]

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    rows: list[Row] = []
    profiles: list[Breakdown] = []
    failures: list[Exception] = []
    try:
        common = {"suite": suite, **facts(setup.device)}
        ceilings = _ceilings(setup.device, dtypes)
        for build in builders.values():
            for case in build(setup):
                if deadline is not None and time.monotonic() > deadline:
                    failures.append(Failed(f"{case.title}: not begun after {minutes} minutes"))
                    continue
                if providers:
                    _keep(case, providers)
                try:
                    with _progress(case.title) as say, _stream(setup.device):
                        found = measure(
                            case, dtypes, rounds, warm_up, setup.device, common, say, ceilings
                        )
                        if profile:
                            say("profile")
                            profiles += profile_ours(case, dtypes, setup.device)
                except Exception as error:  # noqa: BLE001  whatever a kernel or a compiler raises
                    print(f"{case.title} has no rows:", file=sys.stderr)
                    traceback.print_exception(error, limit=-ENTRIES)
                    _forget_locals(error)
                    failures.append(error)
                    continue
                finally:
                    del case
                    _free(setup.device)
                rows += found
                if suite == "memory":
                    growth_exponents(rows)
                if json_path is not None:
                    write_json(Path(json_path), suite, rows, profiles)
                if file is not None:
                    file.write(rows)
            if setup.on_gpu:
                torch.compiler.reset()  # of code compiled for this case's shapes
    finally:
        torch.set_num_threads(before)
    if rows:
        show(rows, console)
    if rows and plots_path is not None:
        from tinybert_fast.benchmarks.plots import draw

        draw(rows, Path(plots_path))
    for one in profiles:
        title = f"{one['case']} N={one['width']}, {one['provider']} {one['dtype']}"
        rate = ceilings[one["dtype"]]["matmul_gflops"]
        show_breakdown(one, title, rate, console)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        raise Failed("\n".join(str(error) for error in failures)) from failures[0]
    return rows


def _ceilings(device: torch.device, dtypes: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """What the machine gives at best, by dtype, in the columns of a row."""
    copied = copy_gbytes(device)
    return {
        dtype: {
            "matmul_gflops": _digits(matmul_gflops(device, DTYPES[dtype])),
            "copy_gbytes": _digits(copied),
        }
        for dtype in dtypes
    }


def _stream(device: torch.device) -> Any:
    """All of a case on one stream that can be captured, which the default one cannot."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    torch.cuda.synchronize(device)  # it does not wait for the default one, which made the models
    return torch.cuda.stream(torch.cuda.Stream(device))


def _forget_locals(error: BaseException | None) -> None:
    """An error that is kept must not keep the models of its case alive."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def _free(device: torch.device) -> None:
    """What the last case had, for the next: memory and graphs."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(
    case: Case,
    dtypes: tuple[str, ...],
    rounds: int | None,
    warm_up: int | None,
    device: torch.device,
    common: dict[str, Any],
    say: Callable[[str], None] = lambda _: None,
    ceilings: dict[str, dict[str, float]] | None = None,
) -> list[Row]:
    """The rows of one case; ``common`` are the columns that all rows of a run share, ``ceilings``
    those that rows of a dtype do. ``rounds``, ``warm_up``: None lets their time decide. Providers
    that cannot run here are left out, and stderr says why."""
    clock = Clock(device)
    dtypes = case.dtypes or dtypes
    left_out: dict[tuple[str, str], str] = {}  # provider, dtype -> why
    # Emulated bf16 is too slow to try every setting in: it takes fp32's choice.
    for dtype in dtypes if has_bf16(device) else ("fp32",):
        for provider in case.providers:
            say(f"{provider.name} {dtype}: choosing its fastest setting")
            try:
                provider.tune(dtype, clock.best)
                if provider.name in case.optional:
                    provider.run(dtype)  # the check, at dropout 0, may be another kernel's
            except Exception as refusal:
                if not may_miss(case, provider.name, refusal):
                    raise
                left_out[provider.name, dtype] = str(refusal)
    errors: dict[tuple[str, str], tuple[float, float]] = {}
    for dtype in dtypes:
        say(f"{dtype}: comparing losses and gradients")
        for name, error in check(case, dtype, left_out).items():
            errors[name, dtype] = error
    for (name, dtype), why in left_out.items():
        print(f"{case.title}: no {name} in {dtype}: {why.strip()[:400]}", file=sys.stderr)
    lanes = [
        (provider, dtype)
        for dtype in dtypes
        for provider in case.providers
        if (provider.name, dtype) not in left_out
    ]
    if rounds is None or warm_up is None:
        given = SECONDS_OF_OPS if case.optimizer == "none" else SECONDS
        fitting = repetitions(lanes, clock, case.calls, given)
        rounds, warm_up = rounds or fitting[0], warm_up or fitting[1]
    times = interleave(lanes, rounds, warm_up, clock, say, case.calls)
    graphs = replays(lanes, case, rounds, clock, say) if case.captured else {}
    say("peak memory")
    peaks = {
        (provider, dtype): peak_bytes(
            partial(getattr(provider, "run_uncaptured", provider.run), dtype), device
        )
        for provider, dtype in lanes
    }

    def ratio(role: str, lane: Lane, of: dict[Lane, list[float]], dtype: str) -> float | None:
        theirs = [of[other] for other in of if (other[0].role, other[1]) == (role, dtype)]
        return speedup(theirs[0], of[lane]) if theirs and lane in of else None

    rows = []
    for lane in lanes:
        provider, dtype = lane
        mine = times[lane]
        p20, median, p80 = quantiles(mine, (0.2, 0.5, 0.8))
        graph = quantiles(graphs[lane], (0.5,))[0] if lane in graphs else None
        ceiling = (ceilings or {}).get(dtype, {})
        loss_error, gradient_error = errors.get((provider.name, dtype), (None, None))
        row = dict.fromkeys(COLUMNS)
        row.update(
            common,
            **ceiling,
            case=case.name,
            provider=provider.name,
            role=provider.role,
            dtype=dtype,
            batch=case.batch,
            width=case.width,
            valid_tokens=case.valid_tokens,
            valid_fraction=round(case.valid_fraction, 4),
            dropout=case.dropout,
            optimizer=case.optimizer,
            setting=provider.setting(dtype),
            rounds=rounds,
            median_ms=_digits(1e3 * median),
            p20_ms=_digits(1e3 * p20),
            p80_ms=_digits(1e3 * p80),
            tokens_per_s=_digits(case.valid_tokens / median),
            speedup_a=ratio(BASELINE, lane, times, dtype),
            speedup_b=ratio(CAREFUL, lane, times, dtype),
            speedup_a_fp32=ratio(BASELINE, lane, times, "fp32"),
            graph_ms=_digits(None if graph is None else 1e3 * graph),
            graph_speedup_a=ratio(BASELINE, lane, graphs, dtype),
            graph_speedup_b=ratio(CAREFUL, lane, graphs, dtype),
            peak_mib=_digits(peaks[lane] / 2**20),
            loss_error=_digits(loss_error),
            gradient_error=_digits(gradient_error),
        )
        row["pass"] = case.phase
        if case.work is not None:
            row.update(_achieved(case.work(dtype), median if graph is None else graph, ceiling))
        rows.append(row)
    return rows


def may_miss(case: Case, name: str, error: Exception) -> bool:
    """Whether the case goes on without a provider that raised this."""
    return name in case.optional or isinstance(error, Unavailable)


def _achieved(work: Work, seconds: float, ceiling: dict[str, float]) -> dict[str, float | None]:
    """Rates of a job, and the least time that the machine's ceilings allow it."""
    bound = None
    if ceiling:
        arithmetic = work.flops / (1e9 * ceiling["matmul_gflops"])
        bound = max(arithmetic, work.bytes / (1e9 * ceiling["copy_gbytes"]))
    return {
        "tflops": _digits(1e-12 * work.flops / seconds),
        "gbytes_per_s": _digits(1e-9 * work.bytes / seconds),
        "bound_ms": _digits(None if bound is None else 1e3 * bound),
    }


def replays(
    lanes: list[Lane],
    case: Case,
    rounds: int,
    clock: Clock,
    say: Callable[[str], None] = lambda _: None,
) -> dict[Lane, list[float]]:
    """As ``interleave``, of the case's calls as CUDA graphs; without the lanes that can't be
    captured. On a CPU there are none."""
    if clock.device.type == "cpu":
        return {}
    graphs: dict[Lane, Lane] = {}
    for provider, dtype in lanes:
        say(f"{provider.name} {dtype}: capturing")
        with contextlib.suppress(RuntimeError):
            calls = partial(_several, provider, dtype, case.calls)
            graphs[provider, dtype] = (Replay(calls), dtype)
    times = interleave(list(graphs.values()), rounds, 1, clock, say)
    return {lane: [t / case.calls for t in times[graph]] for lane, graph in graphs.items()}


def repetitions(
    lanes: list[Lane],
    clock: Callable[[Callable[[], Any]], float],
    calls: int,
    given: dict[str, float],
) -> tuple[int, int]:
    """Rounds and warm-ups on a GPU, by the second run of each lane, within ``given`` seconds."""
    one = 0.0
    for lane in lanes:
        call = partial(_several, *lane, calls)
        call()
        one += clock(call)
    rounds, warm_up = (int(seconds / one) for seconds in given.values())
    return (
        min(ROUNDS["cuda"], max(LEAST_ROUNDS, rounds)),
        min(WARM_UP["cuda"], max(LEAST_WARM_UP, warm_up)),
    )


def _several(provider: Any, dtype: str, calls: int) -> None:
    for _ in range(calls):
        provider.run(dtype)


def profile_ours(case: Case, dtypes: tuple[str, ...], device: torch.device) -> list[Breakdown]:
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


def interleave(
    lanes: list[Lane],
    rounds: int,
    warm_up: int,
    clock: Callable[[Callable[[], Any]], float],
    say: Callable[[str], None] = lambda _: None,
    calls: int = 1,
) -> dict[Lane, list[float]]:
    """Seconds of every lane in every round: A B C, A B C, ...; the mean of ``calls`` in a row."""
    times: dict[Lane, list[float]] = {lane: [] for lane in lanes}
    gc.collect()
    gc.freeze()  # what is there by now need not be looked through in each round
    try:
        for number in range(-warm_up, rounds):
            say("warm-up" if number < 0 else f"round {number + 1} of {rounds}")
            gc.collect()  # rather now than inside somebody's time
            for lane in lanes:
                provider, dtype = lane
                seconds = clock(partial(_several, provider, dtype, calls))
                if number >= 0:
                    times[lane].append(seconds / calls)
    finally:
        gc.unfreeze()
    return times


def quantiles(values: list[float], at: tuple[float, ...]) -> list[float]:
    """By linear interpolation between the sorted values."""
    ranked = torch.tensor(values, dtype=torch.float64)
    return ranked.quantile(torch.tensor(at, dtype=torch.float64)).tolist()


def speedup(baseline: list[float] | None, mine: list[float]) -> float | None:
    """How many times faster than the baseline: the median of the rounds' ratios."""
    if baseline is None:
        return None
    ratios = [theirs / ours for theirs, ours in zip(baseline, mine, strict=True)]
    return round(quantiles(ratios, (0.5,))[0], 3)


def check(
    case: Case, dtype: str, left_out: dict[tuple[str, str], str] | None = None
) -> dict[str, tuple[float, float]]:
    """Largest (loss, gradient) error of each provider that a check compares, or Disagreement.

    An optional provider that fails or disagrees is written into ``left_out``, with the reason.
    """
    left_out = {} if left_out is None else left_out
    providers = {provider.name: provider for provider in case.providers}
    found: dict[str, tuple[float, float]] = {}
    for one in case.checks:
        if (one.reference, dtype) in left_out:
            raise Failed(f"{case.name}: {one.reference!r}, which others are held to, cannot run")
        exact = providers[one.reference].outcome(one.what, "fp32")
        allowed = [LOSS_TOLERANCE, GRADIENT_TOLERANCE]
        if dtype != "fp32":
            own, _ = errors_between(exact, providers[one.reference].outcome(one.what, dtype))
            allowed = [tolerance + 2 * e for tolerance, e in zip(allowed, own, strict=True)]
            allowed[0] = max(allowed[0], LOSS_TOLERANCE_BF16)
        for name in one.others:
            if (name, dtype) in left_out:
                continue
            try:
                errors, worst = errors_between(exact, providers[name].outcome(one.what, dtype))
                # Written so that a NaN does not pass.
                if not all(e <= most for e, most in zip(errors, allowed, strict=True)):
                    raise Disagreement(
                        f"{case.name} in {dtype}, {one.what}: {name!r} does not compute what "
                        f"{one.reference!r} computes. Loss differs by {errors[0]:.2e} (allowed "
                        f"{allowed[0]:.1e}), gradient of {worst} by {errors[1]:.2e} (allowed "
                        f"{allowed[1]:.1e}). No speed is reported"
                    )
            except Exception as error:
                if not may_miss(case, name, error):
                    raise
                left_out[name, dtype] = str(error)
                continue
            before = found.get(name, (0.0, 0.0))
            found[name] = max(before[0], errors[0]), max(before[1], errors[1])
    return found


def errors_between(exact: Outcome, other: Outcome) -> tuple[tuple[float, float], str]:
    """Relative (loss, worst gradient) errors of ``other``, and the name of that gradient."""
    mine, theirs = (torch.as_tensor(each.loss, dtype=torch.float64) for each in (other, exact))
    loss = _norm(mine - theirs) / _norm(theirs)
    if exact.gradients.keys() != other.gradients.keys():
        strange = sorted(exact.gradients.keys() ^ other.gradients.keys())
        return (loss, float("inf")), f"{strange[0]} (only one side has it)"
    norms = {name: _norm(g) for name, g in exact.gradients.items()}
    if not norms:
        return (loss, 0.0), "nothing"
    floor = SMALLEST_NORM * max(norms.values())
    errors = {
        name: _norm(other.gradients[name].double() - g.double()) / max(norms[name], floor)
        for name, g in exact.gradients.items()
    }
    # A NaN compares false with everything: look for it first.
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return (loss, errors[worst]), worst


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double()))


def _keep(case: Case, names: Collection[str]) -> None:
    """Leave these providers in a case, and those that its checks refer to."""
    if not any(provider.name in names for provider in case.providers):
        there = ", ".join(provider.name for provider in case.providers)
        asked = ", ".join(names)
        raise ValueError(f"--provider {asked}: {case.title} has none of them but {there}")
    kept = {*names, *(check.reference for check in case.checks)}
    case.providers = [p for p in case.providers if p.name in kept]
    case.checks = tuple(
        replace(check, others=tuple(name for name in check.others if name in kept))
        for check in case.checks
    )


def _selected(builders: Cases, wanted: Collection[str]) -> Cases:
    if isinstance(wanted, str):
        wanted = (wanted,)
    for begin in wanted:
        if not any(name.startswith(begin) for name in builders):
            raise ValueError(f"--case {begin!r} matches none of {', '.join(builders)}")
    return {
        name: build
        for name, build in builders.items()
        if not wanted or any(name.startswith(begin) for begin in wanted)
    }


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ROUNDS:
        raise ValueError(f"--device {name!r} is not one of auto, {', '.join(ROUNDS)}")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA device here")
    return torch.device(name)


def _digits(value: Any) -> Any:
    """Four significant digits, more would be noise; None as it is."""
    return None if value is None else float(f"{value:.4g}")


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
