"""One call of an op as a provider: its forward, its backward, or both."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import chain
from math import ceil
from typing import Any

import torch
from torch import Tensor

from tinybert_fast.benchmarks.case import DTYPES, Case, Outcome, Provider

Op = Callable[..., Tensor]
SEED = 1  # of the gradients that come in
CACHES = {"cpu": 32 << 20, "cuda": 64 << 20}  # bytes that a last-level cache has, about
MOST_SETS = 10


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
        self._cast: dict[str, list[list[Tensor]]] = {}
        self._chosen: dict[str, str] = {}
        self._incoming: dict[str, Tensor] = {}
        self._runs = 0
        # For "backward": what the forward of a dtype, setting and set of operands gave.
        self._results: dict[tuple[str, str, int], Tensor] = {}

    def of(self, phase: str) -> OpCall:
        """The same op on the same operands, for another pass."""
        other = copy(self)  # the operands that are cast already included
        other.phase, other._chosen, other._results = phase, {}, {}
        return other

    def by(self, impl: str) -> OpCall:
        """The same op, if it is one of ours, by an implementation: a provider of that name."""
        other = self.of(self.phase)
        other.name = other.role = impl
        other._cast = {}
        other.ops = {name: partial(op, impl=impl) for name, op in self.ops.items()}
        return other

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        if len(self.ops) == 1:
            return

        def choose(setting: str) -> None:
            self._chosen[dtype] = setting

        fastest(self, dtype, tuple(self.ops), choose, seconds)
        self.forget()

    def forget(self) -> None:
        """Forwards that were kept for their backward."""
        self._results = {}

    def setting(self, dtype: str) -> str:
        return self._setting(dtype)

    def _setting(self, dtype: str) -> str:
        return self._chosen.get(dtype, next(iter(self.ops)))

    def run(self, dtype: str) -> None:
        sets = self._sets(dtype)
        turn = self._runs % len(sets)
        self._runs += 1
        if self.phase != "backward":
            result = self._call(dtype, self.dropout, sets[turn])
        else:
            key = dtype, self._setting(dtype), turn
            if key not in self._results:
                self._results[key] = self._call(dtype, self.dropout, sets[turn])
            result = self._results[key]
        if self.phase != "forward":
            self._gradients(dtype, result, sets[turn], retain_graph=self.phase == "backward")

    def outcome(self, what: str, dtype: str) -> Outcome:
        operands = self._sets(dtype)[0]
        result = self._call(dtype, 0.0, operands)
        gradients = self._gradients(dtype, result, operands)
        found = {str(i): self.compared(x) for i, x in enumerate(gradients)}
        result = result.detach()
        return Outcome(self.compared(result) if result.dim() else float(result), found)

    def _call(self, dtype: str, dropout: float | None, operands: list[Tensor]) -> Tensor:
        options = {} if self.dropout is None else {"dropout_p": dropout}
        return self.ops[self._setting(dtype)](*operands, **options)

    def _gradients(
        self, dtype: str, result: Tensor, operands: list[Tensor], *, retain_graph: bool = False
    ) -> tuple[Tensor, ...]:
        if self.trained == 0:
            return ()
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

    def _sets(self, dtype: str) -> list[list[Tensor]]:
        """Copies of the operands that runs take in turn, so many that none finds its own in a cache
        from the time before, nor those of another provider."""
        if dtype not in self._cast:
            cast = [x.to(DTYPES[dtype]) if x.is_floating_point() else x for x in self.operands]
            size = max(1, sum(x.nbytes for x in cast))
            count = min(MOST_SETS, ceil(CACHES[cast[0].device.type] / size) + 1)
            self._cast[dtype] = [[_copy(x) for x in cast] for _ in range(count)]
            for x in chain.from_iterable(one[: self.trained] for one in self._cast[dtype]):
                x.requires_grad_()
        return self._cast[dtype]


class BehindLinear(OpCall):
    """``ops`` without the bias that is the second operand: what a linear layer gives has it, and so
    has the first operand before anything is timed. The backward adds up the bias's gradient over
    rows, as the layer's does."""

    def __init__(
        self, name: str, role: str, ops: Op, operands: tuple[Tensor, ...], *more: Any
    ) -> None:
        x, bias, *others = operands
        super().__init__(name, role, ops, (x + bias, bias, *others), *more)

    def _call(self, dtype: str, dropout: float | None, operands: list[Tensor]) -> Tensor:
        x, _, *others = operands
        return super()._call(dtype, dropout, [x, *others])

    def _gradients(
        self, dtype: str, result: Tensor, operands: list[Tensor], **how: bool
    ) -> tuple[Tensor, ...]:
        x, _, *others = operands
        of_x, *of_others = super()._gradients(dtype, result, [x, *others], **how)
        return of_x, of_x.sum(0), *of_others


def _copy(x: Tensor) -> Tensor:
    """With its strides, where ``clone`` would pack what has gaps."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


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
            call.forget()

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
