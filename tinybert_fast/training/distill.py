"""DistillationTrainer: a Trainer whose loss is what the student owes to a frozen teacher."""

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
from tinybert_fast.training.common import TermsTrainer
from tinybert_fast.training.losses import PARITIES, Parity, intermediate_terms, prediction_loss
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.projection import HiddenProjection

Stage = Literal["intermediate", "prediction"]
STAGES = ("intermediate", "prediction")
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
        matches: LayerMatches | None,
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
        lesson: Capture | Tensor,
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
        assert self.projection is not None
        capture = self.matches.student_capture()
        record(self.student, batch, capture, layout)
        layout = layout or capture.layout
        if layout is None:
            layout = SequenceLayout.from_mask(_mask(batch))
        return intermediate_terms(
            capture, lesson, self.matches, self.projection, layout=layout, parity=self.parity
        )

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        enable = getattr(self.student, "activation_checkpointing_enable", None)
        (enable or self.student.gradient_checkpointing_enable)(**kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable  # before Transformers 5.24


def record(
    model: Any, batch: dict[str, Tensor], capture: Capture, layout: SequenceLayout | None = None
) -> None:
    """Run the encoder of any BERT class and leave in ``capture`` what it asks for; no head runs."""
    encoder = model.base_model
    if is_accelerated(model):
        encoder(**batch, layout=layout, capture=capture, packed=True)
    else:
        with record_padded(model, capture):
            encoder(**batch)


def classify(
    model: Any, batch: dict[str, Tensor], layout: SequenceLayout | None = None, **more: Any
) -> Any:
    """What a sequence classification model answers: logits (B, K), a loss if labels are given."""
    if is_accelerated(model):
        more["layout"] = layout
    return model(**batch, **more)


def bf16_linears(teacher: nn.Module) -> nn.Module:
    """Keep the weights of linear layers in bf16, for a teacher that runs under autocast.

    The products are those of autocast on fp32 weights; only, autocast does not cache weights that
    need no gradient, so it would round them anew in every forward. The layers get new Parameters:
    what shares the old ones keeps them.
    """
    for module in teacher.modules():
        if isinstance(module, nn.Linear):
            for name, p in list(module.named_parameters(recurse=False)):
                rounded = p.detach().to(torch.bfloat16)
                setattr(module, name, nn.Parameter(rounded, requires_grad=p.requires_grad))
    return teacher


class DistillationTrainer(TermsTrainer):
    """Train ``student`` on what ``teacher`` says about the same batches.

    ``stage="intermediate"``: embedding, hidden-state and attention losses over ``matches`` through
    ``projection``, which is trained, checkpointed and resumed with the student.
    ``stage="prediction"``: the teacher's logits alone. Either model may be accelerated
    (``tinybert_fast.accelerate``) or not. The teacher is put in eval mode and gets no gradient (the
    official code forgets eval mode, which leaves the teacher's dropout on; that is not reproduced).
    ``parity="official"`` takes both models unaccelerated and padded, and the official losses and
    optimizer (BertAdam). Checkpoints are plain Transformers folders of the student, with
    ``projection.safetensors`` beside the weights.
    """

    inside = "student"

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
            raise ValueError(
                f"the temperature divides the logits, so it must be positive; got {temperature}"
            )
        ours, theirs = student.config, teacher.config
        if ours.vocab_size != theirs.vocab_size:
            raise ValueError(
                f"the student knows {ours.vocab_size} word pieces and the teacher "
                f"{theirs.vocab_size}; both must read the "
                "same ids, so give the student the teacher's vocabulary"
            )
        if parity == "official":
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
            matches.validate(ours, theirs)
            if projection is None:
                projection = HiddenProjection(
                    ours.hidden_size, theirs.hidden_size, matches.student_states
                )
        else:
            if ours.num_labels != theirs.num_labels:
                raise ValueError(
                    f"the student predicts {ours.num_labels} labels and the teacher "
                    f"{theirs.num_labels}; "
                    "give the student the teacher's labels"
                )
            matches = projection = None
        self.stage = stage
        self.teacher = teacher.eval().requires_grad_(False).to(args.device)
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

    # ---- the loss ----

    @torch.no_grad()
    def teach(
        self, batch: dict[str, Tensor], layout: SequenceLayout | None = None
    ) -> Capture | Tensor:
        """The teacher's lesson on one batch: the states that the matches name, or its logits.

        no_grad rather than inference_mode: the student's backward keeps these tensors, and
        inference tensors may not be kept.
        """
        with self.accelerator.autocast():
            if self.stage == "prediction":
                return classify(self.teacher, batch, layout).logits
            capture = self.model.matches.teacher_capture()
            record(self.teacher, batch, capture, layout)
            return capture

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        batch, layout = _split(inputs)
        terms = model(batch, self.teach(batch, layout), layout)
        loss = self.sum_of(terms, training=model.training)
        return (loss, terms) if return_outputs else loss

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
