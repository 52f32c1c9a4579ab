"""The fastest launch settings of the attention kernels on this GPU: `tinybert-fast bench --tune`.

For each head, dropout and length, each candidate is timed in the place of one kernel's setting, by
the GPU's clock, on bf16 operands that keep it busy for longer than a launch takes. fp16 has the
same tiles, and takes the same settings; directions and block masks keep the built-in ones. What
wins is validated before it is written.

Compilation takes seconds for each candidate, so processes of their own do it ahead, without the
GPU, into Triton's cache on disk; one process times.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tinybert_fast.data.atomic import atomic_write
from tinybert_fast.kernels import attention, configs, settings
from tinybert_fast.kernels.settings import ANY, Key, Setting, Table
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.testing.validation import CALLS, Finding, validate

TOKENS = 1 << 16
MODEL_HEADS = 12
DROPOUT = 0.1
LONGEST = {64: 64, 128: 128, 512: ANY}  # length that is timed -> up to which it then serves


class Group(NamedTuple):
    """Kernels of one width of a head's tile that share no setting with others'."""

    head: int
    dropout: bool

    def key(self, kernel: str, dtype: torch.dtype = torch.bfloat16) -> Key:
        return Key(kernel, self.head, dtype, self.dropout)

    def __str__(self) -> str:
        return f"heads of {self.head} {'with' if self.dropout else 'without'} dropout"


# Students train with dropout, teachers teach without it.
ORDER = [
    Group(32, True), Group(64, False), Group(32, False), Group(64, True),
    Group(128, True), Group(128, False),
]  # fmt: skip


def _candidates(*tiles: tuple[int, int, int, tuple[int, ...]]) -> list[Setting]:
    return [Setting(m, n, warps, s) for m, n, warps, stages in tiles for s in stages]


# A program of forward and dq keeps BLOCK_M queries and walks over keys; one of dkdv keeps BLOCK_N
# keys and walks over queries. At 128 tokens there are one to four steps: no more stages than that.
CANDIDATES: dict[str, list[Setting]] = {
    "forward": _candidates(
        (64, 32, 4, (2,)), (64, 64, 4, (1, 2, 3)), (64, 128, 4, (1, 2)), (128, 32, 4, (2,)),
        (128, 64, 4, (1, 2, 3)), (128, 64, 8, (1, 2)), (128, 128, 4, (1,)), (128, 128, 8, (1, 2)),
    ),
    "dq": _candidates(
        (32, 64, 4, (1, 2)), (32, 128, 4, (1,)), (64, 32, 4, (1, 2)), (64, 64, 4, (1, 2, 3)),
        (64, 64, 8, (1,)), (64, 128, 4, (1,)), (64, 128, 8, (1,)), (128, 32, 4, (2,)),
        (128, 64, 4, (1,)), (128, 64, 8, (1, 2)),
    ),
    "dkdv": _candidates(
        (32, 64, 4, (1, 2)), (32, 128, 4, (1, 2)), (32, 128, 8, (1,)), (64, 32, 4, (1, 2)),
        (64, 64, 4, (1, 2, 3)), (64, 64, 8, (1,)), (64, 128, 4, (1,)), (64, 128, 8, (1, 2)),
        (128, 64, 4, (1,)), (128, 64, 8, (1,)),
    ),
}  # fmt: skip
WALKS = [(1, 1), (3, 3), (3, 12)]  # stages, heads of a program
ONE_TILE = {
    64: [Setting(64, 64, warps, *walk) for warps in (4, 8) for walk in WALKS],
    128: [Setting(128, 128, warps, *walk) for warps in (4, 8) for walk in WALKS],
}
SCREEN = (1, 3)  # readings of the clock, launches between two: whoever may be the fastest
CAREFUL = (5, 20)
HOPELESS = 1.5  # times the fastest

LEFT_ALONE = 2  # CPU cores: of the process that times
POLITE = 10  # less priority of those that compile


class Invalid(RuntimeError):
    """Attention fails validation under the settings found, or none of them runs."""


# Seconds of one pass ("forward" or "backward") of a call, under the table in force: (pass, head,
# dropout, length, (readings, launches)). Infinite where the setting cannot run.
Clock = Callable[[str, int, bool, int, tuple[int, int]], float]
Candidate = tuple[str, Setting]  # kernel and setting


def tune(
    groups: Iterable[tuple[Group, Collection[Candidate]]],
    base: Table,
    clock: Clock,
    say: Callable[[str], None],
) -> Table:
    """Entries for fp16 and bf16 heads of these groups; ``base`` is what they start from.

    Args:
        groups: each with the candidates that compile.
        say: told what is being timed.
    """
    found: Table = {}
    for group, compiled in groups:
        for length, up_to in LONGEST.items():
            say(f"{group}, length {length}")
            for kernel, setting in _best(base, clock, group, length, compiled).items():
                for dtype in configs.HALF:
                    entry = found.setdefault(group.key(kernel, dtype), {})
                    if setting is not None:
                        entry[up_to] = setting
    return found


def _best(
    base: Table, clock: Clock, group: Group, length: int, compiled: Collection[Candidate]
) -> dict[str, Setting | None]:
    """kernel -> its fastest setting; None for the one-tile kernel where two are faster."""
    trial = dict(base)

    def fastest(kernel: str, candidates: Collection[Setting]) -> tuple[float, Setting | None]:
        """By the time of the whole pass, the other kernel's setting being what it is."""

        def seconds(setting: Setting, effort: tuple[int, int]) -> float:
            with configs.forced({**trial, group.key(kernel): {ANY: setting}}):
                which = "forward" if kernel == "forward" else "backward"
                return clock(which, group.head, group.dropout, length, effort)

        runs = {s: seconds(s, SCREEN) for s in candidates if (kernel, s) in compiled}
        limit = HOPELESS * min(runs.values(), default=0.0)
        timed = [(seconds(s, CAREFUL), s) for s, t in runs.items() if t <= limit and t < math.inf]
        return min(timed, default=(math.inf, None))

    trial[group.key("one_tile")] = {}
    chosen: dict[str, Setting | None] = {"one_tile": None}
    two_kernels = math.inf  # with the best dq and dkdv, when the last of them is chosen
    for kernel in ("forward", "dq", "dkdv"):
        two_kernels, setting = fastest(kernel, candidates_of(base, group.key(kernel)))
        if setting is None:  # nor the built-in one, so it is not the candidates' fault
            raise Invalid(f"{kernel} of {group} runs with no setting")
        trial[group.key(kernel)] = {ANY: setting}
        chosen[kernel] = setting
    if length in ONE_TILE:
        one_tile, setting = fastest("one_tile", ONE_TILE[length])
        if one_tile < two_kernels:
            chosen["one_tile"] = setting
    return chosen


def candidates_of(base: Table, key: Key) -> list[Setting]:
    """Of a kernel for every length, with what it starts from: one of those runs."""
    return list(dict.fromkeys((*CANDIDATES[key.kernel], *base[key].values())))


def gpu_clock(device: torch.device) -> Clock:
    """The median over readings of some launches, by CUDA events."""

    @lru_cache(maxsize=2)  # forward and backward of one length; the operands are large
    def made(which: str, head: int, dropout: bool, length: int) -> Callable[[], Any]:
        return _call(which, head, dropout, length, device)

    def clock(which: str, head: int, dropout: bool, length: int, effort: tuple[int, int]) -> float:
        readings, launches = effort
        call = made(which, head, dropout, length)
        try:
            call()  # loads the binary; warms up
        except Exception:  # noqa: BLE001  out of shared memory or registers: no candidate
            return math.inf
        found = []
        for _ in range(readings):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(launches):
                call()
            stop.record()
            stop.synchronize()
            found.append(start.elapsed_time(stop) / 1e3 / launches)
        return statistics.median(found)

    return clock


def _call(
    which: str,
    head: int,
    dropout: bool,
    length: int,
    device: torch.device,
    make: Callable[..., torch.Tensor] = torch.randn,
) -> Callable[[], Any]:
    """One pass over TOKENS tokens in sequences of one length."""
    shape = (TOKENS, MODEL_HEADS, head)
    q, k, v, grad = (make(shape, dtype=torch.bfloat16, device=device) for _ in range(4))
    layout = SequenceLayout.full(TOKENS // length, length, device)
    seed = torch.zeros(2, dtype=torch.int64, device=device)
    rate = DROPOUT if dropout else 0.0
    rest: tuple = (
        layout.cu_seqlens,
        layout.work,
        length,
        head**-0.5,
        "both",
        rate,
        seed if dropout else None,
        0,
        [],
    )
    if which == "forward":
        return lambda: attention.forward(q, k, v, *rest)
    out, lse, rng = attention.forward(q, k, v, *rest)
    return lambda: attention.backward(grad, q, k, v, out, lse, rng, *rest)


class Workers:
    """Processes that compile ahead, and validate at once what is found."""

    def __init__(self, count: int, arch: int) -> None:
        self._arch = arch
        self._pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin)

    @classmethod
    @contextmanager
    def of(cls, device: torch.device) -> Iterator[Workers]:
        major, minor = torch.cuda.get_device_capability(device)
        workers = cls(max(len(os.sched_getaffinity(0)) - LEFT_ALONE, 1), 10 * major + minor)
        try:
            yield workers
        finally:
            workers._pool.shutdown(cancel_futures=True)

    def compiled(
        self, groups: Collection[Group], base: Table, deadline: float, say: Callable[[str], None]
    ) -> Iterator[tuple[Group, set[Candidate]]]:
        """Each group, when its candidates are compiled, with those that can be; those that follow
        are being compiled meanwhile. None that is not ready at the deadline, of time.monotonic().
        """
        jobs = {group: self._jobs(group, base) for group in groups}
        for group, of_group in jobs.items():
            say(f"{group}: compiling {len(of_group)} candidates")
            left = deadline - time.monotonic()
            wait(of_group.values(), None if left == math.inf else max(left, 0.0))
            if time.monotonic() > deadline:
                break
            reasons = {candidate: future.result() for candidate, future in of_group.items()}
            for kernel in CANDIDATES:
                its = [reason for (name, _), reason in reasons.items() if name == kernel]
                if all(its):
                    raise Invalid(f"{kernel} of {group} compiles with no setting: {its[0]}")
            yield group, {candidate for candidate, reason in reasons.items() if not reason}
        for future in itertools.chain(*(of_group.values() for of_group in jobs.values())):
            future.cancel()

    def _jobs(self, group: Group, base: Table) -> dict[Candidate, Future]:
        listed = [
            (kernel, setting)
            for kernel in CANDIDATES
            for setting in candidates_of(base, group.key(kernel))
        ]
        listed += [("one_tile", setting) for setting in itertools.chain(*ONE_TILE.values())]
        return {
            (kernel, setting): self._pool.submit(compile_one, self._arch, group, kernel, setting)
            for kernel, setting in listed
        }

    def failed(self, found: Table, device: torch.device) -> list[Finding]:
        """What misses its budget under these settings, of the calls that they serve."""
        groups = {Group(key.head, key.dropout) for key in found}
        calls = [
            (dtype, label)
            for dtype in configs.HALF
            for label in CALLS["attention"]()
            if group_of(label) in groups
        ]
        jobs = [self._pool.submit(validate_one, found, device, *call) for call in calls]
        return [finding for job in jobs for finding in job.result() if not finding.passed]


def _begin() -> None:
    os.nice(POLITE)
    torch.set_num_threads(1)


def compile_one(arch: int, group: Group, kernel: str, setting: Setting) -> str:
    """Put a candidate's binary into Triton's cache; or say why it does not compile. Needs no GPU:
    operands like those that are timed, of which no number is read, and a stand-in for the driver.
    """
    from tinybert_fast.benchmarks.machine_code import compiling_for

    length = setting.block_m if kernel == "one_tile" else max(LONGEST)
    table = {
        group.key(name): {ANY: setting}
        for name in ("forward", "dq", "dkdv", *(["one_tile"] if kernel == "one_tile" else []))
    }
    which = "forward" if kernel == "forward" else "backward"
    cpu = torch.device("cpu")
    with compiling_for(arch, table, only=f"_{kernel}_kernel") as made:
        try:
            _call(which, *group, length, cpu, torch.empty)()
        except Exception as error:  # noqa: BLE001  whatever the compiler raises
            return f"{type(error).__name__}: {error}"
    return "" if made else "it is not launched"


def group_of(label: str) -> Group | None:
    """Whose settings serve a call of `validate`; None where they are the built-in ones."""
    width = re.search(r"heads of (\d+)", label)
    if width is None or "causal" in label or "mask" in label:
        return None
    return Group(max(configs.head_block(int(width[1])), min(configs.HEADS)), "dropout" in label)


def validate_one(
    found: Table, device: torch.device, dtype: torch.dtype, label: str
) -> list[Finding]:
    """Of one call under these settings."""
    with configs.forced({**configs.table(device), **found}):
        return list(validate(["attention"], device, [dtype], ["triton"], calls=[label]))


def tune_this_gpu(
    heads: Collection[int] = (),
    minutes: float | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[Path, list[dict[str, Any]]]:
    """Tune for heads of these widths (all by default), validate, write.

    Args:
        minutes: after which no further group is begun, in the order of ORDER.

    Returns:
        Where the file is, and a row per pass and length: microseconds before and after, settings.

    Raises:
        ValueError: a width that no tile has.
        Invalid: nothing is written.
    """
    heads = heads or configs.HEADS
    unknown = sorted(set(heads) - set(configs.HEADS))
    if unknown:
        raise ValueError(f"--head {unknown[0]} is not one of {', '.join(map(str, configs.HEADS))}")
    if minutes is not None and not minutes > 0:
        raise ValueError(f"--minutes {minutes:g}: more than 0")
    deadline = time.monotonic() + (math.inf if minutes is None else 60 * minutes)
    groups = [group for group in ORDER if group.head in heads]
    device = torch.device("cuda", torch.cuda.current_device())
    base, clock = configs.table(device), gpu_clock(device)
    try:
        with Workers.of(device) as workers:
            found = tune(workers.compiled(groups, base, deadline, say), base, clock, say)
            if not found:
                raise Invalid(f"no candidate was compiled within {minutes:g} minutes")
            say("validating")
            failed = workers.failed(found, device)
    except BrokenProcessPool as error:
        raise Invalid(f"a process that compiles or validates died: {error}") from error
    if failed:
        first = failed[0]
        raise Invalid(f"{first.dtype}, {first.call}: {first.problem or first.worst}")
    rows = [
        _row(which, group, length, base, found, clock)
        for group in groups
        for which in ("forward", "backward")
        for length in LONGEST
    ]
    write(torch.cuda.get_device_name(device), found)
    return settings.file(), rows


def _row(
    which: str, group: Group, length: int, base: Table, found: Table, clock: Clock
) -> dict[str, Any]:
    """What a pass takes before and after; empty where the time did not reach its group."""
    row: dict[str, Any] = {"pass": which, **group._asdict(), "length": length}
    if group.key("forward") not in found:
        return {**row, "before_us": "", "after_us": "", "settings": "built-in: no time was left"}
    for name, table in (("before_us", base), ("after_us", {**base, **found})):
        with configs.forced(table):
            row[name] = round(1e6 * clock(which, *group, length, CAREFUL), 1)
    one_tile = found[group.key("one_tile")].get(LONGEST[length])
    kernels = ("dq", "dkdv") if one_tile is None else ("one_tile",)
    row["settings"] = ", ".join(
        f"{kernel} {m} x {n}, {warps} warps, {stages} stages" + (f", {each} heads" * (each > 1))
        for kernel in (("forward",) if which == "forward" else kernels)
        for m, n, warps, stages, each in [found[group.key(kernel)][LONGEST[length]]]
    )
    return row


def write(gpu: str, found: Table) -> None:
    """Put the entries for a GPU of this name into the file; other GPUs' and other keys' stay."""
    file = settings.file()
    old, whole = {}, {}
    if file.exists():
        old, whole = settings.own(gpu), json.loads(file.read_text(encoding="utf-8"))
    whole[gpu] = settings.entries_of({**old, **found})
    atomic_write(file, json.dumps(whole, indent=1) + "\n")
