"""Where a student starts: at random, from every k-th teacher layer, or from a PCA of the teacher's
embeddings.

The PCA start.  A BERT embedding output is  y = z * gamma + beta,  z = C x / rms(C x),  x = word +
position + type, where C takes the mean over channels away.  The student has its own layer norm,
which takes away one direction too, so of its d channels d - 1 can carry information.  With P (d_T,
d - 1) the leading principal directions of z over the vocabulary and Q (d, d - 1) an orthonormal
basis of the mean-free directions, each student table is

    word_S = word_T C P Q^T,   position_S = position_T C P Q^T,   type_S = type_T C P Q^T

(one linear map, so their sums agree) and the student's layer norm keeps weight 1, bias 0: its
output is Q P^T z, rescaled to unit rms, which is what freshly initialised layers above expect.  The
second moment of z is taken without centring, so the common mean of all tokens, which layer norm
would otherwise distort, is among the directions kept.  The projection W, b then is the
least-squares map from the student's embedding output to the teacher's (gamma and beta included), so
y_S W^T + b ~ y_T  as closely as the rank allows: exactly, when both widths agree.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.objectives import Matches
from tinybert_fast.training.projection import HiddenProjection

How = Literal["random", "layers", "pca"]
HOWS = ("random", "layers", "pca")
SAMPLE_POSITIONS = 128  # over which the vocabulary is spread when sums are sampled
LEAST_SQUARES_DAMPING = 1e-9  # of the mean diagonal: only directions without any energy feel it


@torch.no_grad()
def initialise_student(
    student: Any,
    teacher: Any,
    how: How = "random",
    *,
    matches: Matches | None = None,
    shared: bool = True,
) -> HiddenProjection | None:
    """Set the start of ``student`` (any BERT class, changed in place) and return the projection
    that goes with it, if ``matches`` has one.

    ``random``: nothing is changed. ``layers``: embeddings, pooler and, for each matched student
    layer, the teacher layer of ``matches`` (uniform when not given) are copied; widths must agree;
    the projection starts as the identity. ``pca``: see the top of this file; encoder layers stay as
    they are.
    """
    if how not in HOWS:
        raise ValueError(f"a student starts from one of {', '.join(HOWS)}; got {how!r}")
    ours, theirs = student.config, teacher.config
    if matches is None:
        matches = LayerMatches.uniform(ours.num_hidden_layers, theirs.num_hidden_layers)
    projection = matches.new_projection(ours, theirs, shared=shared)
    start: tuple[Tensor, Tensor] | None = None
    if how == "layers":
        _copy_layers(student.base_model, teacher.base_model, matches.copied_layers)
        start = torch.eye(theirs.hidden_size), torch.zeros(theirs.hidden_size)
    elif how == "pca":
        start = _embed_by_pca(student.base_model.embeddings, teacher.base_model.embeddings)
    if projection is not None and start is not None:
        projection.start(*start)
    return projection


def _copy_layers(student: Any, teacher: Any, chosen: dict[int, int]) -> None:
    ours, theirs = student.config, teacher.config
    for name in (
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "hidden_act",
        "vocab_size",
    ):
        if getattr(ours, name) != getattr(theirs, name):
            raise ValueError(
                f"copying layers needs equal shapes, but {name} is {getattr(ours, name)} in the "
                "student and "
                f"{getattr(theirs, name)} in the teacher; start the student with 'pca' or "
                "'random' instead"
            )
    _fits(student.embeddings, teacher.embeddings)
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        table = getattr(student.embeddings, name).weight
        table.copy_(getattr(teacher.embeddings, name).weight[: len(table)])
    student.embeddings.LayerNorm.load_state_dict(teacher.embeddings.LayerNorm.state_dict())
    for m in range(1, ours.num_hidden_layers + 1):
        if m not in chosen:
            raise ValueError(
                f"student layer {m} is matched with no teacher layer, so there is nothing to "
                "copy; match it"
            )
        student.encoder.layer[m - 1].load_state_dict(
            teacher.encoder.layer[chosen[m] - 1].state_dict()
        )
    if student.pooler is not None and teacher.pooler is not None:
        student.pooler.load_state_dict(teacher.pooler.state_dict())


def _embed_by_pca(student: Any, teacher: Any) -> tuple[Tensor, Tensor]:
    """Fill the student's embedding tables; returns the start of the projection, W (d_T, d) and b
    (d_T,).
    """
    width, teacher_width = (
        student.word_embeddings.weight.shape[1],
        teacher.word_embeddings.weight.shape[1],
    )
    if width > teacher_width:
        raise ValueError(
            f"a PCA keeps at most the teacher's {teacher_width} channels, but the student has "
            f"{width}; "
            "start it with 'random' instead"
        )
    _fits(student, teacher)
    tables = {
        name: getattr(teacher, name).weight.double()
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    }
    sums = _sampled_sums(*tables.values())  # (V, d_T)
    eps = teacher.LayerNorm.eps
    normed = torch.nn.functional.layer_norm(sums, (teacher_width,), eps=eps)
    mean_free = mean_free_basis(teacher_width).to(
        sums.device
    )  # searched in, so that P holds C: it never sees the ones
    inside = normed @ mean_free
    leading = torch.linalg.eigh(inside.T @ inside).eigenvectors.flip(1)[:, : width - 1]
    to_student = mean_free @ leading @ mean_free_basis(width).T.to(sums.device)  # C P Q^T, (d_T, d)
    for name, table in tables.items():
        target = getattr(student, name).weight
        target.copy_(table[: len(target)] @ to_student)
    student.LayerNorm.weight.fill_(1.0)
    student.LayerNorm.bias.zero_()

    ours = torch.nn.functional.layer_norm(sums @ to_student, (width,), eps=student.LayerNorm.eps)
    theirs = normed * teacher.LayerNorm.weight.double() + teacher.LayerNorm.bias.double()
    return _least_squares(ours, theirs)


def mean_free_basis(width: int) -> Tensor:
    """Q (width, width - 1), fp64: orthonormal columns, each with zero mean (the cosine transform
    without its constant).

    A cosine spreads every principal direction over all channels, so no channel is much louder than
    another.
    """
    channel = torch.arange(width, dtype=torch.float64)[:, None] + 0.5
    frequency = torch.arange(1, width, dtype=torch.float64)[None, :]
    return math.sqrt(2.0 / width) * torch.cos(math.pi / width * channel * frequency)


def _sampled_sums(word: Tensor, position: Tensor, token_type: Tensor) -> Tensor:
    """(V, d): every word piece once, at positions spread evenly over the first 128, in the first
    segment.
    """
    places = torch.arange(len(word), device=word.device) % min(SAMPLE_POSITIONS, len(position))
    return word + position[places] + token_type[0]


def _least_squares(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """W (d_out, d_in), b (d_out,) that minimise |inputs @ W.T + b - targets|^2; of the minimisers,
    the smallest W.
    """
    input_mean, target_mean = inputs.mean(0), targets.mean(0)
    centred = inputs - input_mean
    gram = centred.T @ centred
    gram.diagonal().add_(LEAST_SQUARES_DAMPING * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, centred.T @ (targets - target_mean)).T
    return weight, target_mean - weight @ input_mean


def _fits(student: Any, teacher: Any) -> None:
    """The student may use the front of a teacher table, never more rows than there are."""
    for name, word in (
        ("word_embeddings", "vocab_size"),
        ("position_embeddings", "max_position_embeddings"),
        ("token_type_embeddings", "type_vocab_size"),
    ):
        ours, theirs = len(getattr(student, name).weight), len(getattr(teacher, name).weight)
        if ours > theirs or (word == "vocab_size" and ours != theirs):
            raise ValueError(
                f"the student's {name} have {ours} rows and the teacher's {theirs}; "
                f"give the student {word}={theirs}"
            )
