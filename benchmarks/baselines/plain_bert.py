"""BERT's encoder in plain PyTorch, written to be compiled: functions of tensors alone, no hooks, no
sizes read from the device. Parameters, and the places that drop, are those of a BertModel.

One layer is compiled, not the model: its code serves all layers of a model, at a fraction of the
compiler's time, and nothing is fused across layers in either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast.benchmarks.batches import Batch
from tinybert_fast.benchmarks.case import Unavailable, one_line

BACKEND = "inductor"
MOST_SHAPES = (
    64  # of one function in a case: buckets, two models, dtypes, with and without gradients
)
ALIGNED = 8  # numbers; a fused SDPA kernel with a mask takes head widths that divide by it
LAYER = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip


# Length buckets tried of a batch with padding: a shape costs seconds of compilation, so few.
COMPILED, EAGER = (1, 2), (4, 8)


class Form(NamedTuple):
    buckets: int
    compiled: bool

    def __str__(self) -> str:
        return f"length buckets: {self.buckets}{', compiled' if self.compiled else ''}"


def forms(batch: Batch) -> tuple[Form, ...]:
    """What is tried: everything compiled, or cut into more buckets than one compiles for."""
    if batch.is_full:
        return (Form(1, True),)
    both = [*(Form(n, True) for n in COMPILED), *(Form(n, False) for n in EAGER)]
    return tuple(form for form in both if form.buckets <= len(batch.lengths))


class States(NamedTuple):
    """Hidden states 0..M (B, N, C), the last (R, C) if only some rows are read; queries and keys
    (B, N, C) of layers 1..M, at 0..M - 1."""

    hidden: list[Tensor]
    queries: list[Tensor]
    keys: list[Tensor]


def run_layer(
    hidden: Tensor,
    mask: Tensor | None,
    weights: tuple[Tensor, ...],
    heads: int,
    eps: float,
    attention_p: float,
    hidden_p: float,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, C) -> the layer's output, queries and keys, (B, N, C) each. ``weights``: of LAYER.
    ``read``: flat places (R,), and the output is (R, C) of these."""
    w_q, b_q, w_k, b_k, w_v, b_v, w_o, b_o, g_1, c_1, w_1, b_1, w_2, b_2, g_2, c_2 = weights
    q, k, v = F.linear(hidden, w_q, b_q), F.linear(hidden, w_k, b_k), F.linear(hidden, w_v, b_v)
    size = q.shape[-1] // heads
    context = F.scaled_dot_product_attention(
        _heads(q, heads),
        _heads(k, heads),
        _heads(v, heads),
        attn_mask=mask,
        dropout_p=attention_p,
        scale=size**-0.5,
    )
    context = context[..., :size].transpose(1, 2).flatten(2)
    if read is not None:
        context, hidden = (x.flatten(0, 1).index_select(0, read) for x in (context, hidden))
    hidden = hidden + F.dropout(F.linear(context, w_o, b_o), hidden_p, hidden_p > 0.0)
    hidden = F.layer_norm(hidden, hidden.shape[-1:], g_1, c_1, eps)
    inner = F.gelu(F.linear(hidden, w_1, b_1))
    hidden = hidden + F.dropout(F.linear(inner, w_2, b_2), hidden_p, hidden_p > 0.0)
    return F.layer_norm(hidden, hidden.shape[-1:], g_2, c_2, eps), q, k


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, H, N, D), on a GPU with zeros up to an aligned width."""
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    missing = -x.shape[-1] % ALIGNED if x.is_cuda else 0
    return F.pad(x, (0, missing)) if missing else x


def encode(
    bert: Any,
    inputs: dict[str, Tensor],
    *,
    full: bool,
    compiled: bool,
    read: Tensor | None = None,
) -> States:
    """All states of ``bert`` on a padded batch. ``full``: no position is padding. ``read``: flat
    places (R,), all that the last layer computes behind its attention."""
    layer = compile_once(run_layer) if compiled else run_layer
    mask = None if full else inputs["attention_mask"].bool()[:, None, None]  # (B, 1, 1, N)
    hidden = bert.embeddings(input_ids=inputs["input_ids"], token_type_ids=inputs["token_type_ids"])
    found = States([hidden], [], [])
    last = bert.encoder.layer[-1]
    for block in bert.encoder.layer:
        attention = block.attention
        hidden, q, k = layer(
            hidden,
            mask,
            tuple(x for name in LAYER for x in _weight_and_bias(block, name)),
            attention.self.num_attention_heads,
            block.output.LayerNorm.eps,
            rate(attention.self.dropout),
            rate(block.output.dropout),
            read if block is last else None,
        )
        found.hidden.append(hidden)
        found.queries.append(q)
        found.keys.append(k)
    return found


def _weight_and_bias(block: Any, name: str) -> tuple[Tensor, Tensor]:
    module = block.get_submodule(name)
    return module.weight, module.bias


def rate(dropout: Any) -> float:
    return dropout.p if dropout.training else 0.0


@cache
def compile_once(function: Callable) -> Any:
    """``function`` compiled for each set of shapes; what cannot be compiled whole raises."""
    from torch import _dynamo  # takes a second

    _dynamo.config.recompile_limit = MOST_SHAPES
    return torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND)


@contextmanager
def available() -> Iterator[None]:
    """What a compiler raises in the block, its errors are of many kinds, is `Unavailable`."""
    try:
        yield
    except Exception as error:
        raise Unavailable(one_line(error)) from error
