"""A loss of some operands, forward and backward, as a provider."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tinybert_fast.benchmarks.case import DTYPES, Outcome

Loss = Callable[..., Tensor]


class LossCall:
    """``losses``: by what setting() says; tune() keeps the fastest. The first ``trained`` operands
    get gradients. All that are floating point are cast to the dtype at hand.
    """

    def __init__(
        self,
        name: str,
        role: str,
        losses: dict[str, Loss] | Loss,
        operands: tuple[Tensor, ...],
        trained: int,
    ) -> None:
        self.name, self.role = name, role
        self.losses = losses if isinstance(losses, dict) else {"": losses}
        self.operands, self.trained = operands, trained
        self._cast: dict[str, list[Tensor]] = {}
        self._chosen: dict[str, str] = {}

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        if len(self.losses) == 1:
            return
        times = {}
        for setting in self.losses:
            self._chosen[dtype] = setting
            self.run(dtype)
            times[setting] = seconds(lambda: self.run(dtype))
        self._chosen[dtype] = min(times, key=lambda setting: times[setting])

    def setting(self, dtype: str) -> str:
        return self._chosen.get(dtype, next(iter(self.losses)))

    def run(self, dtype: str) -> None:
        self._gradients(dtype)

    def outcome(self, what: str, dtype: str) -> Outcome:
        loss, gradients = self._gradients(dtype)
        return Outcome(float(loss), {str(i): g for i, g in enumerate(gradients)})

    def _gradients(self, dtype: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        if dtype not in self._cast:
            self._cast[dtype] = [
                x.to(DTYPES[dtype]) if x.is_floating_point() else x for x in self.operands
            ]
            for x in self._cast[dtype][: self.trained]:
                x.requires_grad_()
        operands = self._cast[dtype]
        loss = self.losses[self.setting(dtype)](*operands)
        return loss.detach(), torch.autograd.grad(loss, operands[: self.trained])
