"""Peak bytes that a call holds beyond what was alive before it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The profiler writes its stages to stderr; it reads this once, at its first use.
QUIET = ("KINETO_LOG_LEVEL", "99")


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Largest sum of live allocations during ``call``, counted from its start.

    Exact on the CPU: every allocation and release of PyTorch's allocator, temporaries inside
    operators included (scratch that a BLAS library takes for itself is not PyTorch's and not seen).
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault(*QUIET)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    live = peak = 0
    events = recorded.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    for _, change in sorted(changes, key=lambda at: at[0]):
        live += change
        peak = max(peak, live)
    return peak
