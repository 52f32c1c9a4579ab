"""Which student state learns from which teacher state: g(m) of the TinyBERT paper, said as data.

Numbers are the paper's: hidden state 0 is the embedding output and m = 1..M the output of layer m;
attention layers are 1..M.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from tinybert_fast.modules.capture import Capture
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.losses import Parity, intermediate_terms
from tinybert_fast.training.projection import HiddenProjection

Pairs = tuple[tuple[int, int], ...]
_PAIR = re.compile(r"\s*(\d+)\s*:\s*(\d+)\s*")


@dataclass(frozen=True)
class LayerMatches:
    """Pairs (student m, teacher g(m)) whose hidden states and whose attention scores are compared.

    >>> LayerMatches.uniform(4, 12).attention
    ((1, 3), (2, 6), (3, 9), (4, 12))
    >>> str(LayerMatches.parse("0:0,1:2,2:3,3:5,4:6"))
    '0:0,1:2,2:3,3:5,4:6'
    """

    hidden: Pairs
    attention: Pairs

    loss: ClassVar[str] = "tinybert"

    def __post_init__(self) -> None:
        for kind, pairs, first in (("hidden", self.hidden, 0), ("attention", self.attention, 1)):
            students = [m for m, _ in pairs]
            if len(set(students)) != len(students):
                raise ValueError(
                    f"a student state may be matched once; the {kind} matches {_write(pairs)} "
                    "name one twice"
                )
            if any(m < first or g < first for m, g in pairs):
                raise ValueError(
                    f"{kind} matches count from {first}, got {_write(pairs)}"
                    + (" (0 is the embedding output, which has no attention)" if first else "")
                )
        if not self.hidden and not self.attention:
            raise ValueError(
                "no layer is matched; give pairs student:teacher such as 0:0,1:3,2:6,3:9,4:12"
            )

    @classmethod
    def uniform(cls, student_layers: int, teacher_layers: int) -> LayerMatches:
        """g(m) = m * N / M, which the paper found best (3m for 4 of 12 layers, 2m for 6 of 12). M
        must divide N.
        """
        if student_layers < 1 or teacher_layers < 1:
            raise ValueError(
                f"layer counts must be positive, got {student_layers} student and "
                f"{teacher_layers} teacher layers"
            )
        every, rest = divmod(teacher_layers, student_layers)
        if rest or not every:
            # Evenly spread and rounded half up: a suggestion, never a silent choice.
            spread = [
                (2 * m * teacher_layers + student_layers) // (2 * student_layers)
                for m in range(student_layers + 1)
            ]
            remedy = _write(tuple((m, max(g, 1) if m else 0) for m, g in enumerate(spread)))
            raise ValueError(
                f"{student_layers} student layers do not divide {teacher_layers} teacher layers "
                "evenly; "
                f"name the matches yourself as student:teacher pairs, for instance {remedy}"
            )
        return cls.of(tuple((m, m * every) for m in range(student_layers + 1)))

    @classmethod
    def of(cls, pairs: Pairs) -> LayerMatches:
        """The same pairs for hidden states and, the embedding output aside, for attention."""
        return cls(hidden=pairs, attention=_of_layers(pairs))

    @classmethod
    def parse(cls, text: str) -> LayerMatches:
        """``"0:0,1:2,2:3,3:5,4:6"``, or the two kinds apart: ``"hidden=0:0,4:6 attention=4:6"``."""
        kinds = dict(
            part.split("=", 1)
            for part in re.split(r"[;\s]+(?=hidden|attention)", text.strip())
            if "=" in part
        )
        if not kinds:
            return cls.of(_read(text))
        unknown = set(kinds) - {"hidden", "attention"}
        if unknown:
            raise ValueError(
                f"layer matches are for hidden and attention, got {sorted(unknown)} in {text!r}"
            )
        return cls(**{kind: _read(kinds.get(kind, "")) for kind in ("hidden", "attention")})

    def validate(self, student_config: Any, teacher_config: Any, parity: Parity = "paper") -> None:
        """Refuse states that do not exist and attention between different head counts."""
        for kind in ("hidden", "attention"):
            for side, at, config in (
                ("student", 0, student_config),
                ("teacher", 1, teacher_config),
            ):
                layers = config.num_hidden_layers
                beyond = [pair[at] for pair in getattr(self, kind) if pair[at] > layers]
                if beyond:
                    raise ValueError(
                        f"{kind} matches {_write(getattr(self, kind))} name {side} layer "
                        f"{beyond[0]}, "
                        f"but the {side} has {layers} layers; use numbers up to {layers}"
                    )
        student_heads, teacher_heads = (
            student_config.num_attention_heads,
            teacher_config.num_attention_heads,
        )
        if self.attention and student_heads != teacher_heads:
            raise ValueError(
                "attention scores are compared head by head, but the student has "
                f"{student_heads} heads and the teacher "
                f"{teacher_heads}; give the student num_attention_heads={teacher_heads} (its "
                "hidden size must be a "
                "multiple of it), match hidden states alone: "
                f'"hidden={_write(self.hidden) or "0:0"}", or --loss minilm'
            )

    @property
    def student_states(self) -> tuple[int, ...]:
        """The student's hidden states that need a projection, in order."""
        return tuple(sorted(m for m, _ in self.hidden))

    def student_capture(self) -> Capture:
        """A fresh record of what the losses read from the student."""
        return Capture(
            hidden_states=[m for m, _ in self.hidden], attention=[m for m, _ in self.attention]
        )

    def teacher_capture(self) -> Capture:
        """A fresh record of what the losses read from the teacher, and nothing else."""
        return Capture(
            hidden_states=sorted({g for _, g in self.hidden}),
            attention=sorted({g for _, g in self.attention}),
        )

    @property
    def copied_layers(self) -> dict[int, int]:
        """{student layer: teacher layer} that it may start from."""
        return {m: g for m, g in self.hidden + self.attention if m > 0}

    def new_projection(
        self, student_config: Any, teacher_config: Any, *, shared: bool = True
    ) -> HiddenProjection:
        """From student to teacher width, of the matched hidden states."""
        return HiddenProjection(
            student_config.hidden_size,
            teacher_config.hidden_size,
            self.student_states,
            shared=shared,
            std=student_config.initializer_range,
        )

    def terms(
        self,
        student: Capture,
        teacher: Capture,
        projection: HiddenProjection,
        *,
        layout: SequenceLayout | None = None,
        parity: Parity = "paper",
    ) -> dict[str, Tensor]:
        """Of recorded states: see losses.intermediate_terms."""
        return intermediate_terms(student, teacher, self, projection, layout=layout, parity=parity)

    def settings(self, *, shared_projection: bool) -> dict[str, Any]:
        """What a run folder says of this."""
        return {
            "loss": self.loss,
            "matches": str(self),
            "shared_projection": shared_projection,
        }

    def __str__(self) -> str:
        if self.attention == _of_layers(self.hidden):
            return _write(self.hidden)
        return f"hidden={_write(self.hidden)} attention={_write(self.attention)}"


def _of_layers(pairs: Pairs) -> Pairs:
    return tuple(pair for pair in pairs if pair[0] > 0)


def _write(pairs: Pairs) -> str:
    return ",".join(f"{m}:{g}" for m, g in pairs)


def _read(text: str) -> Pairs:
    pairs = []
    for part in text.split(",") if text.strip() else []:
        found = _PAIR.fullmatch(part)
        if found is None:
            raise ValueError(
                "expected layer matches as student:teacher pairs such as 0:0,1:2,2:3,3:5,4:6, "
                f"got {part.strip()!r} in {text!r}"
            )
        pairs.append((int(found[1]), int(found[2])))
    return tuple(pairs)
