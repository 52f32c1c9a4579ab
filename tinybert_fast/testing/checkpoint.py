"""A whole checkpoint, ours against Transformers' own code: `tinybert-fast validate --model`."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinybert_fast.testing.budgets import Verdict, compare, rounding
from tinybert_fast.testing.operands import is_float, normal
from tinybert_fast.testing.proofs import OwnCalls
from tinybert_fast.testing.validation import Finding

LENGTHS = (1, 128, 2, 31, 127)  # of the sequences, in tokens; padded on the right
# A result of many layers: the order of sums differs in each.
SLACK = 4
DTYPES = (torch.float32, torch.bfloat16)


def validate_checkpoint(
    model: Any, device: torch.device | str = "cpu", dtypes: Collection[torch.dtype] = DTYPES
) -> Iterator[Finding]:
    """Outputs of real tokens and the gradient of every parameter, at dropout 0.

    A finding per dtype for ``accelerate(model)`` where it takes the model, and one for
    ``attn_implementation="tinybert_fast"``. The error of either is held against that of
    Transformers' own code in the same dtype, both from fp64: in bf16 a small gradient may be lost
    within that, in fp32 none is. ops/dispatch.py chooses, as in training.

    Raises:
        ValueError: the model is no encoder of words.
    """
    from transformers import BertModel

    from tinybert_fast.integrations import accelerate

    config = model.config
    decodes = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    if decodes or not hasattr(config, "vocab_size"):
        raise ValueError(
            f"{type(model).__name__} is not an encoder of words: accelerate() and the attention "
            "plug-in leave it as it is, so there is nothing to validate"
        )
    model = model.eval().to(device)
    inputs = _inputs(config, device)
    lengths = " ".join(str(n) for n in inputs["attention_mask"].sum(1).tolist())

    ways: dict[str, Callable[[Any], Any]] = {
        "attention alone": lambda ours: ours.set_attn_implementation("tinybert_fast")
    }
    if any(isinstance(module, BertModel) for module in model.modules()):
        ways = {"accelerate()": accelerate, **ways}
    for dtype in dtypes:
        low = _results(copy.deepcopy(model).to(dtype), inputs, dtype)
        exact = _results(copy.deepcopy(model).double(), inputs, dtype)
        for way, change in ways.items():
            about = (type(model).__name__, way, dtype, f"lengths {lengths}")
            ours = copy.deepcopy(model).to(dtype)
            yield Finding.of(*about, partial(_hold, ours, change, inputs, dtype, low, exact))


def _hold(
    ours: Any,
    change: Callable[[Any], Any],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
    low: dict[str, Tensor],
    exact: dict[str, Tensor],
) -> list[Verdict]:
    change(ours)
    with OwnCalls() as calls:
        actual = _results(ours, inputs, dtype)
    if calls.count == 0:
        raise AssertionError("Transformers' own code ran, and was compared with itself")
    return compare(actual, low, exact, SLACK * rounding(dtype), _layer_of)


def _layer_of(name: str) -> str:
    """Gradients that budgets may compare: of one layer, or a tensor alone."""
    layer = re.match(r".*?\.\d+\.", name)
    return layer[0] if layer else name


def _inputs(config: Any, device: torch.device | str) -> dict[str, Tensor]:
    """Random words, LENGTHS or what the model's positions hold."""
    longest = min(max(LENGTHS), getattr(config, "max_position_embeddings", 128))
    lengths = torch.tensor([min(n, longest) for n in LENGTHS])
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(1, config.vocab_size, (len(lengths), longest), generator=source)
    mask = torch.arange(longest) < lengths[:, None]
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    return {name: x.to(device) for name, x in inputs.items()}


def _results(model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Every output, and the gradients of their product with normal ones, as "d" + parameter."""
    mask = inputs["attention_mask"].bool()
    found = {
        name: x[mask] if x.shape[:2] == mask.shape else x
        for name, x in model(**inputs).items()
        if is_float(x)
    }
    upstream = [
        normal(x.shape, seed, torch.float64, x.device).to(dtype).to(x.dtype)
        for seed, x in enumerate(found.values())
    ]
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(
        list(found.values()), list(parameters.values()), upstream, allow_unused=True
    )
    named = zip(parameters, gradients, strict=True)
    return {
        **{name: x.detach() for name, x in found.items()},
        **{f"d{name}": x for name, x in named if x is not None},
    }
