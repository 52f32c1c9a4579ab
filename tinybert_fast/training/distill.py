"""DistillationTrainer: transformers.Trainer whose loss is what the student owes to a frozen teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from tinybert_fast.integrations.bert import is_accelerated
from tinybert_fast.modules.capture import Capture, record_padded
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.bert_adam import BertAdam
from tinybert_fast.training.losses import PARITIES, Parity, intermediate_terms, prediction_loss
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.projection import HiddenProjection

Stage = Literal["intermediate", "prediction"]
STAGES = ("intermediate", "prediction")
FORWARD_KEYS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class Distillation(nn.Module):
    """What is trained: the student and, for the intermediate stage, the projection. Forward gives the loss terms.

    The teacher is no part of it, so it is neither optimised nor saved, and stays in eval mode.
    """

    accepts_loss_kwargs = False  # terms are means over the batch, which the Trainer averages over accumulation steps

    def __init__(
        self,
        student: Any,
        projection: HiddenProjection | None,
        matches: LayerMatches | None,
        *,
        temperature: float = 1.0,
        parity: Parity = "paper",
    ) -> None:
        super().__init__()
        self.student, self.projection = student, projection
        self.matches, self.temperature, self.parity = matches, temperature, parity

    def forward(self, batch: dict[str, Tensor], lesson: Capture | Tensor) -> dict[str, Tensor]:
        """``lesson``: the teacher's recorded states (intermediate stage) or its logits (prediction stage)."""
        if not isinstance(lesson, Capture):
            logits = self.student(**batch).logits
            return {"prediction": prediction_loss(logits, lesson, temperature=self.temperature, parity=self.parity)}
        capture = self.matches.student_capture()
        read(self.student, batch, capture)
        layout = capture.layout
        if layout is None:
            layout = SequenceLayout.from_mask(_mask(batch))
        return intermediate_terms(
            capture, lesson, self.matches, self.projection, layout=layout, parity=self.parity
        )

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        enable = getattr(self.student, "activation_checkpointing_enable", None)
        (enable or self.student.gradient_checkpointing_enable)(**kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable  # the older name, for the Trainers that call it


def read(model: Any, batch: dict[str, Tensor], capture: Capture) -> None:
    """Run the encoder of any BERT class on ``batch`` and leave in ``capture`` what it asks for; no head is computed."""
    encoder = model.base_model
    if is_accelerated(model):
        encoder(**batch, capture=capture)
    else:
        with record_padded(model, capture):
            encoder(**batch)


class DistillationTrainer(transformers.Trainer):
    """Train ``student`` on what ``teacher`` says about the same batches.

    ``stage="intermediate"``: embedding, hidden-state and attention losses over ``matches`` through ``projection``, which is
    trained, checkpointed and resumed with the student. ``stage="prediction"``: the teacher's logits alone.
    Either model may be accelerated (``tinybert_fast.accelerate``) or not. The teacher is put in eval mode and gets no gradient
    (the official code forgets eval mode, which leaves the teacher's dropout on; that is not reproduced).
    ``parity="official"`` takes both models unaccelerated and padded, and the official losses and optimizer (BertAdam).
    Every loss term is logged by name, averaged over the steps since the last log.
    Checkpoints are plain Transformers folders of the student, with ``projection.safetensors`` beside the weights.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        args: transformers.TrainingArguments,
        stage: Stage = "intermediate",
        matches: LayerMatches | None = None,
        projection: HiddenProjection | None = None,
        temperature: float = 1.0,
        parity: Parity = "paper",
        **trainer: Any,
    ) -> None:
        if stage not in STAGES:
            raise ValueError(f"a stage is one of {', '.join(STAGES)}; got {stage!r}")
        if parity not in PARITIES:
            raise ValueError(f"parity is one of {', '.join(PARITIES)}; got {parity!r}")
        if temperature <= 0:
            raise ValueError(f"the temperature divides the logits, so it must be positive; got {temperature}")
        ours, theirs = student.config, teacher.config
        if ours.vocab_size != theirs.vocab_size:
            raise ValueError(
                f"the student knows {ours.vocab_size} word pieces and the teacher {theirs.vocab_size}; both must read the "
                "same ids, so give the student the teacher's vocabulary"
            )
        if parity == "official":
            for name, model in (("student", student), ("teacher", teacher)):
                if is_accelerated(model):
                    raise ValueError(
                        f"parity='official' counts padding, and an accelerated {name} has none; restore() it first"
                    )
            trainer.setdefault("optimizer_cls_and_kwargs", (BertAdam, {"lr": args.learning_rate}))
        if stage == "intermediate":
            matches = matches or LayerMatches.uniform(ours.num_hidden_layers, theirs.num_hidden_layers)
            matches.validate(ours, theirs)
            if projection is None:
                projection = HiddenProjection(ours.hidden_size, theirs.hidden_size, matches.student_states)
        else:
            if ours.num_labels != theirs.num_labels:
                raise ValueError(
                    f"the student predicts {ours.num_labels} labels and the teacher {theirs.num_labels}; "
                    "give the student the teacher's labels"
                )
            matches = projection = None
        self.stage = stage
        self.teacher = teacher.eval().requires_grad_(False).to(args.device)
        self._term_sums: dict[str, Tensor] = {}
        self._terms_counted = 0
        super().__init__(
            model=Distillation(student, projection, matches, temperature=temperature, parity=parity),
            args=args,
            **trainer,
        )

    @property
    def student(self) -> Any:
        return self.model.student

    @property
    def projection(self) -> HiddenProjection | None:
        return self.model.projection

    # ---- the loss ----

    @torch.no_grad()
    def teach(self, batch: dict[str, Tensor]) -> Capture | Tensor:
        """The teacher's lesson on one batch: the states that the matches name, or its logits.

        no_grad rather than inference_mode: the student's backward keeps these tensors, and inference tensors may not be kept.
        """
        with self.accelerator.autocast():
            if self.stage == "prediction":
                return self.teacher(**batch).logits
            capture = self.model.matches.teacher_capture()
            read(self.teacher, batch, capture)
            return capture

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch = {key: inputs[key] for key in FORWARD_KEYS if key in inputs}
        terms = model(batch, self.teach(batch))
        if model.training:
            for name, term in terms.items():
                seen = self._term_sums.get(name)
                self._term_sums[name] = term.detach().clone() if seen is None else seen + term.detach()
            self._terms_counted += 1
        loss = torch.stack(list(terms.values())).sum()
        return (loss, terms) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every loss term since the last log; the only place where terms leave the device."""
        if "loss" in logs and self._terms_counted:
            means = torch.stack(list(self._term_sums.values())).float() / self._terms_counted
            means = self.accelerator.reduce(means, reduction="mean")
            logs.update(zip(self._term_sums, means.tolist(), strict=True))
            self._term_sums, self._terms_counted = {}, 0
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The student alone, against gold labels: the teacher has nothing to add to a dev score."""
        inputs = self._prepare_inputs(inputs)
        batch = {key: inputs[key] for key in FORWARD_KEYS if key in inputs}
        with torch.no_grad(), self.accelerator.autocast():
            logits = self.student(**batch).logits
        return None, logits.float(), inputs.get("labels")

    # ---- checkpoints: a plain student folder, and the projection beside it ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # The Trainer's own writer, on the student: config, weights, tokenizer and arguments as in any Transformers folder.
        folder = output_dir if output_dir is not None else self.args.output_dir
        both = self.model
        self.model = both.student
        try:
            super()._save(folder)
        finally:
            self.model = both
        if both.projection is not None and self.args.should_save:
            both.projection.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        from safetensors.torch import load_file

        folder = Path(resume_from_checkpoint)
        path = folder / "model.safetensors"
        try:
            weights = load_file(str(path))
        except Exception as error:
            raise ValueError(
                f"cannot read {path} ({error}); the checkpoint is damaged or cut short, remove {folder} and resume from the one before"
            ) from error
        student = self.model.student
        result = student.load_state_dict(weights, strict=False)
        tied = set(getattr(student, "all_tied_weights_keys", None) or ())
        missing = [key for key in result.missing_keys if key not in tied]
        if missing or result.unexpected_keys:
            raise ValueError(
                f"{path} belongs to another model: missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}"
            )
        student.tie_weights()
        if self.model.projection is not None:
            self.model.projection.load(folder)

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is not None:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def _mask(batch: dict[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask
