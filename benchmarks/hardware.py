"""Where and with what a row was measured."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import tinybert_fast

Fact = str | int
MATMUL = (2048, 768, 3072)  # tokens, BERT-base's width, its FFN's
MATMUL_RUNS = 5


def facts(device: torch.device) -> dict[str, Fact]:
    """The hardware and version columns of a row, threads as they are set now."""
    cuda = device.type == "cuda"
    return {
        "device": device.type,
        "cpu": cpu_model(),
        "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if cuda else "none",
        "bf16_hardware": "yes" if has_bf16(device) else "no",
        "tinybert_fast": tinybert_fast.__version__,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda) if cuda else "none",
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
    """What the machine gives BERT's largest product, the ceiling of a step: GFLOP/s, the best of
    MATMUL_RUNS of (2048, 768) by (768, 3072)."""
    rows, inner, columns = MATMUL
    x = torch.randn(rows, inner, device=device, dtype=dtype)
    weight = torch.randn(columns, inner, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(MATMUL_RUNS):
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2e-9 * rows * inner * columns / best


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
    """Of the checkout this code runs from, "+" when it has changes; "none" outside a checkout."""
    here = Path(__file__).resolve()
    try:
        # Only if git knows this file: an installed copy may lie inside somebody else's checkout.
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        head = _git(here.parent, "rev-parse", "--short=12", "HEAD")
        changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "none"
    return head + ("+" if changed else "")


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
