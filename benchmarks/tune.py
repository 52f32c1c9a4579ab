"""The fastest launch settings of the attention kernels on this GPU: `tinybert-fast bench --tune`.

For each head, dropout and length, each candidate is timed in the place of one kernel's setting, by
the GPU's clock, on bf16 operands that keep it busy for longer than a launch takes. fp16 has the
same tiles, and takes the same settings; directions and block masks keep the built-in ones. What
wins is validated before it is written.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from tinybert_fast.data.atomic import atomic_write
from tinybert_fast.kernels import attention, configs, settings
from tinybert_fast.kernels.settings import ANY, Key, Setting, Table
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.testing.validation import validate

TOKENS = 1 << 16
MODEL_HEADS = 12
DROPOUT = 0.1
LONGEST = {64: 64, 128: 128, 512: ANY}  # length that is timed -> up to which it then serves
STAGES = (1, 2, 3)
TILES = ((64, 32, 4), (64, 64, 4), (128, 64, 4), (128, 64, 8), (64, 128, 4), (64, 128, 8),
         (128, 128, 8))  # fmt: skip
CANDIDATES = [Setting(*tile, stages) for tile in TILES for stages in STAGES]
ONE_TILE = {
    64: [Setting(64, 64, warps, 1) for warps in (4, 8)],
    128: [Setting(128, 128, warps, 1) for warps in (4, 8, 16)],
}
LAUNCHES = 20  # between two readings of the clock
READINGS = 5


class Invalid(RuntimeError):
    """Attention fails validation under the settings found."""


# Seconds of one pass ("forward" or "backward") of a call, under the table in force.
Clock = Callable[[str, int, bool, int], float]


def tune(heads: Collection[int], base: Table, clock: Clock, say: Callable[[str], None]) -> Table:
    """Entries for fp16 and bf16 heads of these widths; ``base`` is what they start from.

    Args:
        clock: (pass, head, dropout, length) -> seconds, infinite where the setting cannot run.
        say: told what is being timed.
    """
    found: Table = {}
    for head, dropout, (length, up_to) in itertools.product(heads, (False, True), LONGEST.items()):
        say(f"heads of {head}, {'with' if dropout else 'no'} dropout, length {length}")
        for kernel, setting in _best(base, clock, head, dropout, length).items():
            for dtype in configs.HALF:
                entry = found.setdefault(Key(kernel, head, dtype, dropout), {})
                if setting is not None:
                    entry[up_to] = setting
    return found


def _best(
    base: Table, clock: Clock, head: int, dropout: bool, length: int
) -> dict[str, Setting | None]:
    """kernel -> its fastest setting; None for the one-tile kernel where two are faster."""
    trial = dict(base)

    def key(kernel: str) -> Key:
        return Key(kernel, head, torch.bfloat16, dropout)

    def fastest(kernel: str, candidates: list[Setting]) -> tuple[float, Setting]:
        """By the time of the whole pass, the other kernel's setting being what it is."""
        timed = []
        for setting in candidates:
            with configs.forced({**trial, key(kernel): {ANY: setting}}):
                which = "forward" if kernel == "forward" else "backward"
                timed.append((clock(which, head, dropout, length), setting))
        return min(timed)

    trial[key("one_tile")] = {}
    chosen: dict[str, Setting | None] = {"one_tile": None}
    for kernel in ("forward", "dq", "dkdv"):
        default = base[key(kernel)].values()  # so that one of them runs
        seconds, setting = fastest(kernel, [*CANDIDATES, *default])
        trial[key(kernel)] = {ANY: setting}
        if seconds == math.inf:  # the built-in one too, so it is not the setting's fault
            raise Invalid(f"{kernel} of heads of {head} runs with no setting")
        chosen[kernel] = setting
    if length in ONE_TILE:
        one_tile, setting = fastest("one_tile", ONE_TILE[length])
        if one_tile < seconds:  # the last one's: the whole backward with the best dq and dkdv
            chosen["one_tile"] = setting
    return chosen


def gpu_clock(device: torch.device) -> Clock:
    """The median over READINGS of LAUNCHES launches, by CUDA events."""

    def clock(which: str, head: int, dropout: bool, length: int) -> float:
        call = _call(which, head, dropout, length, device)
        try:
            call()  # compiles
        except Exception:  # noqa: BLE001  out of shared memory, or does not compile: no candidate
            return math.inf
        readings = []
        for _ in range(READINGS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(LAUNCHES):
                call()
            stop.record()
            stop.synchronize()
            readings.append(start.elapsed_time(stop) / 1e3 / LAUNCHES)
        return statistics.median(readings)

    return clock


def _call(
    which: str, head: int, dropout: bool, length: int, device: torch.device
) -> Callable[[], Any]:
    """One pass over TOKENS tokens in sequences of one length."""
    q, k, v, grad = (
        torch.randn(TOKENS, MODEL_HEADS, head, dtype=torch.bfloat16, device=device)
        for _ in range(4)
    )
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


def tune_this_gpu(
    heads: Collection[int] = (), say: Callable[[str], None] = lambda _: None
) -> tuple[Path, list[dict[str, Any]]]:
    """Tune for heads of these widths (all by default), validate, write.

    Returns:
        Where the file is, and a row per pass and length: microseconds before and after.

    Raises:
        ValueError: a width that no tile has.
        Invalid: nothing is written.
    """
    heads = heads or configs.HEADS
    unknown = sorted(set(heads) - set(configs.HEADS))
    if unknown:
        raise ValueError(f"--head {unknown[0]} is not one of {', '.join(map(str, configs.HEADS))}")
    device = torch.device("cuda", torch.cuda.current_device())
    base, clock = configs.table(device), gpu_clock(device)
    found = tune(heads, base, clock, say)
    say("validating")
    with configs.forced({**base, **found}):
        failed = [
            finding
            for finding in validate(["attention"], device, configs.HALF, ["triton"])
            if not finding.passed
        ]
    if failed:
        first = failed[0]
        raise Invalid(f"{first.dtype}, {first.call}: {first.problem or first.worst}")
    rows: list[dict[str, Any]] = [
        {"pass": which, "head": head, "dropout": dropout, "length": length}
        for which in ("forward", "backward")
        for head in heads
        for dropout in (False, True)
        for length in LONGEST
    ]
    for row in rows:
        for name, table in (("before_us", base), ("after_us", {**base, **found})):
            with configs.forced(table):
                seconds = clock(row["pass"], row["head"], row["dropout"], row["length"])
            row[name] = round(1e6 * seconds, 1)
    write(torch.cuda.get_device_name(device), found)
    return settings.file(), rows


def write(gpu: str, found: Table) -> None:
    """Put the entries for a GPU of this name into the file; other GPUs' and other keys' stay."""
    file = settings.file()
    merged = {**settings.own(gpu), **found}
    whole = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    whole[gpu] = settings.entries_of(merged)
    atomic_write(file, json.dumps(whole, indent=1) + "\n")
