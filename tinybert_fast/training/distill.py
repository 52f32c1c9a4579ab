"""DistillationTrainer: a Trainer whose loss is what the student owes to a frozen teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from tinybert_fast.integrations.bert import is_accelerated
from tinybert_fast.modules.capture import Capture
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.bert_adam import BertAdam
from tinybert_fast.training.common import TermsTrainer
from tinybert_fast.training.lessons import Lesson, LessonCache, as_lesson
from tinybert_fast.training.losses import PARITIES, Parity, power_of_length, prediction_loss
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.objectives import Matches
from tinybert_fast.training.projection import HiddenProjection
from tinybert_fast.training.teacher import (
    UNDER_AUTOCAST,
    TeacherDtype,
    check_teacher_dtype,
    classify,
    join_projections,
    record,
)

Stage = Literal["intermediate", "prediction"]
STAGES: tuple[Stage, ...] = ("intermediate", "prediction")
FORWARD_KEYS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


class Distillation(nn.Module):
    """What is trained: the student and, for the intermediate stage, the projection. Forward gives
    the loss terms.

    The teacher is no part of it, so it is neither optimised nor saved, and stays in eval mode.
    """

    def __init__(
        self,
        student: Any,
        projection: HiddenProjection | None,
        matches: Matches | None,
        *,
        temperature: float = 1.0,
        parity: Parity = "paper",
    ) -> None:
        super().__init__()
        self.student, self.projection = student, projection
        self.matches, self.temperature, self.parity = matches, temperature, parity

    def forward(
        self,
        batch: dict[str, Tensor],
        lesson: Lesson,
        layout: SequenceLayout | None = None,
    ) -> dict[str, Tensor]:
        """``lesson``: the teacher's recorded states (intermediate stage) or logits (prediction).
        ``layout``: of the batch, where the caller has it.
        """
        if not isinstance(lesson, Capture):
            logits = classify(self.student, batch, layout).logits
            term = prediction_loss(logits, lesson, temperature=self.temperature, parity=self.parity)
            return {"prediction": term}
        assert self.matches is not None
        capture = self.matches.student_capture()
        record(self.student, batch, capture, layout)
        layout = layout or capture.layout
        if layout is None:
            layout = SequenceLayout.from_mask(_mask(batch))
        return self.matches.terms(
            capture, lesson, self.projection, layout=layout, parity=self.parity
        )

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        enable = getattr(self.student, "activation_checkpointing_enable", None)
        (enable or self.student.gradient_checkpointing_enable)(**kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable  # before Transformers 5.24


class DistillationTrainer(TermsTrainer):
    """Train ``student`` on what ``teacher`` says about the same batches.

    ``stage="intermediate"``: over ``matches``, embedding, hidden-state and attention losses
    (LayerMatches) through ``projection``, which is trained, checkpointed and resumed with the
    student; or MiniLM's relation losses (RelationMatches), which need none.
    ``stage="prediction"``: the teacher's logits alone. Either model may be accelerated
    (``tinybert_fast.accelerate``) or not. The teacher is put in eval mode and gets no gradient (the
    official code forgets eval mode, which leaves the teacher's dropout on; that is not reproduced).
    ``parity="official"`` takes both models unaccelerated and padded, and the official losses and
    optimizer (BertAdam). ``teacher_dtype``: fp32 or bf16 whatever the run is in, or int8 or fp8
    (training/teacher.py), for which the caller has changed the layers. ``lessons``: of the training
    set, which then has the column ``index``; the teacher is not asked in training, and its config
    may stand for it. Losses that are means over tokens, or pairs of them, weigh each of a step's
    alike, as others weigh texts; with padding, under ``parity="official"``, all weigh texts.
    Checkpoints are plain Transformers folders of the student, with
    ``projection.safetensors`` beside the weights. ``cuda_graphs``: see training/graphs.py.
    """

    inside = "student"

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        args: transformers.TrainingArguments,
        stage: Stage = "intermediate",
        matches: Matches | None = None,
        projection: HiddenProjection | None = None,
        temperature: float = 1.0,
        parity: Parity = "paper",
        teacher_dtype: TeacherDtype | None = None,
        lessons: LessonCache | None = None,
        **trainer: Any,
    ) -> None:
        if stage not in STAGES:
            raise ValueError(f"a stage is one of {', '.join(STAGES)}; got {stage!r}")
        if parity not in PARITIES:
            raise ValueError(f"parity is one of {', '.join(PARITIES)}; got {parity!r}")
        if temperature <= 0:
            raise ValueError(
                f"the temperature divides the logits, so it must be positive; got {temperature}"
            )
        check_teacher_dtype(teacher_dtype, args.device)
        ours, theirs = student.config, getattr(teacher, "config", teacher)
        if ours.vocab_size != theirs.vocab_size:
            raise ValueError(
                f"the student knows {ours.vocab_size} word pieces and the teacher "
                f"{theirs.vocab_size}; both must read the "
                "same ids, so give the student the teacher's vocabulary"
            )
        if parity == "official":
            if lessons is not None:
                raise ValueError(
                    "parity='official' counts padding, which cached lessons do not hold; leave the "
                    "cache out"
                )
            for name, model in (("student", student), ("teacher", teacher)):
                if is_accelerated(model):
                    raise ValueError(
                        f"parity='official' counts padding, and an accelerated {name} has none; "
                        "restore() it first"
                    )
            trainer.setdefault("optimizer_cls_and_kwargs", (BertAdam, {"lr": args.learning_rate}))
        if stage == "intermediate":
            matches = matches or LayerMatches.uniform(
                ours.num_hidden_layers, theirs.num_hidden_layers
            )
            matches.validate(ours, theirs, parity)
            if projection is None:
                projection = matches.new_projection(ours, theirs)
        else:
            if ours.num_labels != theirs.num_labels:
                raise ValueError(
                    f"the student predicts {ours.num_labels} labels and the teacher "
                    f"{theirs.num_labels}; "
                    "give the student the teacher's labels"
                )
            matches = projection = None
        self.stage, self.teacher_dtype, self.lessons = stage, teacher_dtype, lessons
        self.teacher = teacher
        if lessons is None:
            join_projections(teacher.eval().requires_grad_(False).to(args.device))
        super().__init__(
            model=Distillation(
                student, projection, matches, temperature=temperature, parity=parity
            ),
            args=args,
            **trainer,
        )

    @property
    def student(self) -> Any:
        return self.inner

    @property
    def projection(self) -> HiddenProjection | None:
        return self.model.projection

    def models_of_a_step(self) -> list[Any]:
        return [self.model, *([self.teacher] if self.lessons is None else [])]

    # ---- the loss ----

    @torch.no_grad()
    def teach(self, batch: dict[str, Tensor], layout: SequenceLayout | None = None) -> Lesson:
        """The teacher's lesson on one batch: the states that the matches name, or its logits.

        no_grad rather than inference_mode: the student's backward keeps these tensors, which
        inference tensors forbid. Copies could be kept, but a copy of every recorded state costs
        more than the bookkeeping of views and versions that inference_mode saves.
        """
        with self._teacher_numbers():
            return self._ask(self.teacher, batch, layout)

    def _ask(self, teacher: Any, batch: dict[str, Tensor], layout: SequenceLayout | None) -> Lesson:
        if self.stage == "prediction":
            return classify(teacher, batch, layout).logits
        capture = self.model.matches.teacher_capture()
        record(teacher, batch, capture, layout)
        return capture

    def teach_raw(self, collated: dict[str, Any]) -> Lesson:
        """`teach` of a batch as the collator makes it."""
        return self.teach(*_split(self._prepare_inputs(dict(collated))))

    def _teacher_numbers(self) -> Any:
        if self.teacher_dtype is None:
            return self.accelerator.autocast()
        bf16 = self.teacher_dtype in UNDER_AUTOCAST
        return torch.autocast(self.args.device.type, torch.bfloat16, enabled=bf16)

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.graphs is not None and self.lessons is not None:  # no graph reads a disk
            lengths, device = inputs["lengths"], self.args.device
            inputs["lesson"] = self.lessons.rows(inputs["index"], lengths, device)
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch, layout = _split(inputs)
        terms = model(batch, self._lesson(inputs, batch, layout), layout)
        shares = inputs.get("shares")
        if shares is not None:
            shares = torch.stack([shares[self._counted_by(term)] for term in terms])
        loss = self.sum_of(terms, shares)
        return (loss, terms) if return_outputs else loss

    def counts(self, batch: dict[str, Any]) -> Tensor:
        """Texts, tokens and pairs of tokens: sums of n^0, n^1 and n^2 over texts of n tokens."""
        lengths = batch["lengths"] if "lengths" in batch else _mask(batch).sum(1)
        n = torch.as_tensor(lengths, dtype=torch.float64)
        return torch.stack((torch.ones_like(n), n, n * n)).sum(1)

    def _counted_by(self, term: str) -> int:
        """Which of `counts` it is a mean over; with padding, as much in each text."""
        return 0 if self.model.parity == "official" else power_of_length(term)

    def _lesson(
        self, inputs: dict[str, Any], batch: dict[str, Tensor], layout: SequenceLayout | None
    ) -> Lesson:
        if "lesson" in inputs:
            return as_lesson(inputs["lesson"], layout)
        if self.lessons is None:
            return self.teach(batch, layout)
        return self.lessons.lesson(inputs["index"], layout, self.args.device)

    @torch.no_grad()
    def change_of_terms(self, exact: Any) -> dict[str, float]:
        """{term: |loss - loss of exact| / loss of exact} on the first batch of the training set:
        what the teacher's dtype, and that of cached lessons, change. ``exact``: it in fp32.
        """
        rows = range(min(len(self.train_dataset), self.args.train_batch_size))
        inputs = self._prepare_inputs(self.data_collator([self.train_dataset[i] for i in rows]))
        batch, layout = _split(inputs)
        with torch.autocast(self.args.device.type, enabled=False):
            truth = self._ask(exact.eval().to(self.args.device), batch, layout)
        training = self.model.training
        self.model.eval()
        try:
            with self.compute_loss_context_manager():
                said = self.model(batch, self._lesson(inputs, batch, layout), layout)
                true = self.model(batch, truth, layout)
        finally:
            self.model.train(training)
        return {name: float(abs(said[name] - true[name]) / true[name]) for name in true}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The student alone, against gold labels: the teacher has nothing to add to a dev score.
        Its loss on them is the one that a fine-tuned classifier minimises.
        """
        inputs = self._prepare_inputs(inputs)
        batch, layout = _split(inputs)
        labels = inputs.get("labels")
        with torch.no_grad(), self.accelerator.autocast():
            answer = classify(self.student, batch, layout, labels=labels)
        return None if labels is None else answer.loss, answer.logits.float(), labels

    def save_beside(self, folder: Path) -> None:
        if self.projection is not None:
            self.projection.save(folder)

    def load_beside(self, folder: Path) -> None:
        if self.projection is not None:
            self.projection.load(folder)


def _split(inputs: dict[str, Any]) -> tuple[dict[str, Tensor], SequenceLayout | None]:
    """What both models read of a batch, without the labels, and its layout."""
    return {key: inputs[key] for key in FORWARD_KEYS if key in inputs}, inputs.get("layout")


def _mask(batch: dict[str, Tensor]) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"]) if mask is None else mask
