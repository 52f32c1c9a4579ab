"""A post-norm layer of BERT as one autograd node over the kernels of its ops.

    s = LN(h + D(a W_o^T + b_o)),   a = attention of the thirds of h W^T + b
    y = LN(s + D(gelu(s W_1^T + b_1) W_2^T + b_2))

Op by op the same kernels are launched, with Python's dispatch and a node of autograd between each
two, for which a GPU waits. In the backward what a residual brings is added inside the product
beside it (beta of cuBLAS), not rounded before and without a launch.
Sources: Vaswani et al. 2017, arXiv:1706.03762; Devlin et al. 2018, arXiv:1810.04805.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast.ops.attention import LIMITS as OF_ATTENTION
from tinybert_fast.ops.attention import _backward_of_stack as attention_backward
from tinybert_fast.ops.attention import _check_pairs, _mask_of
from tinybert_fast.ops.attention import _forward as attention_forward
from tinybert_fast.ops.bias_gelu import LIMITS as OF_GELU
from tinybert_fast.ops.bias_gelu import _backward_in_place as gelu_backward
from tinybert_fast.ops.bias_gelu import _forward as gelu_forward
from tinybert_fast.ops.block_mask import BlockMask
from tinybert_fast.ops.dispatch import Impl, check_dropout, choose, without_autocast
from tinybert_fast.ops.dropout_add_layer_norm import LIMITS as OF_NORM
from tinybert_fast.ops.dropout_add_layer_norm import _backward as norm_backward
from tinybert_fast.ops.dropout_add_layer_norm import _forward as norm_forward
from tinybert_fast.ops.layer_norm import any_double
from tinybert_fast.ops.layout import SequenceLayout

TRITON = "triton"
GIVEN = range(3)  # queries, keys, values


class LayerWeights(NamedTuple):
    """Matrices in the dtype of the products, vectors as they are; of C columns, H heads of D."""

    weight: Tensor  # (3 H D, C), of queries, keys and values
    bias: Tensor  # (3 H D,), in the weight's dtype
    output: Tensor  # (C, H D)
    output_bias: Tensor
    norm: Tensor
    norm_bias: Tensor
    inner: Tensor  # (F, C)
    inner_bias: Tensor
    outer: Tensor  # (C, F)
    outer_bias: Tensor
    last_norm: Tensor
    last_norm_bias: Tensor


class LayerCall(NamedTuple):
    """What is no tensor. Of attention, its output and the feed-forward block: rates and sites."""

    heads: int
    width: int  # numbers of a head that are given out: what is left of D are zeros
    scale: float
    direction: str
    dropout_p: tuple[float, float, float]
    sites: tuple[int, int, int]
    eps: tuple[float, float]
    give: tuple[int, ...]  # 0 queries, 1 keys, 2 values
    max_length: int = 0


class _EncoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, *operands):
        *weights, cu_seqlens, work, sequences, positions, seed, read, call, masks = operands[:20]
        w, mask = LayerWeights(*weights), list(operands[20:])
        ctx.set_materialize_grads(False)
        ctx.call, ctx.masks = call, masks
        stack = F.linear(hidden, w.weight, w.bias).unflatten(1, (3, call.heads, -1))
        attended, lse, rng = attention_forward(
            *stack.unbind(1), *_of_attention(call, cu_seqlens, work, seed, mask), TRITON
        )
        context, rows = attended.flatten(1), hidden
        if read is not None:
            context, rows = context.index_select(0, read), hidden.index_select(0, read)
        places = (sequences, positions)
        first, *kept = norm_forward(
            F.linear(context, w.output), w.output_bias, rows, w.norm, w.norm_bias,
            *_of_norm(call, 0, seed, places), True, TRITON,
        )  # fmt: skip
        product = F.linear(first, w.inner)
        expanded = gelu_forward(product, w.inner_bias, TRITON)
        last, *last_kept = norm_forward(
            F.linear(expanded, w.outer), w.outer_bias, first, w.last_norm, w.last_norm_bias,
            *_of_norm(call, 1, seed, places), True, TRITON,
        )  # fmt: skip
        ctx.save_for_backward(
            hidden, *weights, cu_seqlens, work, *places, seed, read, *mask,
            stack, attended, lse, rng, first, *kept, product, *last_kept,
        )  # fmt: skip
        given = (stack[:, i, :, : call.width].detach() if i in call.give else None for i in GIVEN)
        return last, *given

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *of_given):
        hidden, *saved = ctx.saved_tensors
        found = without_autocast(_gradients, hidden, ctx, saved, grad, of_given)
        return *found, *(None,) * (8 + ctx.masks)


def _gradients(hidden: Tensor, ctx: Any, saved: list[Any], grad: Tensor | None, of_given) -> tuple:
    """Of hidden and the weights. GELU's answer, the largest tensor of all, is computed again where
    its gradient is read.
    """
    call, n = ctx.call, len(LayerWeights._fields)
    wants_hidden, *wanted = ctx.needs_input_grad[: 1 + n]
    w, wants = LayerWeights(*saved[:n]), LayerWeights(*wanted)
    cu_seqlens, work, *places, seed, read = saved[n : n + 6]
    mask, saved = list(saved[n + 6 : n + 6 + ctx.masks]), saved[n + 6 + ctx.masks :]
    stack, attended, lse, rng, first, *saved = saved
    kept, product, last_kept = saved[:4], saved[4], saved[5:]
    context = attended.flatten(1)
    drows: Tensor | None = None
    of_output: tuple[Tensor | None, ...] = (None,) * 4
    of_block: tuple[Tensor | None, ...] = (None,) * 6
    if grad is None:  # nobody reads the layer's answer, but its queries, keys or values
        dcontext = torch.zeros_like(context)
    else:
        dproduct, dfirst, dlast_bias, dlast_norm, dlast_norm_bias = norm_backward(
            grad, *last_kept, w.last_norm, *_of_norm(call, 1, seed, places)[1:], hidden.dtype,
            True, TRITON,
        )  # fmt: skip
        dproduct = dproduct if dproduct.shape == dfirst.shape else dfirst
        expanded = dproduct @ w.outer  # its gradient, and then itself
        dwide, dinner_bias = gelu_backward(expanded, product, w.inner_bias, TRITON)
        douter = dproduct.mT @ expanded if wants.outer else None
        dinner = dwide.mT @ first if wants.inner else None
        dfirst.addmm_(dwide, w.inner)
        of_block = (dinner, dinner_bias, douter, dlast_bias, dlast_norm, dlast_norm_bias)
        del dwide, dproduct, expanded

        dproduct, drows, *of_vectors = norm_backward(
            dfirst, *kept, w.norm, *_of_norm(call, 0, seed, places)[1:], hidden.dtype, True, TRITON
        )
        dproduct = dproduct if dproduct.shape == drows.shape else drows
        rows = context if read is None else context.index_select(0, read)
        of_output = (dproduct.mT @ rows if wants.output else None, *of_vectors)
        dcontext = dproduct @ w.output
        if read is not None:
            dcontext = torch.zeros_like(context).index_add_(0, read, dcontext)
            drows = torch.zeros_like(hidden).index_add_(0, read, drows)
        del dproduct, dfirst, rows

    dstack = attention_backward(
        dcontext.view(attended.shape), stack, *of_given, attended, lse, rng,
        *_of_attention(call, cu_seqlens, work, seed, mask), TRITON,
    ).flatten(1)  # fmt: skip
    dweight = dstack.mT @ hidden if wants.weight else None
    dbias = dstack.sum(0) if wants.bias else None
    dhidden = None
    if wants_hidden:
        dhidden = dstack @ w.weight if drows is None else drows.addmm_(dstack, w.weight)
    return dhidden, dweight, dbias, *of_output, *of_block


def _of_attention(call: LayerCall, cu_seqlens, work, seed, mask) -> tuple:
    return (
        cu_seqlens, work, call.max_length, call.scale, call.direction, call.dropout_p[0], seed,
        call.sites[0], mask,
    )  # fmt: skip


def _of_norm(call: LayerCall, which: int, seed, places) -> tuple:
    """eps, which a backward does not take, and what decides a dropped cell."""
    return call.eps[which], call.dropout_p[1 + which], seed, call.sites[1 + which], *places


def serves(
    hidden: Tensor, weights: LayerWeights, call: LayerCall, block_mask: Any, impl: Impl
) -> bool:
    """Whether all ops of the layer would take their kernels, in both passes. ValueError for a named
    ``impl`` that cannot serve one of them, as that op raises it.
    """
    attention = {
        "width": weights.output.shape[1] // call.heads,
        "scale": call.scale,
        "dense_mask": block_mask is not None and not isinstance(block_mask, BlockMask),
        "dropout_p": call.dropout_p[0],
    }
    products = (weights.weight, weights.bias, weights.output, weights.inner, weights.outer)
    if any(x.dtype != hidden.dtype for x in products):
        return False
    double = any_double(*weights)
    norm = {"dropout_p": max(call.dropout_p[1:]), "columns": hidden.shape[-1], "double": double}
    facts = ((OF_ATTENTION, attention), (OF_NORM, norm), (OF_GELU, {"double": double}))
    return all(choose(impl, limits, hidden, **of) == (TRITON, TRITON) for limits, of in facts)


def encoder_layer(
    hidden: Tensor,
    weights: LayerWeights,
    call: LayerCall,
    *,
    layout: SequenceLayout,
    seed: Tensor | None = None,
    block_mask: BlockMask | None = None,
    read: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(T, C) -> (T, C), or (R, C) of the rows to ``read``, int64 (R,); and of queries, keys and
    values (T, H, width) those that ``call.give`` names: views, whose gradients the kernels add.

    For what `serves`: on a GPU, where a gradient is wanted. ValueError as the ops raise it.
    """
    _check_pairs(layout.max_length, layout.batch_size, hidden.device, call.direction, block_mask)
    for rate, site in zip(call.dropout_p, call.sites, strict=True):
        check_dropout("encoder_layer", rate, seed, site, hidden.device)
    mask = () if block_mask is None else _mask_of(block_mask, TRITON)
    sequences, positions = layout.sequences, layout.positions
    if read is not None:  # dropout keeps the cells of the whole
        sequences, positions = sequences[read], positions[read]
    call = call._replace(max_length=layout.max_length)
    return _EncoderLayer.apply(
        hidden, *weights, layout.cu_seqlens, layout.work, sequences, positions, seed, read, call,
        len(mask), *mask,
    )  # fmt: skip
