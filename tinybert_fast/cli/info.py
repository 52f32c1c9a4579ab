"""What this process can run: facts for ``tinybert-fast info``."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import tinybert_fast
import tinybert_fast.ops  # registers the ops
from tinybert_fast.ops.dispatch import FASTEST_FIRST, OPS

PACKAGES = ("torch", "transformers", "triton", "datasets", "accelerate")


def gather() -> dict[str, Any]:
    """{"machine": facts, "implementations": names, "ops": {op: {"auto": name, name: why not}}}."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probe = torch.empty(0, device=device)
    ops = {}
    for name, limits in sorted(OPS.items()):
        why = {impl: limits.refusal(impl, probe, {}) for impl in FASTEST_FIRST}
        ops[name] = {"auto": next(i for i in FASTEST_FIRST if why[i] is None), **why}
    return {
        "machine": {
            "tinybert_fast": tinybert_fast.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        },
        "implementations": list(FASTEST_FIRST),
        "ops": ops,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
