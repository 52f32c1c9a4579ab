"""One call of an op as a provider: its forward, its backward, or both."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tinybert_fast.benchmarks.case import DTYPES, Case, Outcome, Provider

Op = Callable[..., Tensor]
SEED = 1  # of the gradients that come in


class OpCall:
    """``ops``: by what setting() says; tune() keeps the fastest. The first ``trained`` operands get
    gradients; all that are floating point are cast to the dtype at hand.

    An op with dropout is also given ``dropout_p=``: ``dropout`` while timed, 0 when its values are
    checked. The gradient that comes in is 1 for a scalar, ``incoming`` or else normal numbers for
    any other result. ``compared`` brings result and gradients into the form that all providers of
    a case share.
    """

    def __init__(
        self,
        name: str,
        role: str,
        ops: dict[str, Op] | Op,
        operands: tuple[Tensor, ...],
        trained: int,
        dropout: float | None = None,
        *,
        incoming: Tensor | None = None,
        compared: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> None:
        self.name, self.role, self.phase = name, role, "both"
        self.ops = ops if isinstance(ops, dict) else {"": ops}
        self.operands, self.trained, self.dropout = operands, trained, dropout
        self.incoming, self.compared = incoming, compared
        self._cast: dict[str, list[Tensor]] = {}
        self._chosen: dict[str, str] = {}
        self._incoming: dict[str, Tensor] = {}
        self._result: tuple[str, Tensor] | None = None  # setting and what it gave, for "backward"

    def of(self, phase: str) -> OpCall:
        """The same op on the same operands, for another pass."""
        other = copy(self)  # the operands that are cast already included
        other.phase, other._chosen, other._result = phase, {}, None
        return other

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        if len(self.ops) == 1:
            return

        def choose(setting: str) -> None:
            self._chosen[dtype] = setting

        fastest(self, dtype, tuple(self.ops), choose, seconds)
        self._result = None

    def setting(self, dtype: str) -> str:
        return self._setting(dtype)

    def _setting(self, dtype: str) -> str:
        return self._chosen.get(dtype, next(iter(self.ops)))

    def run(self, dtype: str) -> None:
        operands = self._operands(dtype)
        if self.phase != "backward":
            result = self._call(dtype, self.dropout)
        else:
            key = f"{dtype} {self._setting(dtype)}"
            if self._result is None or self._result[0] != key:
                self._result = key, self._call(dtype, self.dropout)
            result = self._result[1]
        if self.phase != "forward":
            self._gradients(dtype, result, operands, retain_graph=self.phase == "backward")

    def outcome(self, what: str, dtype: str) -> Outcome:
        operands = self._operands(dtype)
        result = self._call(dtype, 0.0)
        gradients = self._gradients(dtype, result, operands)
        found = {str(i): self.compared(x) for i, x in enumerate(gradients)}
        result = result.detach()
        return Outcome(self.compared(result) if result.dim() else float(result), found)

    def _call(self, dtype: str, dropout: float | None) -> Tensor:
        options = {} if self.dropout is None else {"dropout_p": dropout}
        return self.ops[self._setting(dtype)](*self._operands(dtype), **options)

    def _gradients(
        self, dtype: str, result: Tensor, operands: list[Tensor], *, retain_graph: bool = False
    ) -> tuple[Tensor, ...]:
        incoming = None
        if result.dim():
            if dtype not in self._incoming:
                drawn = self.incoming
                if drawn is None:
                    generator = torch.Generator(result.device).manual_seed(SEED)
                    drawn = torch.randn(result.shape, generator=generator, device=result.device)
                self._incoming[dtype] = drawn.to(result.dtype)
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


class Fastest:
    """The fastest of several calls, by their names; each has operands of its own."""

    def __init__(self, name: str, role: str, calls: dict[str, OpCall]) -> None:
        self.name, self.role, self.calls = name, role, calls
        self._chosen: dict[str, str] = {}

    def of(self, phase: str) -> Fastest:
        return Fastest(self.name, self.role, {n: call.of(phase) for n, call in self.calls.items()})

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        def choose(name: str) -> None:
            self._chosen[dtype] = name
            self._call(dtype).tune(dtype, seconds)

        fastest(self, dtype, tuple(self.calls), choose, seconds)
        for call in self.calls.values():
            call._result = None  # and what it has saved for its backward

    def setting(self, dtype: str) -> str:
        chosen = self._call(dtype)
        return ", ".join(filter(None, (self._name(dtype), chosen.setting(dtype))))

    def run(self, dtype: str) -> None:
        self._call(dtype).run(dtype)

    def outcome(self, what: str, dtype: str) -> Outcome:
        return self._call(dtype).outcome(what, dtype)

    def _name(self, dtype: str) -> str:
        return self._chosen.get(dtype, next(iter(self.calls)))

    def _call(self, dtype: str) -> OpCall:
        return self.calls[self._name(dtype)]


def fastest(
    provider: Provider,
    dtype: str,
    settings: tuple[str, ...],
    choose: Callable[[str], None],
    seconds: Callable[[Callable[[], Any]], float],
) -> None:
    """Choose the setting that runs in the least time, of those that PyTorch runs at all.

    Raises:
        RuntimeError: it runs none; the last one's reason.
    """
    times: dict[str, float] = {}
    refusal: RuntimeError | None = None
    for setting in settings:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # why a fused kernel does not serve
                choose(setting)
                provider.run(dtype)
                times[setting] = seconds(lambda: provider.run(dtype))
        except RuntimeError as error:
            refusal = error
    if not times:
        assert refusal is not None
        raise refusal
    choose(min(times, key=times.__getitem__))


def passes(case: Case, *phases: str) -> Iterator[Case]:
    """The case once for each of these passes ("forward", "backward", "both")."""
    for phase in phases:
        providers = [provider.of(phase) for provider in case.providers]
        yield replace(case, phase=phase, providers=providers)
