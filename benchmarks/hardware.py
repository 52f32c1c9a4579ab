"""Where and with what a row was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import tinybert_fast
from tinybert_fast.allocator import keeps_freed_memory
from tinybert_fast.benchmarks.clocks import Clock

Fact = str | int
# Rows, inner size and columns of the product: on a CPU BERT-base's largest of 2,048 tokens, on a
# GPU one that fills it.
MATMUL = {"cpu": (2048, 768, 3072), "cuda": (8192, 8192, 8192)}
COPIED = {"cpu": 1 << 28, "cuda": 1 << 32}  # bytes, many times the caches
CEILING_RUNS = 5
CODE = (":/", ":(top,exclude)benchmarks/results", ":(top,exclude)*.md")  # as git's pathspecs


def facts(device: torch.device) -> dict[str, Fact]:
    """The hardware and version columns of a row, threads as they are set now."""
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "cpu": cpu_model(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "allocator": "keeps" if keeps_freed_memory() else "system",
        "gpu": torch.cuda.get_device_name(device) if cuda else "none",
        "driver": _driver() if cuda else "none",
        "bf16_hardware": "yes" if has_bf16(device) else "no",
        "tinybert_fast": tinybert_fast.__version__,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda) if cuda else "none",
        "cudnn": str(torch.backends.cudnn.version()) if cuda else "none",
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 products run as instructions; without them a CPU computes them much slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() in ("x86_64", "AMD64"):  # oneDNN's answer is yes from AVX-512 on
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def matmul_gflops(device: torch.device, dtype: torch.dtype) -> float:
    """The machine's ceiling of arithmetic: GFLOP/s of one large product (MATMUL) of normal numbers,
    the best of CEILING_RUNS."""
    rows, inner, columns = MATMUL[device.type]
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    weight = torch.randn(columns, inner, device=device, dtype=dtype)
    seconds = _best(device, lambda: torch.nn.functional.linear(x, weight))
    return 2e-9 * rows * inner * columns / seconds


def copy_gbytes(device: torch.device) -> float:
    """The machine's ceiling of traffic: GB/s read and written by one large copy (COPIED)."""
    source = torch.ones(COPIED[device.type] // 4, device=device)
    target = torch.empty_like(source)
    seconds = _best(device, lambda: target.copy_(source))
    return 2e-9 * COPIED[device.type] / seconds


def _best(device: torch.device, call: Callable[[], object]) -> float:
    clock = Clock(device)
    return min(clock(call) for _ in range(CEILING_RUNS))


def usable_cores() -> int:
    """Cores that this process may use, as a container or taskset leaves them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def commit() -> str:
    """Of the checkout this code runs from, "+" when it has changes; "none" outside a checkout.

    New rows in results/, and what the pages say of them, are none.
    """
    here = Path(__file__).resolve()
    try:
        # Only if git knows this file: an installed copy may lie inside somebody else's checkout.
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        head = _git(here.parent, "rev-parse", "--short=12", "HEAD")
        changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no", "--", *CODE)
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return head + ("+" if changed else "")


@cache
def _driver() -> str:
    """As nvidia-smi says it; "unknown" without it."""
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.split()[0]


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
