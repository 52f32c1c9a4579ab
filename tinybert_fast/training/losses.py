"""The losses of TinyBERT and MiniLM, pure: recorded states in, one named scalar per term out.

    attention_m   mean over heads of MSE(Q_S K_S^T / sqrt(d_S), Q_T K_T^T / sqrt(d_T)): no softmax
    hidden_m      MSE(H_S W^T + b, H_T); m = 0, the embedding output, is called ``embedding``
    prediction    CE(z_T / t, z_S / t)
    relation_qk   KL of softmax(Q K^T / sqrt(d)) after regrouping to relation heads of d numbers;
                  likewise qq, kk and vv, of one layer of either model

Every term has weight 1 in the total, as in the papers (arXiv 1909.10351, 2002.10957, 2012.15828).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.modules.capture import Capture
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.projection import HiddenProjection

if TYPE_CHECKING:  # their modules import this one
    from tinybert_fast.training.matches import LayerMatches
    from tinybert_fast.training.relation_matches import RelationMatches

Parity = Literal["paper", "official"]
PARITIES = ("paper", "official")
RELATIONS = {  # between the tokens of a sequence -> the two records of a Capture
    "qk": ("queries", "keys"),
    "qq": ("queries", "queries"),
    "kk": ("keys", "keys"),
    "vv": ("values", "values"),
}


def power_of_length(term: str) -> int:
    """What a term is a mean over, of which a text of n tokens has n^power: texts, tokens, pairs of
    tokens.
    """
    kind = term.partition("_")[0]
    return {"prediction": 0, "attention": 2}.get(kind, 1)


def intermediate_terms(
    student: Capture,
    teacher: Capture,
    matches: LayerMatches,
    projection: HiddenProjection,
    *,
    layout: SequenceLayout | None = None,
    parity: Parity = "paper",
) -> dict[str, Tensor]:
    """Embedding, hidden-state and attention terms: {"embedding", "hidden_1", ..., "attention_1",
    ...} -> scalars.

    ``paper``: real tokens alone count, whether states were recorded packed (T, C), (T, H, D) or
    padded (B, N, C), (B, N, H, D). ``official``: padded states only; hidden states are compared on
    padding too, scores are summed over real keys for every query, padded ones included, and divided
    by B * H * N * N, as the authors' code does. ``layout``: of the batch; the one recorded by the
    student when not given. Teacher states are constants.
    """
    layout = layout if layout is not None else student.layout
    official = parity == "official"
    terms: dict[str, Tensor] = {}

    def pick(states: Tensor, capture: Capture) -> Tensor:
        if official and capture.layout is not None:
            raise ValueError(
                "parity='official' counts padding, but states were recorded packed; "
                "record_padded() them"
            )
        if official and layout is not None:
            return states
        return _real(states, capture, layout)

    for m, g in matches.hidden:
        ours, theirs = pick(student.hidden[m], student), pick(teacher.hidden[g], teacher)
        terms[f"hidden_{m}" if m else "embedding"] = ops.hidden_mse(
            ours, theirs.detach(), *projection.for_state(m), layout=None if official else layout
        )
    for m, g in matches.attention:
        terms[f"attention_{m}"] = ops.attention_score_mse(
            pick(student.queries[m], student),
            pick(student.keys[m], student),
            pick(teacher.queries[g], teacher).detach(),
            pick(teacher.keys[g], teacher).detach(),
            layout=layout,
            count_padded_queries=official,
        )
    return terms


def relation_terms(
    student: Capture,
    teacher: Capture,
    matches: RelationMatches,
    *,
    layout: SequenceLayout | None = None,
) -> dict[str, Tensor]:
    """MiniLM's terms {"relation_qq": ..., ...} -> scalars, over real tokens alone.

    States may be recorded packed (T, H, D) or padded (B, N, H, D); ``layout``: of the batch, the
    one recorded by the student when not given. Teacher states are constants.
    """
    layout = layout if layout is not None else student.layout
    sides = (student, matches.student_layer), (teacher, matches.teacher_layer)
    terms: dict[str, Tensor] = {}
    for kind in matches.kinds:
        operands = []
        for capture, layer in sides:
            first, second = RELATIONS[kind]
            a = _real(getattr(capture, first)[layer], capture, layout)
            # One tensor twice is a relation with itself, which costs less.
            same = first == second
            b = a if same else _real(getattr(capture, second)[layer], capture, layout)
            operands += [a, b]
        terms[f"relation_{kind}"] = ops.attention_relation_kl(
            *operands, relation_heads=matches.heads, layout=layout
        )
    return terms


def _real(states: Tensor, capture: Capture, layout: SequenceLayout | None) -> Tensor:
    """The rows of real tokens, (T, ...)."""
    if capture.layout is not None:
        return states
    if layout is None:
        raise ValueError(
            "padded states were recorded, and no layout says which tokens are real; pass layout="
        )
    return layout.pack(states)


def prediction_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    parity: Parity = "paper",
) -> Tensor:
    """The teacher's logits (B, K) against the student's: a scalar; gold labels play no part.

    ``paper``: soft cross-entropy, summed over classes and averaged over the batch. ``official``:
    averaged over classes too, so K times smaller. With one output (regression, such as STS-B) there
    is no distribution to compare: the mean squared error against the teacher's score, whatever the
    temperature.
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits "
            f"{tuple(teacher_logits.shape)} differ; "
            "give the student as many labels as the teacher has"
        )
    if student_logits.shape[-1] == 1:
        wide = torch.promote_types(student_logits.dtype, torch.float32)
        return F.mse_loss(student_logits.to(wide), teacher_logits.detach().to(wide))
    reduction = "official" if parity == "official" else "batch"
    return ops.soft_cross_entropy(
        student_logits, teacher_logits.detach(), temperature=temperature, reduction=reduction
    )
