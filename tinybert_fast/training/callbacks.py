"""Trainer callbacks: stop at a loss that is no number, show progress, keep the sampler's epoch."""

import logging
import math
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from torch import Tensor, nn
from transformers import TrainerCallback

from tinybert_fast.training.report import HIDDEN
from tinybert_fast.training.run_folder import RunFolder, checkpoints_in

log = logging.getLogger(__name__)

LIVE = {"loss": "loss", "tokens_per_second": "tokens/s"}  # shown while training, and dev's


class StopOnNonFinite(TrainerCallback):
    """Raises ValueError at a NaN or infinite loss, before anything is saved from it.

    The trainer hands every loss to `observe`. On a GPU the step is kept on the device and read when
    the loop logs, evaluates or saves, so no step waits for it. Before a checkpoint the weights are
    checked too: a gradient can overflow under a loss that does not.
    """

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None  # step of the first bad loss, -1 while there is none

    def observe(self, loss: Tensor, step: int) -> None:
        """`loss`: of one micro-batch, any shape; `step`: its optimizer step, from 1."""
        if self._first_bad is None:
            self._first_bad = torch.full((), -1, dtype=torch.int64, device=loss.device)
        bad = ~torch.isfinite(loss.detach()).all() & (self._first_bad < 0)
        self._first_bad = torch.where(bad, step, self._first_bad)

    def on_train_begin(self, args, state, control, **kwargs):
        self._first_bad = None

    def on_step_end(self, args, state, control, model: nn.Module | None = None, **kwargs):
        self._check(args, state, control, model)

    def on_epoch_end(self, args, state, control, model: nn.Module | None = None, **kwargs):
        self._check(args, state, control, model)

    def _check(self, args, state, control, model: nn.Module | None) -> None:
        pause = (
            control.should_log
            or control.should_evaluate
            or control.should_save
            or control.should_training_stop
        )
        if self._first_bad is not None and (pause or self._first_bad.device.type == "cpu"):
            step = int(self._first_bad)
            if step >= 0:
                raise ValueError(
                    self._message(f"the loss is NaN or infinite at step {step}", args, state)
                )
        if control.should_save and model is not None and not _finite(model):
            raise ValueError(
                self._message(
                    f"a weight is NaN or infinite after step {state.global_step}", args, state
                )
            )

    @staticmethod
    def _message(what: str, args, state) -> str:
        good = checkpoints_in(Path(args.output_dir))
        kept = (
            f"the last good checkpoint is {good[-1]}"
            if good
            else "no checkpoint had been written yet"
        )
        return (
            f"{what} of {state.max_steps}; training stopped, {kept}. "
            "Try a lower learning rate, or fp32 if bf16 is on"
        )


def _word(name: str) -> str:
    return LIVE.get(name, name.replace("eval_", "dev "))


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _finite(model: nn.Module) -> bool:
    weights = [p.detach() for p in model.parameters() if p.is_floating_point()]
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(weights)])
    return math.isfinite(norms.sum().item())


class Intervals(TrainerCallback):
    """A resumed run logs, evaluates and saves as often as it is told to now; Trainer reads the
    numbers from the checkpoint.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        state.compute_steps(args, state.max_steps)


class SetEpoch(TrainerCallback):
    """Tells the sampler its epoch, also where a resumed run starts in the middle of one."""

    def __init__(self, sampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.sampler.set_epoch(int((state.epoch or 0.0) + 1e-6))


class KeepSeconds(TrainerCallback):
    """With each checkpoint of a stage, the seconds that led to it go to run.json."""

    def __init__(self, run: RunFolder, stage: str, resumed: bool) -> None:
        self.run, self.stage = run, stage
        self.before = run.recorded("seconds", {}).get(stage, 0.0) if resumed else 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._start = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        seconds = round(self.before + time.perf_counter() - self._start, 3)
        self.run.record(seconds={**self.run.recorded("seconds", {}), self.stage: seconds})


class ProgressBar(TrainerCallback):
    """One bar on stderr for the steps and, while it runs, one for the evaluation; log lines where
    there is no terminal.
    """

    def __init__(self, title: str = "training") -> None:
        self.title = title
        self._bar: Progress | None = None
        self._latest: dict[str, float] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero or not sys.stderr.isatty():
            return
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=Console(stderr=True),
        )
        self._steps = bar.add_task(
            self.title, total=state.max_steps, completed=state.global_step, values=""
        )
        self._dev = bar.add_task("evaluating", total=None, visible=False, values="")
        bar.start()
        self._bar = bar

    def on_step_end(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.update(self._steps, completed=state.global_step)

    def on_prediction_step(self, args, state, control, eval_dataloader=None, **kwargs):
        if self._bar is not None:
            total = len(eval_dataloader) if hasattr(eval_dataloader, "__len__") else None
            self._bar.update(self._dev, total=total, advance=1, visible=True)

    def on_evaluate(self, args, state, control, **kwargs):
        if self._bar is not None:
            self._bar.reset(self._dev, visible=False)

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {k: v for k, v in (logs or {}).items() if k in LIVE or k.startswith("eval_")}
        shown = {k: v for k, v in shown.items() if not k.endswith(HIDDEN)}
        if not state.is_world_process_zero or not shown:
            return
        self._latest.update(shown)
        values = "  ".join(f"{_word(k)} {_number(v)}" for k, v in self._latest.items())
        if self._bar is not None:
            self._bar.update(self._steps, values=values)
        else:
            log.info(
                "%s: step %d of %d  %s", self.title, state.global_step, state.max_steps, values
            )

    def on_train_end(self, args, state, control, **kwargs):
        self.close()

    def close(self) -> None:
        """Gives the terminal back, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
