"""What the intermediate stage minimises: TinyBERT's losses or MiniLM's. All that depends on the
choice is said by the matches of either kind, and what they may be given, by ``matches_for``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Protocol

from torch import Tensor
from transformers import BertConfig

from tinybert_fast.modules.capture import Capture
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.losses import Parity
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.projection import HiddenProjection
from tinybert_fast.training.relation_matches import RelationMatches

Loss = Literal["tinybert", "minilm"]
LOSSES = ("tinybert", "minilm")


class Matches(Protocol):
    """What of the student learns from what of the teacher, and by which loss."""

    loss: ClassVar[str]

    def validate(self, student_config: Any, teacher_config: Any, parity: Parity = "paper") -> None:
        """Refuse what these models, or this parity, do not have."""

    def student_capture(self) -> Capture:
        """A fresh record of what the losses read from the student."""

    def teacher_capture(self) -> Capture:
        """A fresh record of what the losses read from the teacher, and nothing else."""

    def new_projection(
        self, student_config: Any, teacher_config: Any, *, shared: bool = True
    ) -> HiddenProjection | None:
        """What is trained beside the student, if anything is."""

    def terms(
        self,
        student: Capture,
        teacher: Capture,
        projection: Any,
        *,
        layout: SequenceLayout | None = None,
        parity: Parity = "paper",
    ) -> dict[str, Tensor]:
        """One scalar per term of the loss; the teacher's states are constants."""

    @property
    def copied_layers(self) -> dict[int, int]:
        """{student layer: the teacher layer that ``init="layers"`` copies}."""

    def settings(self, *, shared_projection: bool) -> dict[str, Any]:
        """What a run folder says of this."""


def matches_for(
    matches: LayerMatches | str | None,
    student: BertConfig,
    teacher: BertConfig,
    *,
    loss: Loss = "tinybert",
    relations: str | None = None,
    relation_heads: int | None = None,
    teacher_layer: int | None = None,
    shared_projection: bool = True,
    parity: Parity = "paper",
) -> Matches:
    """The matches that a recipe's options mean, checked against both models: of layers, uniform for
    None or parsed from text; or of relations. ValueError for options of the other loss.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; expected one of {', '.join(LOSSES)}")
    if loss == "minilm":
        _refuse(loss, matches=matches, projection_per_layer=not shared_projection or None)
        found: Matches = RelationMatches.of(
            student, teacher, relations, relation_heads, teacher_layer
        )
    else:
        _refuse(
            loss, relations=relations, relation_heads=relation_heads, teacher_layer=teacher_layer
        )
        if matches is None:
            matches = LayerMatches.uniform(student.num_hidden_layers, teacher.num_hidden_layers)
        found = LayerMatches.parse(matches) if isinstance(matches, str) else matches
    found.validate(student, teacher, parity)
    return found


def _refuse(loss: str, **options: Any) -> None:
    other = next(name for name in LOSSES if name != loss)
    for name, value in options.items():
        if value is not None:
            raise ValueError(
                f"{name} belongs to loss={other!r} and means nothing to loss={loss!r}; leave it "
                f"out, or choose loss={other!r} (--loss {other})"
            )
