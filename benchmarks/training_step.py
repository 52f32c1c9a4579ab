"""A whole training step as a provider: forward, loss, backward, AdamW update."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinybert_fast.benchmarks.batches import Batch
from tinybert_fast.benchmarks.case import Outcome, Unavailable, autocast, one_line
from tinybert_fast.benchmarks.graphs import Replay
from tinybert_fast.training.teacher import CONVERT, join_projections

OPTIMIZER = "adamw_fused"
LEARNING_RATE = (
    1e-5  # small: after a whole run the weights still look like the ones that were checked
)


OTHER_WEIGHTS = 0.5  # times the true ones: what the graph of a check is captured at
REPLAYS = 2  # of it: the second reads what the first left


class TrainingStep:
    """Subclasses say how the loss is computed; the update is the same fused AdamW for all.

    ``trained``: what the optimizer updates, with parameter names that all providers share.
    ``batches``: the timed batch under "timed", and those of the checks under their names.
    """

    name: str
    role: str
    settings: tuple[Any, ...] = ("",)  # what `tune` may choose from

    def __init__(self, trained: nn.Module, batches: dict[str, Batch], dropout: float) -> None:
        self.trained = trained.train()
        self.batches, self.dropout = batches, dropout
        self.device = next(trained.parameters()).device
        self.optimizer = adamw(trained)
        self._chosen: dict[str, Any] = {}
        self._prepared: dict[Any, Any] = {}

    def prepare(self, batch: Batch, setting: Any) -> Any:
        """What a data loader would do: not timed."""
        return batch

    def backward(self, batch: Any, dtype: str, setting: Any) -> Tensor:
        """Accumulate the gradients of the loss of a prepared batch; returns the loss, detached."""
        raise NotImplementedError

    def autocast(self, dtype: str) -> Any:
        return autocast(self.device, dtype)

    def serves(self, setting: Any, dtype: str) -> bool:
        """Whether a setting is one for this device and dtype."""
        return True

    def offered(self, dtype: str) -> tuple[Any, ...]:
        return tuple(setting for setting in self.settings if self.serves(setting, dtype))

    def choose(self, dtype: str, setting: Any) -> None:
        self._chosen[dtype] = setting

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        offered = self.offered(dtype)
        if len(offered) == 1:
            self.choose(dtype, offered[0])
            return  # and below no update: the checks that follow need equal weights on all sides
        taken, reasons = {}, []
        for setting in offered:
            self.choose(dtype, setting)
            try:
                taken[setting] = seconds(lambda: self._gradients("timed", dtype))
            except RuntimeError as error:  # too large, or nothing in this PyTorch runs it
                reasons.append(f"{self.name}, {self.setting(dtype)}: {one_line(error)}")
                print(reasons[-1], file=sys.stderr)
            self.optimizer.zero_grad(set_to_none=True)
        if not taken:
            raise Unavailable("; ".join(reasons))
        self.choose(dtype, min(taken, key=taken.__getitem__))

    def setting(self, dtype: str) -> str:
        return str(self._setting(dtype))

    def run(self, dtype: str) -> None:
        self._gradients("timed", dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def outcome(
        self, what: str, dtype: str, through: Callable[[Callable[[], Tensor]], Tensor] | None = None
    ) -> Outcome:
        """``through``: calls what it is given, or does the same by other means; gradients are left
        and the loss is returned as by the call."""
        call = partial(self._gradients, what, dtype)
        set_dropout(self.trained, 0.0)
        try:
            loss = call() if through is None else through(call)
        finally:
            set_dropout(self.trained, self.dropout)
        gradients = {
            name: p.grad for name, p in self.trained.named_parameters() if p.grad is not None
        }
        self.optimizer.zero_grad(set_to_none=True)
        return Outcome(float(loss), gradients)

    def _gradients(self, what: str, dtype: str) -> Tensor:
        return self.backward(self._batch(what, dtype), dtype, self._setting(dtype))

    def _setting(self, dtype: str) -> Any:
        return self._chosen.get(dtype, self._chosen.get("fp32", self.offered("fp32")[-1]))

    def _batch(self, what: str, dtype: str) -> Any:
        key = what, self._setting(dtype)
        if key not in self._prepared:
            self._prepared[key] = self.prepare(self.batches[what], key[1])
        return self._prepared[key]


class GraphedStep:
    """The whole step of another provider, its update included, as one CUDA graph that is replayed.

    ``tune`` captures every setting of the step and keeps the fastest; the weights are then put
    back, so that the checks find equal ones on all sides. The checks replay a graph of their own,
    of loss and gradients at dropout 0. Peak memory is that of the step before its capture: a graph
    holds the memory of a whole step all the time.
    """

    def __init__(self, name: str, step: TrainingStep) -> None:
        self.name = self.role = name
        self.step = step
        step.optimizer = adamw(step.trained, capturable=step.device.type == "cuda")
        self._graphs: dict[str, Replay] = {}

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        best: tuple[float, Any] | None = None
        reasons = []
        with self._weights_put_back():
            for setting in self.step.offered(dtype):
                self.step.choose(dtype, setting)
                try:
                    graph = Replay(partial(self.step.run, dtype))
                    taken = seconds(partial(graph.run, dtype))
                except Exception as error:  # noqa: BLE001  of the capture, memory or a compiler
                    self.step.optimizer.zero_grad(set_to_none=True)
                    reasons.append(f"{self.step.setting(dtype) or 'capture'}: {one_line(error)}")
                    continue
                if best is None or taken < best[0]:
                    best, self._graphs[dtype] = (taken, setting), graph
                del graph
        if best is None:
            raise Unavailable("; ".join(reasons))
        if reasons:
            print(f"{self.name} {dtype}, left out: {'; '.join(reasons)}", file=sys.stderr)
        self.step.choose(dtype, best[1])

    def setting(self, dtype: str) -> str:
        return self.step.setting(dtype)

    def run(self, dtype: str) -> None:
        if dtype not in self._graphs:  # emulated, so not tuned for
            self._graphs[dtype] = Replay(partial(self.step.run, dtype))
        self._graphs[dtype].run(dtype)

    def run_uncaptured(self, dtype: str) -> None:
        self.step.run(dtype)

    def outcome(self, what: str, dtype: str) -> Outcome:
        return self.step.outcome(what, dtype, partial(self._replayed, dtype))

    def _replayed(self, dtype: str, gradients: Callable[[], Tensor]) -> Tensor:
        """Captured at other weights than it is replayed at, and its results spoilt before each
        replay: work that the graph lacks, and numbers made of weights outside of it, show."""
        found: list[Tensor] = []

        def call() -> None:
            self.step.optimizer.zero_grad(set_to_none=True)  # so that gradients are written anew
            found[:] = [gradients()]

        trained: list[Tensor] = list(self.step.trained.parameters())
        with self._weights_put_back():
            with torch.no_grad():
                torch._foreach_mul_(trained, OTHER_WEIGHTS)
            graph = Replay(call)
        for _ in range(REPLAYS):
            for result in (*found, *(p.grad for p in trained if p.grad is not None)):
                result.fill_(math.nan)
            graph.run(dtype)
        return found[0]

    @contextmanager
    def _weights_put_back(self) -> Iterator[None]:
        trained: list[Tensor] = list(self.step.trained.parameters())
        weights = [p.detach().clone() for p in trained]
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(trained, weights)


def adamw(trained: nn.Module, *, capturable: bool = False) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        trained.parameters(), lr=LEARNING_RATE, fused=True, capturable=capturable
    )


def set_dropout(model: nn.Module, p: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def sharing(model: nn.Module) -> Any:
    """A copy of the modules over the same Parameters: frozen weights lie in memory once."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


class Teacher:
    """A frozen model as each dtype wants it: other than in fp32 as DistillationTrainer has it, or
    what ``convert`` makes of a copy that shares its Parameters."""

    def __init__(
        self, model: nn.Module, convert: Mapping[Any, Callable[[Any], Any]] = CONVERT
    ) -> None:
        self._convert = convert
        self._models: dict[str, Any] = {"fp32": model.eval().requires_grad_(False)}

    def __call__(self, dtype: str) -> Any:
        if dtype not in self._models:
            made = self._convert[dtype](sharing(self._models["fp32"]))
            self._models[dtype] = join_projections(made)
        return self._models[dtype]
