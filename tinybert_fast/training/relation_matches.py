"""Which relations of a student layer learn from those of a teacher layer: MiniLM said as data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tinybert_fast.modules.capture import Capture
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.losses import RELATIONS, Parity, relation_terms

MINILM_V2 = ("qq", "kk", "vv")  # arXiv:2012.15828; MiniLM itself, arXiv:2002.10957, has qk and vv


@dataclass(frozen=True)
class RelationMatches:
    """Relations ``kinds`` of ``heads`` relation heads each, of one layer of either model.

    Widths and attention heads of the two may differ, and no hidden state is compared, so there is
    no projection. What stands behind the attention of ``student_layer`` gets no gradient.

    >>> str(RelationMatches(("qq", "kk", "vv"), 12, student_layer=4, teacher_layer=12))
    'qq,kk,vv of 12 heads, 4:12'
    """

    kinds: tuple[str, ...]
    heads: int
    student_layer: int
    teacher_layer: int

    loss: ClassVar[str] = "minilm"

    @classmethod
    def of(
        cls,
        student_config: Any,
        teacher_config: Any,
        kinds: str | None = None,
        heads: int | None = None,
        teacher_layer: int | None = None,
    ) -> RelationMatches:
        """``kinds``: such as "qk,vv"; MiniLMv2's qq,kk,vv by default. ``heads``: by default the
        larger of the two attention head counts that divides both widths. ``teacher_layer``: the
        last by default; MiniLMv2 takes layer 21 of a BERT-large's 24. The student's is its last.
        """
        chosen = MINILM_V2 if kinds is None else tuple(k.strip() for k in kinds.split(","))
        last = teacher_config.num_hidden_layers
        return cls(
            chosen,
            _default_heads(student_config, teacher_config) if heads is None else heads,
            student_layer=student_config.num_hidden_layers,
            teacher_layer=last if teacher_layer is None else teacher_layer,
        )

    def __post_init__(self) -> None:
        if not self.kinds or len(set(self.kinds)) < len(self.kinds):
            raise ValueError(f"relations are named once each; got {','.join(self.kinds)!r}")
        for kind in self.kinds:
            if kind not in RELATIONS:
                raise ValueError(
                    f"relation {kind!r} is not one of {', '.join(RELATIONS)}; give some of them, "
                    "such as qq,kk,vv"
                )

    def validate(self, student_config: Any, teacher_config: Any, parity: Parity = "paper") -> None:
        """Refuse layers that do not exist, relation heads that do not divide both widths, and
        ``parity="official"``.
        """
        if parity != "paper":
            raise ValueError(
                f"parity={parity!r} is the code that TinyBERT's authors released, and "
                "loss='minilm' is not theirs; leave parity out"
            )
        for side, layer, config in (
            ("student", self.student_layer, student_config),
            ("teacher", self.teacher_layer, teacher_config),
        ):
            if not 1 <= layer <= config.num_hidden_layers:
                raise ValueError(
                    f"relations of {side} layer {layer} are asked for, and the {side} has layers "
                    f"1..{config.num_hidden_layers}"
                )
        widths = student_config.hidden_size, teacher_config.hidden_size
        if self.heads < 1 or any(width % self.heads for width in widths):
            raise ValueError(
                f"{self.heads} relation heads must divide the student's width {widths[0]} and the "
                f"teacher's {widths[1]}; choose relation_heads among {_divisors(*widths)}"
            )

    def student_capture(self) -> Capture:
        """A fresh record of what the losses read from the student."""
        return self._capture(self.student_layer)

    def teacher_capture(self) -> Capture:
        """A fresh record of what the losses read from the teacher, and nothing else."""
        return self._capture(self.teacher_layer)

    def _capture(self, layer: int) -> Capture:
        read = {name for kind in self.kinds for name in RELATIONS[kind]}
        return Capture(
            attention=[layer] if read - {"values"} else [],
            attention_values=[layer] if "values" in read else [],
        )

    @property
    def copied_layers(self) -> dict[int, int]:
        """{student layer: teacher layer} to start from, evenly spread up to ``teacher_layer``."""
        every = self.teacher_layer / self.student_layer
        return {m: max(math.floor(m * every + 0.5), 1) for m in range(1, self.student_layer + 1)}

    def new_projection(self, *configs: Any, shared: bool = True) -> None:
        """No hidden state is compared."""

    def terms(
        self,
        student: Capture,
        teacher: Capture,
        projection: None,
        *,
        layout: SequenceLayout | None = None,
        parity: Parity = "paper",
    ) -> dict[str, Tensor]:
        """Of recorded states: see losses.relation_terms."""
        return relation_terms(student, teacher, self, layout=layout)

    def settings(self, *, shared_projection: bool) -> dict[str, Any]:
        """What a run folder says of this."""
        return {
            "loss": self.loss,
            "relations": ",".join(self.kinds),
            "relation_heads": self.heads,
            "teacher_layer": self.teacher_layer,
        }

    def __str__(self) -> str:
        layers = f"{self.student_layer}:{self.teacher_layer}"
        return f"{','.join(self.kinds)} of {self.heads} heads, {layers}"


def _default_heads(student_config: Any, teacher_config: Any) -> int:
    counts = student_config.num_attention_heads, teacher_config.num_attention_heads
    widths = student_config.hidden_size, teacher_config.hidden_size
    fitting = [n for n in counts if not any(width % n for width in widths)]
    if not fitting:
        raise ValueError(
            f"neither the student's {counts[0]} heads nor the teacher's {counts[1]} divide both "
            f"widths, {widths[0]} and {widths[1]}; choose relation_heads among {_divisors(*widths)}"
        )
    return max(fitting)


def _divisors(*widths: int) -> str:
    common = math.gcd(*widths)
    return ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
