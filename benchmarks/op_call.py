"""One call of an op as a provider: its forward, its backward, or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tinybert_fast.benchmarks.case import DTYPES, Case, Outcome

Op = Callable[..., Tensor]
SEED = 1  # of the gradients that come in


class OpCall:
    """``ops``: by what setting() says; tune() keeps the fastest. The first ``trained`` operands get
    gradients; all that are floating point are cast to the dtype at hand.

    An op with dropout is also given ``dropout_p=``: ``dropout`` while timed, 0 when its values are
    checked. The gradient that comes in is 1 for a scalar, normal numbers for any other result.
    """

    def __init__(
        self,
        name: str,
        role: str,
        ops: dict[str, Op] | Op,
        operands: tuple[Tensor, ...],
        trained: int,
        dropout: float | None = None,
    ) -> None:
        self.name, self.role, self.phase = name, role, "both"
        self.ops = ops if isinstance(ops, dict) else {"": ops}
        self.operands, self.trained, self.dropout = operands, trained, dropout
        self._cast: dict[str, list[Tensor]] = {}
        self._chosen: dict[str, str] = {}
        self._incoming: dict[str, Tensor] = {}
        self._result: tuple[str, Tensor] | None = None  # setting and what it gave, for "backward"

    def of(self, phase: str) -> OpCall:
        """The same op on the same operands, for another pass."""
        other = OpCall(self.name, self.role, self.ops, self.operands, self.trained, self.dropout)
        other.phase, other._cast, other._incoming = phase, self._cast, self._incoming
        return other

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        if len(self.ops) == 1:
            return
        times = {}
        for setting in self.ops:
            self._chosen[dtype] = setting
            self.run(dtype)
            times[setting] = seconds(lambda: self.run(dtype))
        self._chosen[dtype] = min(times, key=times.__getitem__)
        self._result = None

    def setting(self, dtype: str) -> str:
        return self._chosen.get(dtype, next(iter(self.ops)))

    def run(self, dtype: str) -> None:
        operands = self._operands(dtype)
        if self.phase != "backward":
            result = self._call(dtype, self.dropout)
        else:
            key = f"{dtype} {self.setting(dtype)}"
            if self._result is None or self._result[0] != key:
                self._result = key, self._call(dtype, self.dropout)
            result = self._result[1]
        if self.phase != "forward":
            self._gradients(dtype, result, operands, retain_graph=self.phase == "backward")

    def outcome(self, what: str, dtype: str) -> Outcome:
        operands = self._operands(dtype)
        result = self._call(dtype, 0.0)
        found = dict(enumerate(self._gradients(dtype, result, operands)))
        loss = result.detach()
        if loss.dim():
            found[-1] = loss
            loss = torch.linalg.vector_norm(loss.double())
        return Outcome(float(loss), {str(i): x for i, x in found.items()})

    def _call(self, dtype: str, dropout: float | None) -> Tensor:
        options = {} if self.dropout is None else {"dropout_p": dropout}
        return self.ops[self.setting(dtype)](*self._operands(dtype), **options)

    def _gradients(
        self, dtype: str, result: Tensor, operands: list[Tensor], *, retain_graph: bool = False
    ) -> tuple[Tensor, ...]:
        incoming = None
        if result.dim():
            if dtype not in self._incoming:
                generator = torch.Generator().manual_seed(SEED)
                drawn = torch.randn(result.shape, generator=generator)
                self._incoming[dtype] = drawn.to(result.device, result.dtype)
            incoming = self._incoming[dtype]
        return torch.autograd.grad(
            result, operands[: self.trained], incoming, retain_graph=retain_graph
        )

    def _operands(self, dtype: str) -> list[Tensor]:
        if dtype not in self._cast:
            self._cast[dtype] = [
                x.to(DTYPES[dtype]) if x.is_floating_point() else x for x in self.operands
            ]
            for x in self._cast[dtype][: self.trained]:
                x.requires_grad_()
        return self._cast[dtype]


def passes(case: Case, *phases: str) -> Iterator[Case]:
    """The case once for each of these passes ("forward", "backward", "both")."""
    for phase in phases:
        providers = [provider.of(phase) for provider in case.providers]
        yield replace(case, phase=phase, providers=providers)
