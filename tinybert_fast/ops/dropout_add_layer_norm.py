"""Linear bias + dropout + residual add + layer norm: the post-norm block of BERT."""

from __future__ import annotations

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
from tinybert_fast.ops.layer_norm import (
    any_double,
    check_columns,
    refuses_columns,
    statistic,
)
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.ops.packed import check_layout
from tinybert_fast.reference.dropout_add_layer_norm import dropout_add_layer_norm as reference

LIMITS = Limits(
    "dropout_add_layer_norm",
    torch=Limit(FLOATS_AND_DOUBLE),
    native=Limit(FLOATS_AND_DOUBLE, ("cpu",)),  # PyTorch with the reference's dropout
    triton=Limit(FLOATS, TRITON_DEVICES, refuses_columns),
)

# What decides a dropped cell; a schema's text and the names of its arguments.
PLACE = "Tensor? seed, int site, Tensor sequences, Tensor positions"


def kept_cells(y: Tensor, dropout_p: float, impl: str) -> Tensor:
    """The random bytes that a forward keeps for its backward: torch's, which cannot be redrawn."""
    stored = dropout_p > 0.0 and impl in ("torch", "native")
    return y.new_empty(y.shape if stored else (0,), dtype=torch.uint8)


def _forward_fake(x, bias, residual, weight, ln_bias, eps, dropout_p, *rest):
    *_, keep, impl = rest
    y = residual.new_empty(residual.shape)
    total = residual.new_empty(residual.shape if keep else (0,))
    cells = kept_cells(y, dropout_p, impl)
    return y, total, statistic(residual), statistic(residual), cells


def _backward_fake(
    grad, total, mean, rstd, cells, weight, dropout_p, seed, site, sequences, positions, x_dtype,
    with_bias,
):  # fmt: skip
    own = dropout_p > 0.0 or x_dtype != total.dtype
    dx = total.new_empty(total.shape if own else (0,), dtype=x_dtype)
    dbias = torch.empty_like(weight) if with_bias else weight.new_empty(0)
    dtotal = total.new_empty(total.shape)
    return dx, dtotal, dbias, torch.empty_like(weight), torch.empty_like(weight)


# keep: for a backward; else total is empty.
_forward = define(
    "dropout_add_layer_norm_fwd(Tensor x, Tensor? bias, Tensor residual, Tensor weight,"
    f" Tensor ln_bias, float eps, float dropout_p, {PLACE}, bool keep)"
    " -> (Tensor y, Tensor total, Tensor mean, Tensor rstd, Tensor cells)",
    fake=_forward_fake,
    fake_knows_impl=True,
    torch="tinybert_fast.tuned.dropout_add_layer_norm:forward",
    native="tinybert_fast.tuned.dropout_add_layer_norm:forward_philox",
    triton="tinybert_fast.kernels.dropout_add_layer_norm:forward",
)
# dx is empty where it equals dtotal: without dropout, in one dtype.
_backward = define(
    "dropout_add_layer_norm_bwd(Tensor grad, Tensor total, Tensor mean, Tensor rstd, Tensor cells,"
    f" Tensor weight, float dropout_p, {PLACE}, ScalarType x_dtype, bool with_bias)"
    " -> (Tensor dx, Tensor dtotal, Tensor dbias, Tensor dweight, Tensor dln_bias)",
    fake=_backward_fake,
    torch="tinybert_fast.tuned.dropout_add_layer_norm:backward",
    native="tinybert_fast.tuned.dropout_add_layer_norm:backward",
    triton="tinybert_fast.kernels.dropout_add_layer_norm:backward",
)


class _DropoutAddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, weight, ln_bias, seed, sequences, positions, call, impls):
        eps, dropout_p, site, keep = call
        place = (seed, site, sequences, positions)
        y, total, mean, rstd, cells = _forward(
            _rows(x), bias, _rows(residual), weight, ln_bias, eps, dropout_p, *place, keep, impls[0]
        )
        ctx.impl, ctx.call, ctx.with_bias = impls[1], call, bias is not None
        ctx.shape, ctx.x_dtype = x.shape, x.dtype
        if ctx.impl == "reference":
            ctx.save_for_backward(x, bias, residual, weight, ln_bias, seed, sequences, positions)
        else:
            ctx.save_for_backward(total, mean, rstd, cells, weight, seed, sequences, positions)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        eps, dropout_p, site, _ = ctx.call
        *operands, seed, sequences, positions = ctx.saved_tensors
        place = (seed, site, sequences, positions)
        if ctx.impl == "reference":
            grad = grad.reshape(ctx.shape)
            needs = (*ctx.needs_input_grad[:5], *(False,) * 6)
            grads = reference_gradient(reference, (*operands, eps, dropout_p, *place), needs, grad)[
                :5
            ]
        else:
            dx, dtotal, dbias, dweight, dln_bias = _backward(
                grad, *operands, dropout_p, *place, ctx.x_dtype, ctx.with_bias, ctx.impl
            )
            # What x and the residual share is one tensor: of two views, which autograd cannot see
            # to be one memory, both leaves would keep it and add to it.
            of_residual = dtotal.view(ctx.shape)
            of_x = of_residual if dx.shape != dtotal.shape else dx.view(ctx.shape)
            if of_x is of_residual and len(ctx.shape) != 2 and torch.compiler.is_compiling():
                of_x = of_residual.clone()  # inductor would hand out two views of its buffer
            grads = (of_x, dbias if ctx.with_bias else None, of_residual, dweight, dln_bias)
        return (*grads, None, None, None, None, None)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def dropout_add_layer_norm(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    ln_bias: Tensor,
    *,
    eps: float = 1e-12,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    layout: SequenceLayout | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """``F.layer_norm(residual + F.dropout(x + bias), (C,), weight, ln_bias, eps)``: the end of
    each half of a post-norm layer (Devlin et al. 2018, arXiv:1810.04805).

    Args:
        x, residual: packed (T, C) with ``layout``; or (B, N, C) or (rows, C) without. fp16, bf16,
            fp32 or fp64 each (``triton``: not fp64, C up to 8192); any strides.
        bias: (C,) of the linear layer that made x, or None where x has it already.
        weight, ln_bias: (C,) of the layer norm.
        dropout_p, seed, site, layout: as in ``attention``; the mask is a function of seed, site
            (0 to 2^32 - 1), sequence, token rank and column.
        impl: "auto", a name, or one for each pass: ``ops/dispatch.py``.

    Returns:
        The residual's shape and dtype, computed in fp32 or wider; what a backward reads of the sum
        is rounded to the residual's dtype, its statistics are not.

    Raises:
        ValueError: shapes, devices or a layout that disagree, a dropout rate, seed or site that is
            none, or a named ``impl`` that cannot serve the call.
    """
    double = any_double(bias, residual, weight, ln_bias)
    impls = choose(impl, LIMITS, x, dropout_p=dropout_p, columns=x.shape[-1], double=double)
    if x.shape != residual.shape:
        raise ValueError(
            f"dropout_add_layer_norm: x {tuple(x.shape)} and residual {tuple(residual.shape)} must "
            "have one shape"
        )
    check_devices("dropout_add_layer_norm", x.device, residual=residual)
    check_columns("dropout_add_layer_norm", x, bias=bias, weight=weight, ln_bias=ln_bias)
    check_dropout("dropout_add_layer_norm", dropout_p, seed, site, x.device)
    sequences, positions = token_places("dropout_add_layer_norm", x, layout, dropout_p)
    operands = (x, bias, residual, weight, ln_bias)
    if impls[0] == "reference":
        place = (seed, site, sequences, positions)
        return without_autocast(reference, *operands, eps, dropout_p, *place)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    call = (eps, dropout_p, site, keep)
    y = apply(_DropoutAddLayerNorm, *operands, seed, sequences, positions, call, impls)
    return y.view(x.shape)


def token_places(
    op: str, x: Tensor, layout: SequenceLayout | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """(sequence, rank) of each row of x: from the layout, or from x's own (B, N) or (rows,), where
    they are empty if nothing is dropped.
    """
    if layout is not None:
        if x.dim() != 2:
            raise ValueError(f"{op}: with a layout x is packed (T, C); got {tuple(x.shape)}")
        check_layout(op, layout, x, leading=1)
        return layout.sequences, layout.positions
    if dropout_p == 0.0:
        first, second = (torch.empty(0, dtype=torch.int32, device=x.device) for _ in range(2))
        return first, second
    batch, width = (x.shape[0], x.shape[1]) if x.dim() == 3 else (1, x.shape[:-1].numel())
    row = torch.arange(batch * width, device=x.device, dtype=torch.int32)
    return torch.div(row, max(width, 1), rounding_mode="floor"), row % max(width, 1)
