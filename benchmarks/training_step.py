"""A whole training step as a provider: forward, loss, backward, AdamW update."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
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

    def choose(self, dtype: str, setting: Any) -> None:
        self._chosen[dtype] = setting

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        if len(self.settings) == 1:
            return  # and below no update: the checks that follow need equal weights on all sides
        taken = {}
        for setting in self.settings:
            self._chosen[dtype] = setting
            try:
                taken[setting] = seconds(lambda: self._gradients("timed", dtype))
            except torch.OutOfMemoryError as error:
                print(f"{self.name}, {setting}: {one_line(error)}", file=sys.stderr)
            self.optimizer.zero_grad(set_to_none=True)
        if not taken:
            raise Unavailable("no setting fits into the memory")
        self._chosen[dtype] = min(taken, key=taken.__getitem__)

    def setting(self, dtype: str) -> str:
        return str(self._setting(dtype))

    def run(self, dtype: str) -> None:
        self._gradients("timed", dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def outcome(self, what: str, dtype: str) -> Outcome:
        set_dropout(self.trained, 0.0)
        try:
            loss = self._gradients(what, dtype)
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
        return self._chosen.get(dtype, self._chosen.get("fp32", self.settings[-1]))

    def _batch(self, what: str, dtype: str) -> Any:
        key = what, self._setting(dtype)
        if key not in self._prepared:
            self._prepared[key] = self.prepare(self.batches[what], key[1])
        return self._prepared[key]


class GraphedStep:
    """The whole step of another provider, its update included, as one CUDA graph that is replayed.

    ``tune`` captures every setting of the step and keeps the fastest; the weights are then put
    back, so that the checks find equal ones on all sides. The checks, and peak memory, are those of
    the same step before its capture: a graph holds the memory of a whole step all the time.
    """

    def __init__(self, name: str, step: TrainingStep) -> None:
        self.name = self.role = name
        self.step = step
        step.optimizer = adamw(step.trained, capturable=step.device.type == "cuda")
        self._graphs: dict[str, Replay] = {}

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        weights = [p.detach().clone() for p in self.step.trained.parameters()]
        best: tuple[float, Any] | None = None
        reasons = []
        for setting in self.step.settings:
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
        with torch.no_grad():
            for p, before in zip(self.step.trained.parameters(), weights, strict=True):
                p.copy_(before)
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
        return self.step.outcome(what, dtype)


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
    """A frozen model as each dtype wants it: other than in fp32 as DistillationTrainer has it."""

    def __init__(self, model: nn.Module) -> None:
        self._models: dict[str, Any] = {"fp32": model.eval().requires_grad_(False)}

    def __call__(self, dtype: str) -> Any:
        if dtype not in self._models:
            convert: Any = CONVERT[dtype]  # type: ignore[index]
            self._models[dtype] = join_projections(convert(sharing(self._models["fp32"])))
        return self._models[dtype]
