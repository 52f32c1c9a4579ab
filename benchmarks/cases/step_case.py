"""What the steps of one model share: a student, a batch, the providers. All compute the same loss
and gradients, whatever the padding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import transformers

from tinybert_fast.benchmarks.baselines.one_model import (
    CarefulStep,
    PlainStep,
    Task,
    TaskStep,
    TransformersStep,
)
from tinybert_fast.benchmarks.baselines.plain_bert import any_shape, one_shape
from tinybert_fast.benchmarks.batches import FILL, draw_batch, draw_lengths
from tinybert_fast.benchmarks.case import COMPILED, OURS, Case, Check, Setup, Work
from tinybert_fast.benchmarks.training_step import OPTIMIZER, GraphedStep
from tinybert_fast.integrations import TinyBertConfig, accelerate

SMOKE_BATCH, SMOKE_WIDTH = 4, 16
RAGGED = "lengths as timed"


class AcceleratedStep(TransformersStep):
    """The same call of an accelerated model."""

    name, role = "ours", OURS


def step_case(
    setup: Setup,
    *,
    task: Task,
    ours: Callable[..., TaskStep],
    work: Callable[..., Work],
    name: str,
    batch: int,
    width: int,
    fill: float = FILL,
) -> Iterator[Case]:
    """``work``: of config, lengths, number of labelled tokens, dtype."""
    if setup.smoke:
        batch, width = min(batch, SMOKE_BATCH), min(width, SMOKE_WIDTH)
    generator = setup.generator()
    torch.manual_seed(setup.seed)
    with setup.device:
        model = getattr(transformers, task.model)(student_config(setup))
    lengths = draw_lengths(batch, width, generator, fill)
    drawn = draw_batch(lengths, width, model.config.vocab_size, generator, setup.device)
    common = {"timed": drawn, RAGGED: drawn}, setup.dropout

    def plain(step: Any, **how: Any) -> Any:
        return step(task, copy.deepcopy(model), *common, **how)

    def fast() -> Any:
        return ours(task, accelerate(copy.deepcopy(model)), *common)

    providers = [plain(TransformersStep), plain(CarefulStep)]
    if setup.on_gpu:
        providers += [
            plain(PlainStep, name=COMPILED, offered=one_shape),
            GraphedStep("careful graph", plain(PlainStep)),
            fast(),
            GraphedStep("ours graph", fast()),
        ]
    else:
        if setup.compiles:
            providers.append(plain(PlainStep, name=COMPILED, offered=any_shape))
        providers.append(fast())
    yield Case(
        name=name,
        batch=batch,
        width=width,
        valid_tokens=drawn.tokens,
        dropout=setup.dropout,
        optimizer=OPTIMIZER,
        providers=providers,
        checks=(Check(RAGGED, "transformers", tuple(one.name for one in providers[1:])),),
        work=partial(work, model.config, drawn.lengths, len(drawn.labelled)),
    )


def student_config(setup: Setup) -> Any:
    """TinyBERT-4L-312 (12 heads of 26, 30522 word pieces), or its smoke size."""
    dropout = {
        "hidden_dropout_prob": setup.dropout,
        "attention_probs_dropout_prob": setup.dropout,
    }
    tiny = {
        "vocab_size": 120,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
    }
    return TinyBertConfig.tiny_4l_312(**dropout, **(tiny if setup.smoke else {}))
