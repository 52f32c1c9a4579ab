"""What general and task distillation have in common: set-up of a run, and its report."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import BertConfig, TrainingArguments

from tinybert_fast import integrations
from tinybert_fast.data import LengthCollator, usable_length
from tinybert_fast.training.callbacks import KeepSeconds
from tinybert_fast.training.common import RunTrainer
from tinybert_fast.training.distill import Stage
from tinybert_fast.training.losses import PARITIES, Parity
from tinybert_fast.training.report import Panels, panels_of, table
from tinybert_fast.training.run_folder import RunFolder, weights_digest
from tinybert_fast.training.students import Student


def check_parity(parity: str) -> None:
    if parity not in PARITIES:
        raise ValueError(f"parity is {parity!r}; expected one of {', '.join(PARITIES)}")


def check_batches(examples: int, arguments: TrainingArguments, parity: Parity) -> None:
    size = arguments.train_batch_size * arguments.world_size
    if parity == "official" and examples < size:
        raise ValueError(
            f"parity='official' drops the last incomplete batch, and {examples} texts do not fill "
            f"one of {size} (batch size x processes); choose a smaller batch_size"
        )


def usable(max_length: int, *configs: BertConfig) -> int:
    for config in configs:
        max_length = usable_length(max_length, config)
    return max_length


def prepare(model: Any, *, parity: Parity, accelerate: bool, impl: str) -> Any:
    """On packed rows, unless the run follows the official code."""
    if accelerate and parity != "official":
        integrations.accelerate(model, impl=impl)
    return model


def more_arguments(parity: Parity, stage: Stage) -> dict[str, Any]:
    """What the stage and the official code ask of TrainingArguments."""
    # Pooler and heads get no gradient in the first stage.
    more: dict[str, Any] = {"ddp_find_unused_parameters": stage == "intermediate"}
    if parity == "official":
        more.update(
            dataloader_drop_last=True,
            train_sampling_strategy="random",
            max_grad_norm=0.0,  # BertAdam clips each parameter by itself
        )
    return more


def collator_for(tokenizer: Any, parity: Parity, max_length: int) -> LengthCollator:
    """The official code pads everything to the longest length allowed."""
    if parity == "official":
        return LengthCollator(tokenizer, pad_to_multiple_of=max_length)
    return LengthCollator(tokenizer, lengths=True)


def student_settings(chosen: Student, init: str | None) -> dict[str, Any]:
    settings: dict[str, Any] = {"student": chosen.name}
    if chosen.folder is None:
        settings["init"] = init or "random"
        settings["student_config"] = chosen.config.to_diff_dict()
    else:
        settings["student_weights"] = weights_digest(chosen.folder)
    return settings


def train(trainer: RunTrainer, run: RunFolder, stage: str = "train") -> dict[str, Any]:
    """Trains a stage, from its last checkpoint on if there is one. {"steps", "train_loss",
    "train_seconds"}: of the whole stage; no loss after a restart, from which Trainer counts anew.
    """
    checkpoint = run.last_checkpoint(stage)
    clock = KeepSeconds(run, stage, resumed=checkpoint is not None)
    trainer.add_callback(clock)
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    return {
        "steps": trainer.state.global_step,
        "train_loss": outcome.training_loss if checkpoint is None else None,
        "train_seconds": clock.before + outcome.metrics["train_runtime"],
    }


def parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


# ---- reports -------------------------------------------------------------------------------------


def first_and_last(history: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """{term: {"first": value, "last": value}} of everything logged as a loss."""
    found: dict[str, dict[str, float]] = {}
    for entry in history:
        for name, value in entry.items():
            if name.endswith("loss") and name != "train_loss" and not name.startswith("eval_"):
                found.setdefault(name, {"first": value})["last"] = value
    return found


def loss_panels(history: Iterable[Mapping[str, Any]], stage: str) -> Panels:
    """Attention, relation, hidden-state and total loss apart: their sizes differ a hundredfold."""
    panels: Panels = {}
    for title, curves in panels_of(history).items():
        if title != "training loss":
            panels[f"{stage}: {title}"] = curves
            continue
        for name, curve in curves.items():
            term = name.removesuffix("_loss")
            group = {"loss": "loss", "prediction": "loss"}.get(term, "hidden-state losses")
            for kind in ("attention", "relation"):
                group = f"{kind} losses" if term.startswith(kind) else group
            panels.setdefault(f"{stage}: {group}", {})[term] = curve
    return panels


def facts(metrics: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        (prefix + name.replace("_", " "), value)
        for name, value in metrics.items()
        if not isinstance(value, dict | list) and value is not None
    ]


def change_tables(changes: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """A section for each stage, if something was rounded."""
    return {
        f"Loss by the teacher's rounding, {stage} stage": table(
            ("term", "relative change, first batch"), terms.items()
        )
        for stage, terms in changes.items()
    }


def loss_table(losses: Mapping[str, Mapping[str, float]]) -> str:
    return table(
        ("term", "first", "last"), [(name, v["first"], v["last"]) for name, v in losses.items()]
    )


def usage(path: Path, cls: str) -> str:
    return (
        f"```python\nfrom transformers import {cls}, AutoTokenizer\n"
        f'model = {cls}.from_pretrained("{path}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{path}")\n```\n\n'
        f"Logs: `tensorboard --logdir {path / 'logs'}`"
    )
