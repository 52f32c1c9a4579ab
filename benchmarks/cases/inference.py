"""Encoders that answer: BERT-base (12L-768) and the TinyBERTs 6L-768 and 4L-312 in eval mode,
without gradients, up to their last hidden state.

A sentence alone, of N = 128 tokens, has no padding; batches have lengths as drawn or every position
real. Weights are random: their values do not change the time. bf16 is that of the whole model, as
one loads it to answer, and not autocast.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tinybert_fast.benchmarks.baselines.plain_bert import (
    Form,
    any_shape,
    compile_frozen,
    encode,
    forms,
    spread,
)
from tinybert_fast.benchmarks.batches import Batch, bucket_counts, draw_batch, draw_lengths
from tinybert_fast.benchmarks.case import (
    BASELINE,
    CAREFUL,
    DTYPES,
    OURS,
    Case,
    Cases,
    Check,
    Outcome,
    Setup,
    Work,
)
from tinybert_fast.benchmarks.op_call import fastest
from tinybert_fast.benchmarks.step_work import forward_flops, parameters
from tinybert_fast.benchmarks.training_step import sharing
from tinybert_fast.integrations import TinyBertConfig, accelerate
from tinybert_fast.ops.layout import SequenceLayout

WIDTH, SMOKE_WIDTH = 128, 16
BATCHES, GPU_BATCHES = (1, 32), (1, 32, 256)
SMOKE_BATCH = 4
SMOKE_HEADS = 2
MODELS = ("12l_768", "6l_768", "4l_312")
SAME = "the inputs that are timed"


class Transformers:
    """(a) As it comes: SDPA, padding computed."""

    name, role = "transformers", BASELINE

    def __init__(self, model: Any, batch: Batch) -> None:
        self._models: dict[str, Any] = {"fp32": model.eval().requires_grad_(False)}
        self.batch, self.device = batch, batch.input_ids.device

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        """There is nothing to choose."""

    def setting(self, dtype: str) -> str:
        return ""

    @torch.no_grad()
    def run(self, dtype: str) -> list[tuple[Batch, Tensor]]:
        """Parts of the batch with their last hidden states (B, N, C)."""
        model = self.model_in(dtype)
        return [(self.batch, model(**self.batch.inputs).last_hidden_state)]

    def model_in(self, dtype: str) -> Any:
        if dtype not in self._models:
            self._models[dtype] = copy.deepcopy(self._models["fp32"]).to(DTYPES[dtype])
        return self._models[dtype]

    def outcome(self, what: str, dtype: str) -> Outcome:
        """Of tokens, the longest sequence first."""
        states = []
        for part, hidden in self.run(dtype):
            states += [hidden[b, : part.lengths[b]] for b in part.longest_first]
        return Outcome(torch.cat(states), {})


class Careful(Transformers):
    """(b) Sorted by length and cut into trimmed buckets, as many as are fastest here; compiled too
    if ``compiles``: on a CPU Transformers' model with its weights packed, on a GPU layers in
    buckets or packed."""

    name, role = "careful", CAREFUL

    def __init__(self, model: Any, batch: Batch, compiles: bool) -> None:
        super().__init__(model, batch)
        self._frozen: dict[str, Any] = {}
        found = [Form(count, False) for count in bucket_counts(batch)]
        if compiles and self.device.type == "cuda":
            found += [form for form in forms(batch) if form.compiled]  # packed in bf16 alone
        elif compiles:
            found += any_shape(batch)
        self.forms = {str(form): form for form in found}
        self.parts = {count: batch.buckets(count) for count in {form.buckets for form in found}}
        self._chosen: dict[str, str] = {}

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        def choose(setting: str) -> None:
            self._chosen[dtype] = setting

        fastest(self, dtype, tuple(self.forms), choose, seconds)

    def setting(self, dtype: str) -> str:
        return self._chosen.get(dtype, self._chosen.get("fp32", next(iter(self.forms))))

    @torch.no_grad()
    def run(self, dtype: str) -> list[tuple[Batch, Tensor]]:
        form = self.forms[self.setting(dtype)]
        model = self.model_in(dtype)
        if self.device.type == "cpu" and form.compiled:
            model = self._frozen.setdefault(dtype, compile_frozen(model))
        if self.device.type == "cpu" or not form.compiled:
            return [
                (part, model(**part.inputs).last_hidden_state) for part in self.parts[form.buckets]
            ]
        states = []
        for part in self.parts[form.buckets]:
            hidden = encode(model, part, compiled=True, packed=form.packed).hidden[-1]
            if form.packed:
                hidden = spread(hidden, part.places, part.shape)
            states.append((part, hidden))
        return states


class Ours(Transformers):
    """On a GPU with the layout from lengths on the host, as the collator gives them."""

    name, role = "ours", OURS

    def __init__(self, model: Any, batch: Batch) -> None:
        super().__init__(model, batch)
        self.layout: dict[str, SequenceLayout] = {}
        if self.device.type == "cuda":
            width = batch.input_ids.shape[1]
            self.layout["layout"] = SequenceLayout.from_lengths(batch.lengths, width, self.device)

    @torch.no_grad()
    def run(self, dtype: str) -> list[tuple[Batch, Tensor]]:
        model = self.model_in(dtype)
        return [(self.batch, model(**self.batch.inputs, **self.layout).last_hidden_state)]


def config_of(model: str, setup: Setup) -> Any:
    from transformers import BertConfig

    if setup.smoke:
        layers, width = (int(number) for number in model.replace("l", "").split("_"))
        return BertConfig(
            vocab_size=120,
            hidden_size=width // 12,
            num_hidden_layers=layers // 2,
            num_attention_heads=SMOKE_HEADS,
            intermediate_size=width // 6,
        )
    tiny = {"6l_768": TinyBertConfig.tiny_6l_768, "4l_312": TinyBertConfig.tiny_4l_312}
    return tiny[model]() if model in tiny else BertConfig()


def cases(setup: Setup, *, name: str, model: str, batch: int, full: bool) -> Iterator[Case]:
    from transformers import BertModel

    width = SMOKE_WIDTH if setup.smoke else WIDTH
    batch = min(batch, SMOKE_BATCH) if setup.smoke else batch
    torch.manual_seed(setup.seed)
    config = config_of(model, setup)
    with setup.device:
        bert = BertModel(config, add_pooling_layer=False)
    generator = setup.generator()
    lengths = [width] * batch if full else draw_lengths(batch, width, generator)
    drawn = draw_batch(lengths, width, config.vocab_size, generator, setup.device)
    providers = [
        Transformers(bert, drawn),
        Careful(sharing(bert), drawn, setup.compiles),
        Ours(accelerate(copy.deepcopy(bert)), drawn),
    ]
    yield Case(
        name=name,
        batch=batch,
        width=width,
        valid_tokens=drawn.tokens,
        dropout=0.0,
        optimizer="none",
        providers=providers,
        checks=(Check(SAME, "transformers", ("careful", "ours")),),
        phase="forward",
        work=partial(work_of, config, lengths),
        captured=True,
    )


def work_of(config: Any, lengths: list[int], dtype: str) -> Work:
    """Of the word embeddings, only the rows that are looked up are read."""
    spared = max(0, config.vocab_size - sum(lengths)) * config.hidden_size
    read = DTYPES[dtype].itemsize * (parameters(config) - spared)
    return Work(forward_flops(config, lengths), read)


def _named(batches: tuple[int, ...]) -> Cases:
    return {
        name: partial(cases, name=name, model=model, batch=batch, full=full)
        for batch in batches
        for full in ((True,) if batch == 1 else (False, True))
        for model in MODELS
        for name in (f"inference_{model}_b{batch}{'_full' if full and batch > 1 else ''}",)
    }


CASES, GPU_CASES = _named(BATCHES), _named(GPU_BATCHES)
