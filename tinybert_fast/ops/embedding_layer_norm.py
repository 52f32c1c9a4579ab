"""Word + position + token-type embeddings, layer norm and dropout: BERT's input layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tinybert_fast.ops.dispatch import (
    FLOATS,
    FLOATS_AND_DOUBLE,
    TRITON_DEVICES,
    Impl,
    Limit,
    Limits,
    apply,
    check_devices,
    check_dropout,
    choose,
    define,
    reference_gradient,
    without_autocast,
)
from tinybert_fast.ops.dropout_add_layer_norm import PLACE, kept_cells, token_places
from tinybert_fast.ops.layer_norm import (
    any_double,
    check_columns,
    refuses_columns,
    statistic,
)
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.reference.embedding_layer_norm import embedding_layer_norm as reference

MOST_TYPES = 2  # of the Triton kernels, which sum a token type's gradient in registers


def _refuses(types: int = 1, **others: Any) -> str | None:
    if types > MOST_TYPES:
        return f"a token-type table of {types} rows has more than {MOST_TYPES}"
    return refuses_columns(**others)


LIMITS = Limits(
    "embedding_layer_norm",
    torch=Limit(FLOATS_AND_DOUBLE),
    native=Limit(FLOATS_AND_DOUBLE, ("cpu",)),  # PyTorch with the reference's dropout
    triton=Limit(FLOATS, TRITON_DEVICES, _refuses),
)


def _forward_fake(word, position, token_type, weight, bias, input_ids, *call):
    dropout_p, impl = call[4], call[-1]
    y = word.new_empty(input_ids.shape[0], word.shape[1])
    return y, y.new_empty(y.shape), statistic(y), statistic(y), kept_cells(y, dropout_p, impl)


def _backward_fake(
    grad, total, mean, rstd, cells, weight, input_ids, position_ids, token_type_ids, seed, site,
    sequences, positions, words, position_rows, types, padding_idx, dropout_p,
):  # fmt: skip
    columns = total.shape[1]
    return (
        *(total.new_empty(rows, columns) for rows in (words, position_rows, types)),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )


_forward = define(
    "embedding_layer_norm_fwd(Tensor word, Tensor position, Tensor token_type, Tensor weight,"
    " Tensor bias, Tensor input_ids, Tensor position_ids, Tensor token_type_ids, int padding_idx,"
    f" float eps, float dropout_p, {PLACE})"
    " -> (Tensor y, Tensor total, Tensor mean, Tensor rstd, Tensor cells)",
    fake=_forward_fake,
    fake_knows_impl=True,
    torch="tinybert_fast.tuned.embedding_layer_norm:forward",
    native="tinybert_fast.tuned.embedding_layer_norm:forward_philox",
    triton="tinybert_fast.kernels.embedding_layer_norm:forward",
)
_backward = define(
    "embedding_layer_norm_bwd(Tensor grad, Tensor total, Tensor mean, Tensor rstd, Tensor cells,"
    " Tensor weight, Tensor input_ids, Tensor position_ids, Tensor token_type_ids,"
    f" {PLACE}, int words, int position_rows, int types, int padding_idx, float dropout_p)"
    " -> (Tensor dword, Tensor dposition, Tensor dtoken_type, Tensor dweight, Tensor dbias)",
    fake=_backward_fake,
    sparing=("torch", "native"),
    torch="tinybert_fast.tuned.embedding_layer_norm:backward",
    native="tinybert_fast.tuned.embedding_layer_norm:backward",
    triton="tinybert_fast.kernels.embedding_layer_norm:backward",
)


class _EmbeddingLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, word, position, token_type, weight, bias, ids, seed, sequences, positions, call, impls
    ):
        padding_idx, eps, dropout_p, site = call
        tables = (word, position, token_type, weight, bias)
        y, total, mean, rstd, cells = _forward(
            *tables, *ids, padding_idx, eps, dropout_p, seed, site, sequences, positions, impls[0]
        )
        ctx.call, ctx.impl = call, impls[1]
        ctx.sizes = [len(table) for table in tables[:3]]
        if ctx.impl == "reference":
            ctx.save_for_backward(*tables, *ids, seed, sequences, positions)
        else:
            statistics = (total, mean, rstd, cells, weight)
            ctx.save_for_backward(*statistics, *ids, seed, sequences, positions)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        padding_idx, eps, dropout_p, site = ctx.call
        *operands, seed, sequences, positions = ctx.saved_tensors
        place = (seed, site, sequences, positions)
        if ctx.impl == "reference":
            needs = (*ctx.needs_input_grad[:5], *(False,) * 10)
            operands = (*operands, padding_idx, eps, dropout_p, *place)
            grads = reference_gradient(reference, operands, needs, grad)[:5]
        else:
            wanted = list(ctx.needs_input_grad[:5])
            call = (*ctx.sizes, padding_idx, dropout_p, wanted)
            found = _backward(grad, *operands, *place, *call, ctx.impl)
            grads = tuple(g if want else None for g, want in zip(found, wanted, strict=True))
        return (*grads, None, None, None, None, None, None)


def embedding_layer_norm(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    layout: SequenceLayout | None = None,
    padding_idx: int | None = 0,
    impl: Impl = "auto",
) -> Tensor:
    """``F.dropout(F.layer_norm(word[ids] + position[positions] + token_type[types]))``: BERT's
    input layer (Devlin et al. 2018, arXiv:1810.04805, figure 2).

    Args:
        input_ids, token_type_ids, position_ids: int32 or int64 (T,).
        word, position, token_type: tables (V, C), (P, C), (S, C), fp16, bf16, fp32 or fp64
            (``triton``: not fp64, S up to 2, C up to 8192).
        weight, bias: (C,) of the layer norm.
        dropout_p, seed, site, layout: as in ``dropout_add_layer_norm``.
        padding_idx: the word whose embedding gets no gradient, or None.
        impl: "auto", a name, or one for each pass: ``ops/dispatch.py``.

    Returns:
        (T, C) in the tables' dtype.

    Raises:
        ValueError: ids that disagree in shape, tables that disagree in width, devices or a layout
            that disagree, a dropout rate, seed or site that is none, or a named ``impl`` that
            cannot serve the call.
        IndexError: an id outside its table.
    """
    impls = choose(
        impl,
        LIMITS,
        word,
        dropout_p=dropout_p,
        columns=word.shape[-1],
        types=len(token_type),
        double=any_double(position, token_type, weight, bias),
    )
    ids = (input_ids, position_ids, token_type_ids)
    if input_ids.dim() != 1 or any(i.shape != input_ids.shape for i in ids):
        raise ValueError(
            "embedding_layer_norm: input_ids, position_ids and token_type_ids must share one shape "
            f"(T,); got {', '.join(str(tuple(i.shape)) for i in ids)}"
        )
    if any(i.dtype not in (torch.int32, torch.int64) for i in ids):
        raise ValueError(
            "embedding_layer_norm: ids must be int32 or int64; got "
            f"{', '.join(str(i.dtype) for i in ids)}"
        )
    check_devices(
        "embedding_layer_norm", word.device, position=position, token_type=token_type,
        input_ids=input_ids, position_ids=position_ids, token_type_ids=token_type_ids,
    )  # fmt: skip
    if len({table.shape[1] for table in (word, position, token_type)}) > 1:
        raise ValueError(
            "embedding_layer_norm: word, position and token_type must share their width; got "
            f"{', '.join(str(tuple(t.shape)) for t in (word, position, token_type))}"
        )
    if padding_idx is not None and not 0 <= padding_idx < len(word):
        raise ValueError(
            f"embedding_layer_norm: padding_idx={padding_idx} is not a row of word "
            f"{tuple(word.shape)}; None means no padding word"
        )
    check_columns("embedding_layer_norm", word, weight=weight, bias=bias)
    check_dropout("embedding_layer_norm", dropout_p, seed, site, word.device)
    sequences, positions = token_places(
        "embedding_layer_norm", input_ids[:, None], layout, dropout_p
    )
    # A row may be further into its table than int32 counts.
    ids = (input_ids.long(), position_ids.long(), token_type_ids.long())
    padding = -1 if padding_idx is None else padding_idx
    tables = (word, position, token_type, weight, bias)
    if impls[0] == "reference":
        return without_autocast(
            reference, *tables, *ids, padding, eps, dropout_p, seed, site, sequences, positions
        )
    call = (padding, eps, dropout_p, site)
    return apply(_EmbeddingLayerNorm, *tables, ids, seed, sequences, positions, call, impls)
