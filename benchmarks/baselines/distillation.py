"""The intermediate-layer distillation step without this package.

Trained: an nn.ModuleDict with "student" (BertModel) and "projection" (one ``fit_dense`` for all
states). Teacher: a BertModel in eval mode, without gradients in both baselines (the released code
leaves its dropout on and builds its graph: both cost time and neither is wanted).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tinybert_fast.benchmarks.baselines import plain_bert
from tinybert_fast.benchmarks.baselines.attention_scores import SUMS, official, score_sum
from tinybert_fast.benchmarks.baselines.plain_bert import compile_once, encode, spread
from tinybert_fast.benchmarks.batches import Batch, bucket_counts
from tinybert_fast.benchmarks.case import BASELINE, CAREFUL, Outcome
from tinybert_fast.benchmarks.training_step import Teacher, TrainingStep

SCORES = "tinybert_official"  # the attention that hands out its scores, in Transformers' registry


def attention_with_scores(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    scores: list[Tensor],
    **_: Any,
) -> tuple[Tensor, None]:
    """Eager attention of the released code, which returns its masked scores before the softmax."""
    raw = torch.matmul(query, key.transpose(-1, -2)) * scaling  # (B, H, N, N)
    if attention_mask is not None:
        raw = raw + attention_mask
    scores.append(raw)
    probabilities = F.dropout(F.softmax(raw, dim=-1), dropout, module.training)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(SCORES, attention_with_scores)
AttentionMaskInterface.register(SCORES, eager_mask)


class DistillationBaseline(TrainingStep):
    def __init__(
        self,
        trained: nn.ModuleDict,
        teacher: Any,
        batches: dict[str, Batch],
        dropout: float,
    ) -> None:
        super().__init__(trained, batches, dropout)
        self.student = cast(Any, trained["student"])
        self.project: Any = trained["projection"].fit_dense
        self.teacher: Any = teacher.eval().requires_grad_(False)
        # Uniform matches: student layer m learns from teacher layer m * every.
        self.layers: int = self.student.config.num_hidden_layers
        self.every: int = teacher.config.num_hidden_layers // self.layers


class OfficialStep(DistillationBaseline):
    """(a) The official formulas in eager PyTorch: scores (B, H, N, N) and states (B, N, C) of every
    layer of both models, padding included."""

    name, role = "official", BASELINE

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        for model in (self.student, self.teacher):
            model.set_attn_implementation(SCORES)

    def backward(self, batch: Batch, dtype: str, setting: Any) -> Tensor:
        with self.autocast(dtype):
            teacher_scores, teacher_states = self.lesson(batch, dtype)
            student_scores, student_states = self._read(self.student, batch)
            attention = [
                official(student, teacher)
                for student, teacher in zip(
                    student_scores, teacher_scores[self.every - 1 :: self.every], strict=True
                )
            ]
            hidden = [
                F.mse_loss(self.project(student), teacher)
                for student, teacher in zip(
                    student_states, teacher_states[:: self.every], strict=True
                )
            ]
        loss = torch.stack([*attention, *hidden]).sum()
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def lesson(self, batch: Batch, dtype: str) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Scores and states of every layer of the teacher."""
        return self._read(self.teacher, batch)

    @staticmethod
    def _read(model: Any, batch: Batch) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        scores: list[Tensor] = []
        output = model(**batch.inputs, output_hidden_states=True, scores=scores)
        return scores, output.hidden_states


class Lesson(NamedTuple):
    """What the teacher says of a batch: states 0..M that are matched, of tokens (T, C), and of
    matched layers queries and keys, as `States` has them."""

    hidden: list[Tensor]
    heads: list[tuple[Tensor, Tensor]]


class Setting(NamedTuple):
    buckets: int
    form: str  # of the attention loss

    def __str__(self) -> str:
        return f"length buckets: {self.buckets}, {self.form}"


class CarefulStep(DistillationBaseline):
    """(b) SDPA in both models; queries and keys of the matched layers by hooks; real tokens alone
    in the losses; the batch sorted by length and cut into trimmed buckets, gradients accumulated.
    Number of buckets and form of the attention loss are the fastest ones on this machine.

    In bf16 the teacher is in bf16 as a whole, and the direct form of the loss too but for its sum:
    the same products as under autocast, and fewer bytes, so nothing else is tried."""

    name, role = "careful", CAREFUL

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.taught_in = Teacher(self.teacher, {"bf16": wholly_bf16})
        counts = bucket_counts(self.batches["timed"])
        self.settings = tuple(Setting(count, form) for count in counts for form in SUMS)

    def prepare(self, batch: Batch, setting: Setting) -> list[Batch]:
        return batch.buckets(setting.buckets)

    def backward(self, batch: list[Batch], dtype: str, setting: Any) -> Tensor:
        tokens = sum(part.tokens for part in batch)
        heads = self.student.config.num_attention_heads
        pairs = heads * sum(n * n for part in batch for n in part.lengths)
        entries = tokens * self.teacher.config.hidden_size
        total = torch.zeros((), device=self.device)
        for part in batch:
            attention, hidden = self.sums(part, dtype, setting)
            loss = attention / pairs + hidden / entries
            loss.backward()
            total += loss.detach()
        return total

    def sums(self, part: Batch, dtype: str, setting: Any) -> tuple[Tensor, Tensor]:
        """Squared differences summed over matched layers: of scores, of projected states."""
        matched = range(1, self.layers + 1)
        with self.autocast(dtype):
            lesson = self.lesson(part, dtype)
            with queries_and_keys(self.student, list(matched)) as ours:
                states = self.student(**part.inputs, output_hidden_states=True).hidden_states
            hidden = torch.zeros((), device=self.device)
            for state, taught in zip(states, lesson.hidden, strict=True):
                error = self.project(tokens_of(state, part)).float() - taught.float()
                hidden = hidden + error.square().sum()
        attention = torch.zeros((), device=self.device)
        heads = self.student.config.num_attention_heads
        real = real_rows(part)
        for m in matched:
            q, k = ours[m]
            attention = attention + score_term(
                setting.form, q, k, *lesson.heads[m - 1], heads, real
            )
        return attention, hidden

    @torch.no_grad()
    def lesson(self, part: Batch, dtype: str) -> Lesson:
        teacher = self.taught_in(dtype)
        layers = [m * self.every for m in range(1, self.layers + 1)]
        # Without autocast, which would widen what lies between products of a teacher in bf16.
        with self.autocast("fp32"), queries_and_keys(teacher, layers) as theirs:
            states = teacher(**part.inputs, output_hidden_states=True).hidden_states
        hidden = [tokens_of(state, part) for state in states[:: self.every]]
        return Lesson(hidden, [(theirs[m][0], theirs[m][1]) for m in layers])


class Form(NamedTuple):
    """That of plain_bert.py, and the attention loss's."""

    buckets: int
    compiled: bool
    packed: bool
    score: str

    def __str__(self) -> str:
        layout = plain_bert.Form(*self[:3]).layout
        return f"{layout}, {self.score}{', compiled' if self.compiled else ''}"


class PlainStep(CarefulStep):
    """The careful step on plain_bert.py: nothing waits for the device, so that it can be captured;
    and compiled, but for the checks, whose dropout rate would be compiled for once more. The
    direct form of the loss is tried with the fewest buckets alone: which form is faster is a matter
    of the length, and buckets change that little."""

    def __init__(
        self,
        *args: Any,
        name: str = "careful plain",
        offered: plain_bert.Offer = plain_bert.forms,
    ) -> None:
        super().__init__(*args)
        self.name = self.role = name
        found = offered(self.batches["timed"])
        fewest = min(form.buckets for form in found)
        chosen_from: Any = tuple(
            Form(form.buckets, form.compiled, form.packed, score)
            for form in found
            for score in SUMS
            if score == "gram" or form.buckets == fewest
        )
        self.settings = chosen_from
        self.checking = False

    def serves(self, setting: Form, dtype: str) -> bool:
        return plain_bert.serves(setting, self.device, dtype)

    def outcome(self, what: str, dtype: str, through: Any = None) -> Outcome:
        self.checking = True
        try:
            return super().outcome(what, dtype, through)
        finally:
            self.checking = False

    def sums(self, part: Batch, dtype: str, setting: Form) -> tuple[Tensor, Tensor]:
        compiled = setting.compiled and not self.checking
        attention_term = compile_once(score_term, self.device) if compiled else score_term
        hidden_term = compile_once(state_term, self.device) if compiled else state_term
        with self.autocast(dtype):
            lesson = self.lesson(part, dtype)
            ours = encode(self.student, part, compiled=compiled, packed=setting.packed)
            hidden = [
                hidden_term(tokens_of(state, part), taught, self.project.weight, self.project.bias)
                for state, taught in zip(ours.hidden, lesson.hidden, strict=True)
            ]
        heads, real = self.student.config.num_attention_heads, real_rows(part)
        packed = (part.places, part.shape) if setting.packed else None
        attention = [
            attention_term(setting.score, q, k, *theirs, heads, real, packed)
            for q, k, theirs in zip(ours.queries, ours.keys, lesson.heads, strict=True)
        ]
        return torch.stack(attention).sum(), torch.stack(hidden).sum()

    @torch.no_grad()
    def lesson(self, part: Batch, dtype: str) -> Lesson:
        setting = self._setting(dtype)
        compiled = setting.compiled and not self.checking
        with self.autocast("fp32"):
            theirs = encode(self.taught_in(dtype), part, compiled=compiled, packed=setting.packed)
        every = self.every
        heads = zip(theirs.queries[every - 1 :: every], theirs.keys[every - 1 :: every])
        return Lesson([tokens_of(state, part) for state in theirs.hidden[::every]], list(heads))


class KeptLessons:
    """Mixed into a step: its teacher is asked about a batch once, before anything is timed."""

    def __init__(self, *args: Any, **how: Any) -> None:
        super().__init__(*args, **how)
        self._kept: dict[Any, Any] = {}

    def lesson(self, part: Any, *how: Any) -> Any:
        key = id(part), how[-1]  # the dtype
        if key not in self._kept:
            self._kept[key] = super().lesson(part, *how)  # type: ignore[misc]
        return self._kept[key]


def state_term(state: Tensor, taught: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return (F.linear(state, weight, bias).float() - taught.float()).square().sum()


def score_term(
    form: str,
    q: Tensor,
    k: Tensor,
    p: Tensor,
    r: Tensor,
    heads: int,
    real: Tensor | None,
    packed: tuple[Tensor, tuple[int, int]] | None = None,
) -> Tensor:
    """Of queries and keys (B, N, C) of the student, then of the teacher; of (T, H, D), if they are
    ``packed``: places (T,), and (B, N)."""
    if packed is None:
        return score_sum(form, *(as_heads(x, heads, real) for x in (q, k, p, r)))
    return score_sum(form, *(spread(x, *packed).transpose(1, 2) for x in (q, k, p, r)))


def wholly_bf16(teacher: nn.Module) -> nn.Module:
    """A copy that shares nothing."""
    return copy.deepcopy(teacher).to(torch.bfloat16)


@contextmanager
def queries_and_keys(model: Any, layers: list[int]) -> Iterator[dict[int, list[Tensor]]]:
    """{m: [queries (B, N, C), keys (B, N, C)]} of the layers m = 1..M, once a forward has run."""
    found: dict[int, list[Tensor]] = {m: [] for m in layers}
    hooks = [
        getattr(model.encoder.layer[m - 1].attention.self, which).register_forward_hook(
            lambda _module, _inputs, output, m=m: found[m].append(output)
        )
        for m in layers
        for which in ("query", "key")
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def tokens_of(x: Tensor, part: Batch) -> Tensor:
    """(B, N, C) -> (T, C), as it is if packed."""
    if x.dim() == 2:
        return x
    return x.flatten(0, 1) if part.is_full else x.flatten(0, 1).index_select(0, part.places)


def real_rows(part: Batch) -> Tensor | None:
    """(B, N, 1), or None where no position is padding."""
    return None if part.is_full else part.attention_mask[..., None]


def as_heads(x: Tensor, heads: int, real: Tensor | None) -> Tensor:
    """(B, N, C) -> (B, H, N, D), rows of padding zero."""
    if real is not None:
        x = x * real
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
