"""transformers.Trainer as every run here uses it: arguments in our words, and a trainer that
resumes exactly.
"""

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from tinybert_fast.data import LengthCollator, LengthGroupedSampler
from tinybert_fast.data.collate import Rows, lengths_of
from tinybert_fast.integrations import is_accelerated
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.callbacks import Intervals, ProgressBar, SetEpoch, StopOnNonFinite
from tinybert_fast.training.graphs import StepGraphs, check_graphs
from tinybert_fast.training.loading import quiet

log = logging.getLogger(__name__)

DAY = 24 * 60 * 60  # seconds
SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")  # Trainer's others want more
# What torch.distributed says on the processes that are left, by backend: gloo, NCCL, its watchdog.
PEER_GONE = ("gloo", "NCCL", "Connection closed by peer", "timed out", "Timeout")


def training_arguments(
    output_dir: str | Path,
    *,
    epochs: float = 3.0,
    max_steps: int = -1,
    lr: float = 5e-5,
    batch_size: int = 32,
    eval_batch_size: int | None = None,
    accumulation: int = 1,
    warmup: float = 0.1,
    schedule: str = "linear",
    weight_decay: float = 0.01,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    bf16: bool = False,
    evaluate: bool = True,
    eval_steps: int | None = None,
    select_by: str | None = None,
    checkpoint_steps: int | None = None,
    log_steps: int = 10,
    keep: int = 2,
    **more: Any,
) -> TrainingArguments:
    """TrainingArguments. `output_dir` takes the checkpoints, of which the last `keep` (and the
    best) stay.

    `batch_size` is per device and micro-batch. `warmup` below 1 is a share of all steps. A
    checkpoint follows every evaluation: each epoch, or every `eval_steps` steps; with `select_by`
    (a dev metric, or "loss") the best one is loaded at the end. Without it, `checkpoint_steps` may
    say something else. `more` goes to TrainingArguments as it is and wins. Without torchrun one GPU
    is used.
    """
    if seed < 0:
        raise ValueError(f"seed is {seed}; expected 0 or more")
    at_least_one(
        batch_size=batch_size,
        accumulation=accumulation,
        eval_steps=eval_steps,
        checkpoint_steps=checkpoint_steps,
        log_steps=log_steps,
    )
    selects = evaluate and select_by is not None
    if selects and checkpoint_steps is not None:
        raise ValueError(
            f"checkpoint_steps is {checkpoint_steps}, but a checkpoint follows each evaluation "
            "where they choose one (a dev file is given); give eval_steps instead"
        )
    if not 0 <= lr < math.inf:
        raise ValueError(f"lr is {lr}; expected a number of 0 or more")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay is {weight_decay}; expected 0 or more")
    if not 0 <= warmup < math.inf:
        raise ValueError(f"warmup is {warmup}; expected a number of 0 or more")
    if max_steps <= 0 and not 0 < epochs < math.inf:
        raise ValueError(f"epochs is {epochs}; expected a number of more than 0")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}")
    when = "epoch" if eval_steps is None else "steps"
    fields: dict[str, Any] = {
        "output_dir": str(output_dir),
        "num_train_epochs": epochs,
        "max_steps": max_steps,
        "learning_rate": lr,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": eval_batch_size or 2 * batch_size,
        "gradient_accumulation_steps": accumulation,
        "warmup_steps": warmup,
        "lr_scheduler_type": schedule,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "optim": "adamw_torch_fused",
        "seed": seed,
        "bf16": bf16,
        "use_cpu": not torch.cuda.is_available(),
        "train_sampling_strategy": "group_by_length",
        "remove_unused_columns": False,  # the collator takes what it needs
        "eval_strategy": when if evaluate else "no",
        "eval_steps": eval_steps if evaluate else None,
        "save_strategy": when if checkpoint_steps is None else "steps",
        "save_steps": checkpoint_steps or eval_steps or 500,
        "save_total_limit": keep,
        "load_best_model_at_end": selects,
        "metric_for_best_model": select_by if evaluate else None,
        "logging_steps": log_steps,
        "logging_nan_inf_filter": False,  # StopOnNonFinite wants to see them
        "disable_tqdm": True,
        "ddp_timeout": DAY,  # others wait while one encodes a corpus, makes shards, asks a teacher
        "report_to": "none",  # RunTrainer adds TensorBoard with the folder of the run
    }
    arguments = TrainingArguments(**{**fields, **more})
    gpus = arguments.n_gpu  # resolves the devices
    if gpus > 1:
        _one_gpu_of(gpus)
        arguments._n_gpu = 1  # several are nn.DataParallel's, which does not split a batch's layout
    if arguments.device.type == "cpu":  # several processes: cpu:0, from which torch.load shrinks
        arguments.__dict__["_setup_devices"] = torch.device("cpu")
    return arguments


def at_least_one(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; expected 1 or more")


@cache  # said once
def _one_gpu_of(gpus: int) -> None:
    log.warning("using one of %d GPUs; torchrun uses all of them", gpus)


class RunTrainer(transformers.Trainer):
    """transformers.Trainer that

    - batches by length in an order that depends on seed, epoch and the examples of an optimizer
      step alone: a run resumed in the middle of an epoch goes on as it would have (Transformers'
      own sampler draws from torch's generator), and any number of processes takes the same steps;
    - stops at a NaN or infinite loss, and says plainly that another process has gone;
    - weighs each text of an optimizer step alike (`counts`), in whatever micro-batch and process it
      is: 16 x 1 texts, 8 x 2 and 8 x 1 in each of two processes are the same step but for dropout
      and rounding (Trainer weighs micro-batches alike, of however many texts). Where an epoch's
      last step is incomplete, accelerate fills it up from the epoch's beginning for several
      processes;
    - hands a packed encoder its layout (`LengthCollator(lengths=True)`);
    - with `cuda_graphs` replays its steps (training/graphs.py);
    - shows one progress bar and writes TensorBoard logs to `logs`.
    """

    gives_sums = False  # compute_loss: over what `counts` counts, or means

    def __init__(
        self,
        *args,
        logs: Path | None = None,
        title: str = "training",
        progress: bool = True,
        cuda_graphs: bool = False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self.packs = is_accelerated(self.model)
        self.left: dict[str, Tensor] = {}  # by compute_loss, for whoever reads it after the step
        self.graphs: StepGraphs | None = None
        if cuda_graphs:
            models = self.models_of_a_step()
            check_graphs(self.args, accelerated=all(map(is_accelerated, models)))
            self.graphs = StepGraphs(models, self.args.device)
            # A batch that is copied while a step still runs keeps nobody waiting for that.
            self.accelerator.dataloader_config.non_blocking = True
        self.add_callback(Intervals())
        self.guard = StopOnNonFinite()
        self.add_callback(self.guard)
        self.remove_callback(PrinterCallback)
        self.bar = ProgressBar(title)
        if progress:
            self.add_callback(self.bar)
        if logs is not None:
            board = TensorBoardCallback()
            board.logging_dir = board.logging_dir or str(logs)
            self.add_callback(board)

    def train(self, *args, **kwargs):
        try:
            with quiet():
                return super().train(*args, **kwargs)
        except RuntimeError as error:
            if self.args.world_size > 1 and any(sign in str(error) for sign in PEER_GONE):
                raise ConnectionError(
                    "another process of this run has ended or does not answer "
                    f"({str(error).strip().splitlines()[0]}); start all of them again, with resume"
                ) from error
            raise
        finally:
            self.bar.close()

    def _run_epoch(self, *args, **kwargs):
        """Nothing where a run goes on from its last step: Trainer would take one more, if an epoch
        does not end there.
        """
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def models_of_a_step(self) -> list[Any]:
        """What is trained, and whatever else computes in a step."""
        return [self.model]

    def counts(self, batch: dict[str, Any]) -> Tensor:
        """(counts,) of a micro-batch: what its losses are means or sums over; here texts alone."""
        return torch.tensor([len(batch["input_ids"])])

    def batches_of(self, loader: Iterator[Any], count: int) -> list[Any]:
        """The next micro-batches, ``count`` of them, which are a step."""
        return list(itertools.islice(loader, count))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Each micro-batch gets its "shares" (counts,): by which compute_loss multiplies a loss, so
        that what Trainer and DDP average is the mean over all that the step counts.
        """
        batches = self.batches_of(epoch_iterator, num_batches)
        if batches:
            each = torch.stack([self.counts(batch) for batch in batches]).double()
            total = each.sum(0)
            if self.args.world_size > 1:
                total = self.accelerator.reduce(total.to(device), reduction="sum")
            each = torch.ones_like(each) if self.gives_sums else each
            averaged = self.args.world_size * len(batches)  # over so many, by Trainer and DDP
            shares = each.to(total.device) * averaged / total.clamp_min(1)
            shares = shares.to(
                device, torch.float32, non_blocking=True
            )  # waits for no earlier step
            for batch, share in zip(batches, shares):
                batch["shares"] = share
        return batches, None

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        shares = inputs.pop("shares", None)  # an evaluation has none
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return found if shares is None else found * shares.squeeze()

    def training_step(self, model, inputs, num_items_in_batch=None):
        def step(inputs: dict[str, Any]) -> dict[str, Tensor]:
            loss = super(RunTrainer, self).training_step(model, inputs, num_items_in_batch)
            return {"loss": loss, **self.left}

        if self.graphs is None:
            found = step(inputs)
        elif self.current_gradient_accumulation_steps < self.args.gradient_accumulation_steps:
            found = self.graphs.eagerly(step, inputs)  # divides by another number
        else:
            found = self.graphs.run(step, inputs)
        self.guard.observe(found["loss"], self.state.global_step + 1)
        self.read(found)
        return found["loss"]

    def read(self, found: dict[str, Tensor]) -> None:
        """What a step gave: its loss, and all that compute_loss has `left`."""

    def _prepare_inputs(self, inputs):
        """On the device; a packed encoder gets its layout, from the lengths the collator gave."""
        inputs = super()._prepare_inputs(inputs)
        lengths = inputs.pop("lengths", None)
        if lengths is not None and self.packs:
            ids = inputs["input_ids"]
            inputs["layout"] = SequenceLayout.from_lengths(lengths, ids.shape[1], ids.device)
        return inputs

    def _remove_unused_columns(self, dataset, description=None):
        """What a loader reads, in training and evaluation."""
        if isinstance(self.data_collator, LengthCollator):
            return Rows(dataset)
        return super()._remove_unused_columns(dataset, description)

    def _get_train_sampler(self, train_dataset=None):
        dataset: Any = self.train_dataset
        grouped = self.args.train_sampling_strategy == "group_by_length"
        if not grouped or "length" not in getattr(dataset, "column_names", ()):
            return super()._get_train_sampler(dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        of_a_step = (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )
        sampler = LengthGroupedSampler(
            lengths_of(dataset), of_a_step, seed=seed, drop_last=self.args.dataloader_drop_last
        )
        self.remove_callback(SetEpoch)
        self.add_callback(SetEpoch(sampler))
        return sampler

    def get_eval_dataloader(self, eval_dataset=None):
        """All rows, though training may leave its last batch out: they choose the checkpoint."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _get_eval_sampler(self, eval_dataset):
        """In order: the caller has sorted it by length (`sort_by_length`)."""
        return SequentialSampler(eval_dataset)


class LastStep(TrainerCallback):
    """Log the last step too, wherever it falls."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True


class TermsTrainer(RunTrainer):
    """RunTrainer over a module that holds a Transformers model, and whose forward gives named loss
    terms.

    Each term is logged by name, averaged over the steps since the last log. Checkpoints are plain
    Transformers folders of the model inside, and what `save_beside` puts there.
    """

    inside = "model"  # the attribute that holds the Transformers model

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._terms: tuple[str, ...] = ()
        self._term_sums: Tensor | float = 0.0  # (terms,), on the device until a log reads it
        self._terms_counted = 0
        super().__init__(*args, **kwargs)
        self.add_callback(LastStep())

    @property
    def inner(self) -> Any:
        return getattr(self.model, self.inside)

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and plugin.mixed_precision_policy is not None:
            # Sums of losses, and counts, leave the forward as they are; gradients add up in fp32.
            plugin.mixed_precision_policy = replace(
                plugin.mixed_precision_policy, reduce_dtype=torch.float32, output_dtype=None
            )

    def sum_of(self, terms: dict[str, Tensor], shares: Tensor | None) -> Tensor:
        """The loss. In training, where there are ``shares`` (terms,), the terms are remembered for
        the log.
        """
        each = torch.stack(list(terms.values()))
        if shares is not None:
            each = each * shares
            self._terms = tuple(terms)
            self.left["terms"] = each.detach()
        return each.sum()

    def read(self, found: dict[str, Tensor]) -> None:
        self._term_sums = self._term_sums + found["terms"]
        self._terms_counted += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of each loss term since the last log: only here they leave the device."""
        if "loss" in logs and self._terms_counted:
            means = self.accelerator.reduce(self._term_sums / self._terms_counted, reduction="mean")
            logs.update({f"{name}_loss": m for name, m in zip(self._terms, means.tolist())})
            self._term_sums, self._terms_counted = 0.0, 0
        super().log(logs, start_time)

    # ---- checkpoints: a plain folder of the model inside, and whatever belongs beside it ----

    def save_beside(self, folder: Path) -> None:
        """Rank 0 alone is asked."""

    def load_beside(self, folder: Path) -> None:
        """Every rank is asked."""

    def inner_state(self) -> dict[str, Tensor] | None:
        """What to save where the parameters lie in pieces on several ranks, which all have to ask;
        else None.
        """
        if not self.is_fsdp_enabled:
            return None
        return self._of_inner(self.accelerator.get_state_dict(self.model))

    def _of_inner(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix(f"{self.inside}."): value for name, value in state.items()}

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        # The Trainer's own writer, on the model inside: a folder as of any Transformers model.
        folder = output_dir if output_dir is not None else self.args.output_dir
        whole: nn.Module = self.model
        self.model: Any = self.inner
        try:
            super()._save(folder, None if state_dict is None else self._of_inner(state_dict))
        finally:
            self.model = whole
        if self.args.should_save:
            self.save_beside(Path(folder))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        folder = Path(resume_from_checkpoint)
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_inner(folder)
        self.load_beside(folder)

    def _load_inner(self, folder: Path) -> None:
        path = folder / "model.safetensors"
        try:
            weights = load_file(str(path))
        except Exception as error:
            raise ValueError(
                f"cannot read {path} ({error}); the checkpoint is damaged or cut short, remove "
                f"{folder} and resume from the one before"
            ) from error
        inner = self.inner
        result = inner.load_state_dict(weights, strict=False)
        missing = [k for k in result.missing_keys if k not in inner.all_tied_weights_keys]
        if missing or result.unexpected_keys:
            raise ValueError(
                f"{path} belongs to another model: missing {missing[:3]}, unexpected "
                f"{result.unexpected_keys[:3]}"
            )
        inner.tie_weights()

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
