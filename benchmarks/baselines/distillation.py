"""The intermediate-layer distillation step without this package.

Trained: an nn.ModuleDict with "student" (BertModel) and "projection" (one ``fit_dense`` for all
states). Teacher: a BertModel in eval mode, without gradients in both baselines (the released code
leaves its dropout on and builds its graph: both cost time and neither is wanted).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tinybert_fast.benchmarks.baselines.attention_scores import SUMS, official
from tinybert_fast.benchmarks.batches import Batch, bucket_counts
from tinybert_fast.benchmarks.case import BASELINE, CAREFUL
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
            with torch.no_grad():
                teacher_scores, teacher_states = self._read(self.teacher, batch)
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

    @staticmethod
    def _read(model: Any, batch: Batch) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        scores: list[Tensor] = []
        output = model(**batch.inputs, output_hidden_states=True, scores=scores)
        return scores, output.hidden_states


class Setting(NamedTuple):
    buckets: int
    form: str  # of the attention loss

    def __str__(self) -> str:
        return f"length buckets: {self.buckets}, {self.form}"


class CarefulStep(DistillationBaseline):
    """(b) SDPA in both models; queries and keys of the matched layers by hooks; real tokens alone
    in the losses; the batch sorted by length and cut into trimmed buckets, gradients accumulated.
    Number of buckets and form of the attention loss are the fastest ones on this machine."""

    name, role = "careful", CAREFUL

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.taught_in = Teacher(self.teacher)
        counts = bucket_counts(self.batches["timed"])
        self.settings = tuple(Setting(count, form) for count in counts for form in SUMS)

    def prepare(self, batch: Batch, setting: Setting) -> list[Batch]:
        return batch.buckets(setting.buckets)

    def backward(self, batch: list[Batch], dtype: str, setting: Setting) -> Tensor:
        tokens = sum(part.tokens for part in batch)
        heads = self.student.config.num_attention_heads
        pairs = heads * sum(n * n for part in batch for n in part.lengths)
        entries = tokens * self.teacher.config.hidden_size
        total = torch.zeros((), device=self.device)
        for part in batch:
            attention, hidden = self._sums(part, dtype, SUMS[setting.form])
            loss = attention / pairs + hidden / entries
            loss.backward()
            total += loss.detach()
        return total

    def _sums(self, part: Batch, dtype: str, score_sum: Any) -> tuple[Tensor, Tensor]:
        """Squared differences summed over matched layers: of scores, of projected states."""
        teacher, matched = self.taught_in(dtype), range(1, self.layers + 1)
        with self.autocast(dtype):
            with (
                torch.no_grad(),
                queries_and_keys(teacher, [m * self.every for m in matched]) as theirs,
            ):
                taught = teacher(**part.inputs, output_hidden_states=True).hidden_states
            with queries_and_keys(self.student, list(matched)) as ours:
                states = self.student(**part.inputs, output_hidden_states=True).hidden_states
            real = part.attention_mask.bool()
            hidden = torch.zeros((), device=self.device)
            for m, state in enumerate(states):
                error = self.project(state[real]).float() - taught[m * self.every][real].float()
                hidden = hidden + error.square().sum()
        # Outside autocast: the Gram form subtracts numbers of one size, too much for bf16.
        attention = torch.zeros((), device=self.device)
        for m in matched:
            attention = attention + score_sum(
                *(
                    _heads(x, model.config.num_attention_heads, real)
                    for model, found in (
                        (self.student, ours[m]),
                        (teacher, theirs[m * self.every]),
                    )
                    for x in found
                )
            )
        return attention, hidden


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


def _heads(x: Tensor, heads: int, real: Tensor) -> Tensor:
    """(B, N, C) -> (B, H, N, D) in fp32, rows of padding zero."""
    x = x.float()
    if not bool(real.all()):
        x = x * real[..., None]
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
