"""A whole training step as a provider: forward, loss, backward, AdamW update."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tinybert_fast.benchmarks.batches import Batch
from tinybert_fast.benchmarks.case import Outcome, autocast
from tinybert_fast.training.teacher import bf16_linears

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
        self.optimizer = torch.optim.AdamW(trained.parameters(), lr=LEARNING_RATE, fused=True)
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

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        if len(self.settings) == 1:
            return  # and below no update: the checks that follow need equal weights on all sides
        taken = {}
        for setting in self.settings:
            self._chosen[dtype] = setting
            taken[setting] = seconds(lambda: self._gradients("timed", dtype))
            self.optimizer.zero_grad(set_to_none=True)
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


def set_dropout(model: nn.Module, p: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p


def sharing(model: nn.Module) -> Any:
    """A copy of the modules over the same Parameters: frozen weights lie in memory once."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


class Teacher:
    """A frozen model as each dtype wants it: in bf16 as the product's `bf16_linears` has it."""

    def __init__(self, model: nn.Module) -> None:
        self._models: dict[str, Any] = {"fp32": model.eval().requires_grad_(False)}

    def __call__(self, dtype: str) -> Any:
        if dtype not in self._models:
            self._models[dtype] = bf16_linears(sharing(self._models["fp32"]))
        return self._models[dtype]
