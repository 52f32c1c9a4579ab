"""A whole checkpoint, ours against Transformers' own code: `tinybert-fast validate --model`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tinybert_fast.testing.budgets import Verdict, compare, rounding
from tinybert_fast.testing.operands import is_float, normal
from tinybert_fast.testing.validation import Finding

LENGTHS = (1, 128, 2, 31, 127)  # of the sequences, in tokens; padded on the right
# A result of many layers: the order of sums differs in each.
SLACK = 4
DTYPES = (torch.float32, torch.bfloat16)


def validate_checkpoint(
    model: nn.Module,
    device: torch.device | str = "cpu",
    dtypes: Collection[torch.dtype] = DTYPES,
    impl: str = "auto",
) -> Iterator[Finding]:
    """Outputs of real tokens and the gradient of every parameter, at dropout 0.

    A finding per dtype for ``accelerate(model, impl=impl)`` where it takes the model, and one for
    ``attn_implementation="tinybert_fast"``, where attention chooses by itself. The error of either
    is held against that of Transformers' own code in the same dtype, both from fp64.
    """
    from transformers import BertModel

    from tinybert_fast.integrations import accelerate

    model = model.eval().to(device)
    inputs = _inputs(model, device)
    lengths = " ".join(str(n) for n in inputs["attention_mask"].sum(1).tolist())

    def hold(change: Callable[[Any], Any], dtype: torch.dtype) -> list[Verdict]:
        ours = copy.deepcopy(model).to(dtype)
        change(ours)
        actual = _results(ours, inputs, dtype)
        low = _results(copy.deepcopy(model).to(dtype), inputs, dtype)
        exact = _results(copy.deepcopy(model).double(), inputs, dtype)
        if actual.keys() != exact.keys():
            strange = sorted(actual.keys() ^ exact.keys())
            raise AssertionError(f"only one side has {strange[0]}")
        return compare(actual, low, exact, SLACK * rounding(dtype))

    ways: dict[str, Callable[[Any], Any]] = {
        "attention alone": lambda ours: ours.set_attn_implementation("tinybert_fast")
    }
    if any(isinstance(module, BertModel) for module in model.modules()):
        ways = {"accelerate()": partial(accelerate, impl=impl), **ways}
    for dtype in dtypes:
        for way, change in ways.items():
            about = (type(model).__name__, way, dtype, f"lengths {lengths}")
            yield Finding.of(*about, partial(hold, change, dtype))


def _inputs(model: Any, device: torch.device | str) -> dict[str, Tensor]:
    """Random words, LENGTHS or what the model's positions hold."""
    config = model.config
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
