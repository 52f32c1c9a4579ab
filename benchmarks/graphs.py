"""Calls as one CUDA graph: what the GPU needs for them, launches left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3


class Replay:
    """``run`` replays what ``call`` launched when it was captured.

    Raises:
        RuntimeError: the call cannot be captured: it reads the device, or copies from the host.
    """

    def __init__(self, call: Callable[[], Any]) -> None:
        # The current one, as a backward runs where its forward ran; graphs forbid the default one.
        stream = torch.cuda.current_stream()
        for _ in range(WARM_UP):
            call()
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            call()

    def run(self, dtype: str) -> None:
        self._graph.replay()
