"""BERT's encoder in plain PyTorch, written to be compiled: functions of tensors alone, no hooks, no
sizes read from the device. Parameters, and the places that drop, are those of a BertModel.

One layer is compiled, not the model: its code serves all layers of a model, at a fraction of the
compiler's time, and nothing is fused across layers in either.

`encode` runs padded batches, or tokens alone (T, C), packed, with PyTorch's own FlashAttention-2
between two compiled halves of a layer. A compiler could not fuse anything into that operator, and
called from outside it needs nothing of the compiler: its formula for autograd is all it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast.benchmarks.baselines.attention import flash_varlen
from tinybert_fast.benchmarks.batches import Batch, bucket_counts
from tinybert_fast.benchmarks.case import Unavailable, one_line

BACKEND = "inductor"
MOST_SHAPES = (
    64  # of one function in a case: buckets, two models, dtypes, with and without gradients
)
ANY_SHAPE = None  # torch.compile's default: for the first shape it meets, then for any
# Numbers: fused SDPA kernels with a mask, and FlashAttention, take head widths that divide by it.
ALIGNED = 8
LAYER = (
    "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
    "attention.output.LayerNorm", "intermediate.dense", "output.dense", "output.LayerNorm",
)  # fmt: skip


# Length buckets tried of a batch with padding: a shape costs seconds of compilation, so few; on a
# CPU one compilation serves all.
COMPILED, EAGER = (1, 2), (4, 8)
COMPILED_ON_CPU = (4, 8)
# Where FlashAttention serves packed rows, by device and dtype: a CPU has no such operator in
# PyTorch, and fp32 has no such kernel.
PACKED = {("cuda", "bf16")}


class Form(NamedTuple):
    """``packed``: tokens alone, in one bucket."""

    buckets: int
    compiled: bool
    packed: bool = False

    def __str__(self) -> str:
        return f"{self.layout}{', compiled' if self.compiled else ''}"

    @property
    def layout(self) -> str:
        return "packed" if self.packed else f"length buckets: {self.buckets}"


Offer = Callable[[Batch], tuple[Form, ...]]  # the forms that are tried of a batch


def forms(batch: Batch) -> tuple[Form, ...]:
    """What is tried: everything compiled, or cut into more buckets than one compiles for."""
    if batch.is_full:
        return (Form(1, True),)
    both = [*(Form(n, True) for n in COMPILED), *(Form(n, False) for n in EAGER)]
    fitting = (form for form in both if form.buckets <= len(batch.lengths))
    return (*fitting, Form(1, True, packed=True))


def one_shape(batch: Batch) -> tuple[Form, ...]:
    """What is tried with everything compiled and in one bucket."""
    return tuple(form for form in forms(batch) if form.compiled and form.buckets == 1)


def any_shape(batch: Batch) -> tuple[Form, ...]:
    """What is tried with everything compiled on a CPU."""
    counts = (1,) if batch.is_full else COMPILED_ON_CPU
    return tuple(Form(n, True) for n in dict.fromkeys(min(n, len(batch.lengths)) for n in counts))


def eager_forms(batch: Batch) -> tuple[Form, ...]:
    """What is tried without a compiler."""
    packed = () if batch.is_full else (Form(1, False, packed=True),)
    return (*(Form(count, False) for count in bucket_counts(batch)), *packed)


def serves(form: Any, device: torch.device, dtype: str) -> bool:
    """Whether to try it there. Where packed rows are served, several buckets uncompiled are not:
    they compute more positions in more launches, and their attention has a mask."""
    packs = (device.type, dtype) in PACKED
    return packs if form.packed else not packs or form.compiled or form.buckets == 1


class States(NamedTuple):
    """Hidden states 0..M (B, N, C), the last (R, C) if only some rows are read; queries and keys
    (B, N, C) of layers 1..M, at 0..M - 1. Packed: states (T, C), queries and keys (T, H, D)."""

    hidden: list[Tensor]
    queries: list[Tensor]
    keys: list[Tensor]


def run_layer(
    mask: Tensor | None,
    hidden: Tensor,
    weights: tuple[Tensor, ...],
    heads: int,
    eps: float,
    attention_p: float,
    hidden_p: float,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, C) -> the layer's output, queries and keys, (B, N, C) each. ``weights``: of LAYER.
    ``read``: flat places (R,), and the output is (R, C) of these."""
    w_q, b_q, w_k, b_k, w_v, b_v = weights[:6]
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
    return _behind_attention(hidden, context, weights[6:], eps, hidden_p), q, k


def _behind_attention(
    hidden: Tensor, context: Tensor, weights: tuple[Tensor, ...], eps: float, hidden_p: float
) -> Tensor:
    """``weights``: of LAYER from attention.output.dense on."""
    w_o, b_o, g_1, c_1, w_1, b_1, w_2, b_2, g_2, c_2 = weights
    hidden = hidden + F.dropout(F.linear(context, w_o, b_o), hidden_p, hidden_p > 0.0)
    hidden = F.layer_norm(hidden, hidden.shape[-1:], g_1, c_1, eps)
    inner = F.gelu(F.linear(hidden, w_1, b_1))
    hidden = hidden + F.dropout(F.linear(inner, w_2, b_2), hidden_p, hidden_p > 0.0)
    return F.layer_norm(hidden, hidden.shape[-1:], g_2, c_2, eps)


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, C) -> (B, H, N, D), on a GPU with zeros up to an aligned width."""
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    missing = -x.shape[-1] % ALIGNED if x.is_cuda else 0
    return F.pad(x, (0, missing)) if missing else x


def run_packed_layer(
    compiled: bool,
    cu_seqlens: Tensor,
    longest: int,
    hidden: Tensor,
    weights: tuple[Tensor, ...],
    heads: int,
    eps: float,
    attention_p: float,
    hidden_p: float,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(T, C) -> the layer's output (T, C), queries and keys (T, H, D). ``read``: of the T tokens
    the numbers (R,) of these alone."""
    before, behind = project_packed, finish_packed
    if compiled:
        before, behind = (compile_once(half, hidden.device) for half in (before, behind))
    q, k, v = before(hidden, weights[:6], heads).unbind(1)
    size = hidden.shape[-1] // heads
    context = flash_varlen(cu_seqlens, longest, q, k, v, dropout_p=attention_p, scale=size**-0.5)
    hidden = behind(hidden, context, weights[6:], eps, hidden_p, read)
    return hidden, q[..., :size], k[..., :size]


def project_packed(hidden: Tensor, weights: tuple[Tensor, ...], heads: int) -> Tensor:
    """(T, C) -> queries, keys and values (T, 3, H, D) in one product, heads widened by zeros in the
    weights to an aligned width."""
    size = hidden.shape[-1] // heads
    missing = -size % ALIGNED
    weight, bias = (
        torch.stack(each).unflatten(1, (heads, size)) for each in (weights[::2], weights[1::2])
    )
    weight, bias = F.pad(weight, (0, 0, 0, missing)), F.pad(bias, (0, missing))
    return F.linear(hidden, weight.flatten(0, 2), bias.flatten()).unflatten(-1, bias.shape)


def finish_packed(
    hidden: Tensor,
    context: Tensor,
    weights: tuple[Tensor, ...],
    eps: float,
    hidden_p: float,
    read: Tensor | None,
) -> Tensor:
    """What lies behind the attention, whose ``context`` is (T, H, D) with heads as wide as
    `project_packed` made them."""
    w_o, *rest = weights
    _, heads, wide = context.shape
    w_o = w_o.unflatten(1, (heads, -1))
    w_o = F.pad(w_o, (0, wide - w_o.shape[-1])).flatten(1)
    context = context.flatten(1)
    if read is not None:
        context, hidden = context.index_select(0, read), hidden.index_select(0, read)
    return _behind_attention(hidden, context, (w_o, *rest), eps, hidden_p)


def encode(
    bert: Any, batch: Batch, *, compiled: bool, packed: bool = False, read: Tensor | None = None
) -> States:
    """All states of ``bert``. ``read``: flat places (R,) of a padded batch, all that the last layer
    computes behind its attention."""
    run: Callable[..., Any]
    if packed:
        hidden = bert.embeddings(**batch.packed_inputs).squeeze(0)
        run = partial(run_packed_layer, compiled, batch.cu_seqlens, max(batch.lengths))
        read = None if read is None else batch.packed_rows.index_select(0, read)
    else:
        hidden = bert.embeddings(input_ids=batch.input_ids, token_type_ids=batch.token_type_ids)
        mask = None if batch.is_full else batch.attention_mask.bool()[:, None, None]  # (B, 1, 1, N)
        run = partial(compile_once(run_layer, hidden.device) if compiled else run_layer, mask)
    found = States([hidden], [], [])
    last = bert.encoder.layer[-1]
    for block in bert.encoder.layer:
        attention = block.attention
        hidden, q, k = run(
            hidden,
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


def spread(rows: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """Packed (T, ...) -> (B, N, ...), zeros at padding. ``places``: flat ones (T,) in ``shape``."""
    batch, width = shape
    zeros = rows.new_zeros(batch * width, *rows.shape[1:])
    return zeros.index_copy(0, places, rows).unflatten(0, shape)


def _weight_and_bias(block: Any, name: str) -> tuple[Tensor, Tensor]:
    module = block.get_submodule(name)
    return module.weight, module.bias


def rate(dropout: Any) -> float:
    return dropout.p if dropout.training else 0.0


@cache
def compile_once(function: Callable, device: torch.device) -> Any:
    """``function`` compiled, on a GPU for each set of shapes, on a CPU for any from the second on;
    what cannot be compiled whole raises."""
    return _compile(function, dynamic=False if device.type == "cuda" else ANY_SHAPE)


def compile_frozen(model: Any) -> Any:
    """A model that only answers, compiled whole for a CPU: its weights are constants, which
    Inductor packs beforehand as the products want them."""
    return _compile(model, dynamic=ANY_SHAPE, options={"freezing": True})


def _compile(what: Any, **how: Any) -> Any:
    from torch import _dynamo  # takes a second

    _dynamo.config.recompile_limit = MOST_SHAPES
    _dynamo.config.specialize_float = True  # a dropout rate is none of the sizes that vary
    return torch.compile(what, fullgraph=True, backend=BACKEND, **how)


@contextmanager
def available() -> Iterator[None]:
    """What a compiler raises in the block, its errors are of many kinds, is `Unavailable`."""
    try:
        yield
    except Unavailable:
        raise
    except Exception as error:
        raise Unavailable(one_line(error)) from error
