"""Pre-training's losses, and the Trainer over them.

    off        L = MLM(x) + NSP(x)
    reverse    L = MLM(x) + MLM(reversed x) + NSP(x), each with masks of its own
    causal     L = LM(x, left to right) + LM(x, right to left) + NSP(x), without masks

Each term is a mean over what it predicts in one optimizer step, on all processes and micro-batches
together. Reversed x has the tokens of each segment in reversed order; [CLS] and [SEP] stay where
they are, and positions count from the left. In a causal pass a token is predicted from its
neighbour, and NSP reads [CLS] of the right-to-left pass, which alone sees the text. Bidirectional
training is this project's own definition; neither BERT nor TinyBERT has it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn

from tinybert_fast.data import LossWeights, PreTrainingCollator, RatioSchedule
from tinybert_fast.data.atomic import atomic_write
from tinybert_fast.data.collate import Columns, Rows, columns_of
from tinybert_fast.integrations.bert import is_accelerated
from tinybert_fast.modules.heads import predict, vocabulary_loss
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.ahead import Ahead
from tinybert_fast.training.common import TermsTrainer

BIDIRECTIONAL = ("off", "reverse", "causal")
COPIES = 2  # of an example with masks of their own in one epoch
LOGIT_ROWS = 1024  # alive at a time while a model is scored
TOKEN_LOSSES = "token_losses.safetensors"

Batches = list[dict[str, Any]]  # the micro-batches of a step


@dataclass(frozen=True)
class Objectives:
    """What is learnt: masked (or causal) tokens, the next sentence, or both."""

    mlm: bool = True
    nsp: bool = True
    bidirectional: str = "off"

    def __post_init__(self) -> None:
        if self.bidirectional not in BIDIRECTIONAL:
            raise ValueError(
                f"bidirectional is {self.bidirectional!r}; expected one of "
                f"{', '.join(BIDIRECTIONAL)}"
            )
        if not (self.mlm or self.nsp):
            raise ValueError("neither masked tokens nor next sentences: nothing is left to learn")
        if self.bidirectional != "off" and not self.mlm:
            raise ValueError(
                f"bidirectional={self.bidirectional!r} is a loss of tokens; it needs mlm=True"
            )

    def check_packed(self, packed: bool) -> None:
        """A causal pass reads rows without padding, of an accelerated model."""
        if self.bidirectional == "causal" and not packed:
            raise ValueError(
                "bidirectional='causal' needs packed rows: accelerate the model (no --plain)"
            )

    @property
    def passes(self) -> int:
        """Of the encoder over a batch."""
        return 2 if self.bidirectional == "causal" else 1

    @property
    def masks(self) -> bool:
        return self.mlm and self.bidirectional != "causal"

    @property
    def token_terms(self) -> tuple[str, ...]:
        if not self.mlm:
            return ()
        return {
            "off": ("mlm",),
            "reverse": ("mlm_forward", "mlm_backward"),
            "causal": ("lm_forward", "lm_backward"),
        }[self.bidirectional]


class PreTrainingBatches:
    """Rows of shards, or columns of them -> what `PreTraining` reads, for B examples padded to N.

    input_ids, attention_mask, token_type_ids: int64 (P, N), P = 2 B with reversed copies, else B.
    lengths: list of P numbers. next_sentence_label: int64 (B,), where NSP is learnt.
    targets: {term: (rows, labels)}, int64 (R,) each: flat places p * N + n that predict, and what.
    """

    def __init__(self, collator: PreTrainingCollator, objectives: Objectives):
        self.collator, self.objectives = collator, objectives
        tokenizer = collator.masking.tokenizer
        self._ordinary = torch.ones(len(tokenizer), dtype=torch.bool)
        self._ordinary[tokenizer.all_special_ids] = False

    def __call__(self, examples: Sequence[Mapping] | Columns, epoch: int = 0) -> dict[str, Any]:
        """Another epoch gives every example another mask."""
        terms = self.objectives.token_terms
        copies = [columns_of(examples)]
        if self.objectives.bidirectional == "reverse":
            copies.append(self.collator.reversed(copies[0]))
        made = []
        for number, copy in enumerate(copies):
            self.collator.set_step(epoch * COPIES + number)
            made.append(self.collator(copy))
        batch: dict[str, Any] = {
            name: torch.cat([one[name] for one in made])
            for name in ("input_ids", "attention_mask", "token_type_ids")
        }
        batch["lengths"] = made[0]["lengths"] * len(made)
        if self.objectives.nsp:
            batch["next_sentence_label"] = made[0]["next_sentence_label"]
        if self.objectives.masks:
            cells = made[0]["input_ids"].numel()
            targets = [
                (one["masked_rows"] + number * cells, one["masked_labels"])
                for number, one in enumerate(made)
            ]
        else:
            ids = batch["input_ids"].flatten()
            places = self._ordinary[ids].nonzero().squeeze(1)  # between [CLS] and [SEP]
            targets = [(places - 1, ids[places]), (places + 1, ids[places])]
        batch["targets"] = dict(zip(terms, targets))
        return batch


class Run(NamedTuple):
    """What a run of the encoder gives."""

    first: Tensor  # (P, 1, C), states of first tokens
    terms: dict[str, Tensor]  # (R, C), states that predict


class PreTraining(nn.Module):
    """What is trained: a BertForPreTraining. Forward gives sums of losses, heads run on the rows
    that predict alone.
    """

    def __init__(self, model: Any, objectives: Objectives):
        super().__init__()
        self.model, self.objectives = model, objectives
        heads = model.cls
        unused: list[nn.Module] = []
        if not objectives.mlm:
            unused.append(heads.predictions.transform)
            heads.predictions.bias.requires_grad_(False)
        if not objectives.nsp:
            unused += [model.bert.pooler, heads.seq_relationship]
        for module in unused:  # their weights stay as they are
            module.requires_grad_(False)
        objectives.check_packed(is_accelerated(model))

    def forward(self, batch: Mapping[str, Any], *, each: bool = False, scores: bool = False) -> Any:
        """(sums of the terms, fp32 scalars by name; None). With ``each``, in the place of None, the
        losses (R,) of all token targets in order, without a gradient. ``scores``: see there.
        """
        if scores:
            return self.scores(batch)
        sums: dict[str, Tensor] = {}
        single: list[Tensor] = []
        runs = self.runs(batch)
        for run in runs:
            for term, states in run.terms.items():
                labels = batch["targets"][term][1]
                losses = vocabulary_loss(
                    self.model.cls.predictions,
                    states,
                    labels,
                    reduction="none" if each else "sum",
                    impl=self.impl,
                )
                sums[term] = losses.sum()
                if each:
                    single.append(losses.detach())
        if self.objectives.nsp:
            labels = batch["next_sentence_label"]
            order = self.order_of(runs[-1].first, labels)
            sums["nsp"] = F.cross_entropy(order.float(), labels, reduction="sum")
        return sums, torch.cat(single) if single else None

    @property
    def impl(self) -> Any:
        return getattr(self.model, "fast_impl", "auto")

    def order_of(self, first: Tensor, labels: Tensor) -> Tensor:
        """NSP's logits (B, 2) of the last pass's first tokens (P, 1, C)."""
        pooled = self.model.bert.pooler(first[: len(labels)])
        return self.model.cls.seq_relationship(pooled)

    def runs(self, batch: Mapping[str, Any]) -> list[Run]:
        """One run of the encoder, or one in each direction."""
        terms = list(batch["targets"])
        causal = self.objectives.bidirectional == "causal"
        ways = [("causal", terms[:1]), ("anti_causal", terms[1:])] if causal else [("both", terms)]
        names = ("input_ids", "attention_mask", "token_type_ids")
        inputs = {name: batch[name] for name in names if name in batch}
        found = []
        for direction, of in ways:
            rows = [batch["targets"][term][0] for term in of]
            first, *states = self.states(batch, inputs, rows, direction)
            found.append(Run(first.unsqueeze(1), dict(zip(of, states))))
        return found

    def states(
        self,
        batch: Mapping[str, Any],
        inputs: dict[str, Tensor],
        rows: list[Tensor],
        direction: str,
    ) -> list[Tensor]:
        """The last hidden states of first tokens (P, C) and of flat places (R, C) each."""
        sequences, width = inputs["input_ids"].shape
        starts = torch.arange(sequences, device=inputs["input_ids"].device) * width
        layout = batch.get("layout")
        parts = [starts if layout is None else starts[: sequences - layout.dummies], *rows]
        wanted = torch.cat(parts)
        bert = self.model.bert  # of the model's own heads none is called, whatever was done to them
        if is_accelerated(bert):
            layout = layout or SequenceLayout.from_mask(inputs["attention_mask"])
            padding = starts - layout.cu_seqlens[:-1]  # in front of each sequence
            read = wanted - padding[wanted // width]
            how = {"direction": direction, "layout": layout, "read": read, "return_dict": True}
            packed = bert(packed=True, **how, **inputs)
            if packed is not None:
                return list(packed.rows.split([len(part) for part in parts]))
        self.objectives.check_packed(False)
        hidden = bert(**inputs).last_hidden_state.flatten(0, 1)
        return list(hidden.index_select(0, wanted).split([len(part) for part in parts]))

    @torch.no_grad()
    def scores(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """{term: (sum of losses, right answers, answers)}, float64 (3,)."""
        found: dict[str, Tensor] = {}
        runs = self.runs(batch)
        for run in runs:
            for term, states in run.terms.items():
                labels = batch["targets"][term][1]
                found[term] = states.new_zeros(3, dtype=torch.float64)
                for some, target in zip(states.split(LOGIT_ROWS), labels.split(LOGIT_ROWS)):
                    logits = predict(self.model.cls.predictions, some, impl=self.impl)
                    found[term] += _score(logits, target)
        if self.objectives.nsp:
            labels = batch["next_sentence_label"]
            found["nsp"] = _score(self.order_of(runs[-1].first, labels), labels)
        return found

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        enable = getattr(self.model, "activation_checkpointing_enable", None)
        (enable or self.model.gradient_checkpointing_enable)(**kwargs)

    gradient_checkpointing_enable = activation_checkpointing_enable  # before Transformers 5.24


def _score(logits: Tensor, labels: Tensor) -> Tensor:
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, reduction="sum").double()
    right = (logits.argmax(-1) == labels).sum()
    return torch.stack([loss, right.double(), loss.new_tensor(len(labels))])


@dataclass
class Examples:
    """What a loader read. Opaque, so that nobody looks for tensors in it."""

    rows: Sequence[Mapping] | Columns


class PreTrainingTrainer(TermsTrainer):
    """Trains a BertForPreTraining, accelerated or not, on rows of ``open_shards``.

    Batches are masked here, by the ratio and weights of their step, which are the same after a
    restart; while a step runs, those of the next one are made on a thread (`ahead`). ``ratio``: of
    masked tokens over the steps. ``losses``: token weights that follow training; checkpointed, and
    equal on every process. They are known when a step has ended, so nothing is made ahead.
    Logs also ``tokens_per_second`` (real tokens through the encoder, all processes) and, where it
    changes, ``masking_ratio``.
    """

    gives_sums = True

    def __init__(
        self,
        model: Any,
        *,
        collator: PreTrainingCollator,
        objectives: Objectives,
        ratio: RatioSchedule | None = None,
        losses: LossWeights | None = None,
        held_out: PreTrainingBatches | None = None,
        **trainer: Any,
    ) -> None:
        super().__init__(model=PreTraining(model, objectives), data_collator=Examples, **trainer)
        self.batches = PreTrainingBatches(collator, objectives)
        self.held_out = held_out
        self.ratio, self.losses = ratio, losses
        self.ahead: Ahead[Batches] | None = None
        self.waited = self.seconds = 0.0
        self.tokens = 0
        self._since: tuple[float, int] | None = None  # of the last log: time, tokens
        self._token_losses: list[tuple[Tensor, Tensor]] = []

    # ---- batches ----

    @property
    def looks_ahead(self) -> bool:
        """Whether a thread makes the next batches. It stays away from GPUs: each thread has a
        current one of its own, and a call of another thread ends a capture.
        """
        return self.losses is None and self.batches.collator.masking.device == "cpu"

    def train(self, *args, **kwargs):
        if not self.looks_ahead:
            return super().train(*args, **kwargs)
        with Ahead[Batches]() as self.ahead:
            return super().train(*args, **kwargs)

    def batches_of(self, loader, count):
        """Masked."""
        start = time.perf_counter()
        if self._since is None:
            self._since = (start, self.tokens)
        step, epoch = self.state.global_step, int((self.state.epoch or 0.0) + 1e-6)
        now = partial(self._masked, loader, count, step, epoch)
        if self.ahead is None:
            batches = now()
        else:
            # An epoch's first batches are made here: a loader that begins draws from torch's
            # generator, and may ask other processes.
            batches = self.ahead.take(loader, now)
            last = self.accelerator.gradient_state.end_of_dataloader
            if not last and step + 1 < self.state.max_steps:
                most = self.args.gradient_accumulation_steps  # an epoch's last step may have fewer
                self.ahead.begin(loader, partial(self._masked, loader, most, step + 1, epoch))
        self.waited += time.perf_counter() - start
        for batch in batches:
            self.tokens += sum(batch["lengths"]) * self.batches.objectives.passes
        return batches

    def _masked(self, loader: Iterator[Examples], count: int, step: int, epoch: int) -> Batches:
        """The next micro-batches, of a step and an epoch."""
        if self.ratio is not None and self.batches.objectives.masks:
            self.batches.collator.set_ratio(self.ratio(step, self.state.max_steps))
        return [self.batches(one.rows, epoch) for one in islice(loader, count)]

    def _remove_unused_columns(self, dataset, description=None):
        return Rows(dataset)

    def counts(self, batch: dict[str, Any]) -> Tensor:
        """Of each term: what it predicts."""
        found = [len(labels) for _, labels in batch["targets"].values()]
        if self.batches.objectives.nsp:
            found.append(len(batch["next_sentence_label"]))
        return torch.tensor(found)

    # ---- the loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        sums, each = model(inputs, each=self.losses is not None)
        if each is not None:
            self.left["token_losses"] = each
            self.left["tokens"] = torch.cat([labels for _, labels in inputs["targets"].values()])
        loss = self.sum_of(sums, inputs["shares"])
        return (loss, sums) if return_outputs else loss

    def read(self, found: dict[str, Tensor]) -> None:
        super().read(found)
        if self.losses is None:
            return
        self._token_losses.append((found["tokens"], found["token_losses"]))
        if len(self._token_losses) == self.current_gradient_accumulation_steps:
            labels, each = (torch.cat(parts) for parts in zip(*self._token_losses))
            self._token_losses.clear()
            self.losses.update(labels, each, self._over_processes)
            self._weigh()

    def speed(self) -> dict[str, float]:
        """Of the steps since this trainer was made; evaluation does not count. All processes ask.

        tokens_per_second: real tokens through the encoders. waiting_for_data: share of the time in
        which this process had no batch: it made one, or waited for one to be made.
        """
        seconds = max(self.seconds, 1e-9)
        here = torch.tensor(self.tokens / seconds, device=self.args.device)
        return {
            "tokens_per_second": self._over_processes(here).item(),
            "waiting_for_data": self.waited / seconds,
        }

    def _over_processes(self, x: Tensor) -> Tensor:
        return self.accelerator.reduce(x, reduction="sum")

    def _weigh(self) -> None:
        assert self.losses is not None
        self.batches.collator.set_token_weights(self.losses.weights().cpu())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._since is not None:
            now = time.perf_counter()
            since, before = self._since
            here = torch.tensor((self.tokens - before) / (now - since), device=self.args.device)
            logs["tokens_per_second"] = self._over_processes(here).item()
            self._since = (now, self.tokens)
            self.seconds += now - since
            if self.ratio is not None and self.ratio.end is not None:
                step = self.state.global_step - 1  # which has ended
                logs["masking_ratio"] = self.ratio(step, self.state.max_steps)
        super().log(logs, start_time)

    # ---- held-out text ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Loss and accuracy of each term on held-out rows. Each process takes its share of the
        batches; all run equally many, since a sharded model needs everyone in each forward.
        """
        rows = Rows(self.eval_dataset if eval_dataset is None else eval_dataset)
        assert self.held_out is not None
        if self._since is not None:  # the next speed to be logged is one of training again
            self.seconds += time.perf_counter() - self._since[0]
            self._since = None
        ranks, size = self.args.world_size, self.args.eval_batch_size
        starts = range(0, len(rows), size)
        found: dict[str, Tensor] = {}
        self.model.eval()
        for turn in range(-(-len(starts) // ranks)):
            number = turn * ranks + self.args.process_index
            start = starts[min(number, len(starts) - 1)]
            examples = rows.__getitems__(range(start, min(start + size, len(rows))))
            batch = self._prepare_inputs(self.held_out(examples))
            with self.accelerator.autocast():
                scores = self.model(batch, scores=True)
            for term, score in scores.items():
                score = score * (number < len(starts))
                found[term] = found[term] + score if term in found else score
        metrics: dict[str, float] = {}
        total = 0.0
        for term, score in found.items():
            loss, right, answers = self._over_processes(score).tolist()
            metrics[f"{metric_key_prefix}_{term}_loss"] = loss / max(1.0, answers)
            metrics[f"{metric_key_prefix}_{term}_accuracy"] = right / max(1.0, answers)
            total += loss / max(1.0, answers)
        metrics[f"{metric_key_prefix}_loss"] = total
        self.log(dict(metrics))  # to which the epoch is added
        self.control: Any = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    # ---- checkpoints ----

    def save_beside(self, folder: Path) -> None:
        if self.losses is not None:
            state = {name: x.cpu() for name, x in self.losses.state_dict().items()}
            atomic_write(folder / TOKEN_LOSSES, save(state))

    def load_beside(self, folder: Path) -> None:
        if self.losses is not None:
            self.losses.load_state_dict(load_file(str(folder / TOKEN_LOSSES)))
            self._weigh()
