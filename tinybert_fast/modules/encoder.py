"""BERT's encoder on packed rows, over the Parameters of a Transformers BertModel.

    h_0 = dropout(LN(word + position + type))                       (T, C), no padding looked up
    a   = attention(q, k, v) of layer m; q, k, v = h_{m-1} W + b    (T, H, D)
    s   = LN(h_{m-1} + dropout(a W_o + b_o))
    h_m = LN(s + dropout(gelu(s W_1 + b_1) W_2 + b_2))              m = 1..M

B sequences, N padded width, T real tokens, C channels, H heads, D head width, M layers. On a GPU
heads are padded in the weights to a multiple of HEAD_UNIT, W by rows and W_o by columns of zeros:
q, k, v, their gradients and the output's padded numbers are zero, so nothing else changes.
Every dropout place has its own site number, 4 m + place, under one seed per forward.

Under autocast h_0 .. h_M have its dtype, to which each product would round them anyway, and are
residuals in it too: half as many bytes are moved. Norms compute in fp32 and keep their statistics
so; the sum that they keep is rounded likewise. Their parameters and the answer stay fp32. On a GPU
q, k, v are one product and one tensor, the matrices of a layer are rounded together, and so their
gradients come back.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinybert_fast import ops
from tinybert_fast.modules.capture import HEADS, Capture
from tinybert_fast.modules.feed_forward_fp8 import FeedForwardFp8
from tinybert_fast.modules.weights import Prepared, is_plain, pays_to_pad, prepare
from tinybert_fast.ops.attention import HEAD_UNIT, attention_of_stack
from tinybert_fast.ops.dispatch import autocast, wanted_gradients
from tinybert_fast.ops.encoder_layer import LayerCall, LayerWeights, encoder_layer, serves
from tinybert_fast.ops.layout import SequenceLayout

ENCODER_OPS = ("embedding_layer_norm", "attention", "dropout_add_layer_norm")  # of every model
SITES_PER_LAYER = 4
ATTENTION, ATTENTION_OUTPUT, FFN_OUTPUT = 0, 1, 2  # places in a layer; the embeddings are site 0


def encode(
    bert: Any,
    layout: SequenceLayout,
    *,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    capture: Capture | None = None,
    block_mask: ops.BlockMask | None = None,
    direction: str = "both",
    read: Tensor | None = None,
    record_only: bool = False,
    impl: Any = "auto",
) -> Tensor:
    """The last hidden state (T, C) of ``bert`` on the real tokens of a padded batch.

    ``bert``: anything with the submodules of Transformers' BertModel; its train/eval state, dropout
    rates and gradient checkpointing are honoured. Inputs are padded, as the caller has them: ids
    (B, N), types and positions (B, N) or (1, N), ``inputs_embeds`` (B, N, C). ``capture`` records
    what it asks for on the way. ``block_mask`` and ``direction`` (of ``ops.attention``) say which
    tokens meet, in every layer. ``read``: int64 (R,), the rows of the last hidden state that are
    needed: the answer is then (R, C), and the last layer computes these alone behind its attention.
    ``record_only``: nothing is needed but what ``capture`` records, so no layer runs behind the
    last one recorded, nor anything of that one behind its queries, keys and values if they alone
    are; the answer is (0, C).
    """
    layers = bert.encoder.layer
    capture = Capture() if capture is None else capture
    relations = capture.attention or capture.attention_values
    if relations and (block_mask is not None or direction != "both"):
        raise ValueError(
            "capture asks for queries, keys or values of a model whose tokens do not all meet (a "
            "block mask, a direction); the losses that read them count all pairs of tokens"
        )
    if read is not None and len(layers) in capture.hidden_states:
        raise ValueError("capture asks for the last hidden state whole, and read= for some rows")
    capture.start(len(layers), layout)
    last, whole = capture.reach() if record_only else (len(layers), True)
    seed = draw_seed(layout.rows.device) if _drops(bert) else None
    hidden = embed(
        bert.embeddings,
        layout,
        input_ids=input_ids,
        inputs_embeds=inputs_embeds,
        token_type_ids=token_type_ids,
        position_ids=position_ids,
        seed=seed,
        impl=impl,
    )
    wide = hidden.dtype
    hidden = autocast(hidden)
    if 0 in capture.hidden_states:
        capture.hidden[0] = hidden
    for m, layer in enumerate(layers[:last], start=1):
        heads_asked = capture.heads_of(m)
        run: Callable[..., Any] = partial(
            encode_layer,
            layer,
            layout=layout,
            seed=seed,
            m=m,
            give=heads_asked,
            heads_only=m == last and not whole,
            block_mask=block_mask,
            direction=direction,
            read=read if m == len(layers) else None,
            impl=impl,
        )
        if _checkpointed(layer):
            run = partial(layer._gradient_checkpointing_func, run)
            if not hidden.requires_grad:  # a reentrant checkpoint would cut the layer's gradients
                hidden.requires_grad_()
        # Recorded here, outside the checkpointed function: once per forward, and with a graph.
        if heads_asked:
            hidden, *heads = run(hidden)
            for name, states in zip(HEADS, heads, strict=True):
                if name in heads_asked:
                    getattr(capture, name)[m] = states
        else:
            hidden = run(hidden)
        if m in capture.hidden_states:
            capture.hidden[m] = hidden
    return (hidden[:0] if record_only else hidden).to(wide)


def embed(
    embeddings: Any,
    layout: SequenceLayout,
    *,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    token_type_ids: Tensor | None,
    position_ids: Tensor | None,
    seed: Tensor | None,
    impl: Any,
) -> Tensor:
    """Embedding output h_0 (T, C); positions default to the padded column, types to 0."""
    word, position, token_type = (
        embeddings.word_embeddings,
        embeddings.position_embeddings,
        embeddings.token_type_embeddings,
    )
    if position_ids is None and layout.width > position.num_embeddings:
        raise ValueError(
            f"the batch is {layout.width} tokens wide and the model has {position.num_embeddings} "
            "positions; truncate the text to that length"
        )
    positions = layout.columns if position_ids is None else _rows(position_ids, layout)
    types = torch.zeros_like(positions) if token_type_ids is None else _rows(token_type_ids, layout)
    norm, dropout_p = embeddings.LayerNorm, _p(embeddings.dropout)
    if input_ids is not None:
        return ops.embedding_layer_norm(
            _rows(input_ids, layout),
            types,
            positions,
            word.weight,
            position.weight,
            token_type.weight,
            norm.weight,
            norm.bias,
            eps=norm.eps,
            dropout_p=dropout_p,
            seed=seed,
            site=0,
            layout=layout,
            padding_idx=word.padding_idx,
            impl=impl,
        )
    assert inputs_embeds is not None
    total = layout.pack(inputs_embeds) + token_type(types) + position(positions)
    normal = ops.layer_norm(total, norm.weight, norm.bias, eps=norm.eps, impl=impl)
    return F.dropout(
        normal, dropout_p
    )  # from torch's generator: no op serves ready-made embeddings


def encode_layer(
    layer: Any,
    hidden: Tensor,
    *,
    layout: SequenceLayout,
    seed: Tensor | None,
    m: int,
    give: Collection[str],
    heads_only: bool,
    block_mask: ops.BlockMask | None,
    direction: str,
    read: Tensor | None,
    impl: Any,
) -> Tensor | tuple[Tensor | None, ...]:
    """Layer m: (T, C) -> (T, C), or (R, C) of the rows to ``read``; with its queries, keys and
    values (T, H, D) if ``give`` names any. ``heads_only``: of these what is named, None for the
    rest, and ``hidden`` as it came.
    """
    attention, site = layer.attention, SITES_PER_LAYER * m
    heads, inner = attention.self, layer.intermediate
    size = heads.attention_head_size
    projections = (heads.query, heads.key, heads.value)
    if heads_only:
        return hidden, *(
            x(hidden).unflatten(1, (-1, size)) if name in give else None
            for name, x in zip(HEADS, projections, strict=True)
        )
    rounded = isinstance(inner, FeedForwardFp8)  # in the place of both products behind attention
    behind = () if rounded else (inner.dense, layer.output.dense)
    linears = (*projections, attention.output.dense, *behind)
    plain = set(filter(is_plain, linears))
    pads = pays_to_pad(hidden) and plain.issuperset(linears[:4])
    padding = -size % HEAD_UNIT if pads else 0
    taken = prepare(linears, plain, hidden, size, padding)
    of_attention = {
        "layout": layout,
        "scale": heads.scaling,
        "direction": direction,
        "dropout_p": heads.dropout.p if heads.training else 0.0,
        "seed": seed,
        "site": site + ATTENTION,
        "block_mask": block_mask,
        "impl": impl,
    }
    if taken.stack is not None and not rounded and plain.issuperset(linears):
        found: Any = _as_one(layer, hidden, taken, size, of_attention, give, read)
        if found is not None:
            return found if give else found[0]
    if taken.stack is not None:
        stack = F.linear(hidden, *taken.stack).unflatten(1, (len(HEADS), -1, size + padding))
        context, *given = attention_of_stack(
            stack, give=[HEADS.index(name) for name in give], width=size, **of_attention
        )
        del stack  # without a graph, nothing given, its memory serves the rest of the layer
    else:
        queries, keys, values = (
            _product(x, hidden, taken, plain).unflatten(1, (-1, size + padding))
            for x in projections
        )
        context = ops.attention(queries, keys, values, **of_attention)
        given = [x[..., :size] for x in (queries, keys, values)] if give else []
        del queries, keys, values  # likewise
    context = context.flatten(1)
    if read is not None:  # dropout keeps the cells of the whole
        context, hidden = context.index_select(0, read), hidden.index_select(0, read)
        layout = replace(
            layout,
            rows=layout.rows[read],
            sequences=layout.sequences[read],
            positions=layout.positions[read],
        )
    common = {"taken": taken, "plain": plain, "layout": layout, "seed": seed, "impl": impl}
    hidden = _output(attention.output, context, hidden, site=site + ATTENTION_OUTPUT, **common)
    del context
    if rounded:
        expanded = inner(hidden, impl)
    elif ops_add_bias(hidden) and inner.dense in plain and is_erf_gelu(inner.intermediate_act_fn):
        expanded = ops.bias_gelu(hidden, inner.dense.bias, taken(inner.dense.weight), impl=impl)
    else:
        expanded = inner.intermediate_act_fn(_product(inner.dense, hidden, taken, plain))
    hidden = _output(layer.output, expanded, hidden, site=site + FFN_OUTPUT, **common)
    return (hidden, *given) if give else hidden


def _as_one(
    layer: Any,
    hidden: Tensor,
    taken: Prepared,
    size: int,
    of_attention: dict[str, Any],
    give: Collection[str],
    read: Tensor | None,
) -> tuple[Tensor | None, ...] | None:
    """Layer m as one autograd node, or None where that does not serve: there are no kernels for all
    of it, or nobody wants a gradient.
    """
    attention, output = layer.attention.output, layer.output
    trained = torch.is_grad_enabled() and ops_add_bias(hidden)
    if not (trained and is_erf_gelu(layer.intermediate.intermediate_act_fn)):
        return None
    inner, norms = layer.intermediate.dense, (attention.LayerNorm, output.LayerNorm)
    assert taken.stack is not None
    weights = LayerWeights(
        *taken.stack,
        *(taken(attention.dense.weight), attention.dense.bias, norms[0].weight, norms[0].bias),
        *(taken(inner.weight), inner.bias, taken(output.dense.weight), output.dense.bias),
        *(norms[1].weight, norms[1].bias),
    )
    site = of_attention["site"] - ATTENTION
    call = LayerCall(
        heads=layer.attention.self.num_attention_heads,
        width=size,
        scale=of_attention["scale"],
        direction=of_attention["direction"],
        dropout_p=(of_attention["dropout_p"], _p(attention.dropout), _p(output.dropout)),
        sites=(site + ATTENTION, site + ATTENTION_OUTPUT, site + FFN_OUTPUT),
        eps=(norms[0].eps, norms[1].eps),
        give=tuple(HEADS.index(name) for name in give),
    )
    mask = of_attention["block_mask"]
    wanted = any(wanted_gradients(hidden, *weights))
    if not (wanted and serves(hidden, weights, call, mask, of_attention["impl"])):
        return None
    where = {"layout": of_attention["layout"], "seed": of_attention["seed"]}
    return encoder_layer(hidden, weights, call, **where, block_mask=mask, read=read)


def _product(
    dense: Any,
    x: Tensor,
    taken: Prepared,
    plain: Collection[nn.Module],
    bias: bool = True,
) -> Tensor:
    """A linear layer; a plain one without its ``bias`` where an op behind it adds that."""
    if dense not in plain:
        return dense(x)
    return F.linear(x, taken(dense.weight), taken(dense.bias) if bias else None)


def _output(
    block: Any,
    x: Tensor,
    residual: Tensor,
    *,
    taken: Prepared,
    plain: Collection[nn.Module],
    **common: Any,
) -> Tensor:
    """LN(residual + dropout(x @ W.mT + b)): BertSelfOutput and BertOutput, (T, any) -> (T, C)."""
    dense, norm = block.dense, block.LayerNorm
    fused = ops_add_bias(x) and dense in plain
    return ops.dropout_add_layer_norm(
        _product(dense, x, taken, plain, bias=not fused),
        dense.bias if fused else None,
        residual,
        norm.weight,
        norm.bias,
        eps=norm.eps,
        dropout_p=_p(block.dropout),
        **common,
    )


def ops_add_bias(x: Tensor) -> bool:
    """Whether the op behind a linear layer adds its bias: in a kernel, in passing. On a CPU that
    would be another walk through memory, and the product starts from the bias at no cost."""
    return x.is_cuda


def is_erf_gelu(activation: Any) -> bool:
    """The gelu of BERT, x * Phi(x), and not one of its approximations."""
    if type(activation) is nn.GELU:
        return activation.approximate == "none"
    return type(activation).__name__ == "GELUActivation"


def draw_seed(device: torch.device) -> Tensor:
    """int64 (2,) from torch's generator, another on each process: Trainers seed all ranks alike."""
    seed = torch.randint(2**62, (2,), device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        seed[1] += torch.distributed.get_rank()
    return seed


def _rows(ids: Tensor, layout: SequenceLayout) -> Tensor:
    """(B, N) or (1, N) ids -> (T,)."""
    return layout.pack(ids.expand(layout.batch_size, layout.width))


def _p(dropout: Any) -> float:
    return dropout.p if dropout.training else 0.0


def _checkpointed(layer: Any) -> bool:
    return (
        getattr(layer, "gradient_checkpointing", False)
        and layer.training
        and torch.is_grad_enabled()
    )


def _drops(bert: Any) -> bool:
    """Whether this forward drops anything; if not, torch's generator is left alone."""
    if _p(bert.embeddings.dropout):
        return True
    return any(
        (layer.attention.self.training and layer.attention.self.dropout.p)
        or _p(layer.attention.output.dropout)
        or _p(layer.output.dropout)
        for layer in bert.encoder.layer
    )
