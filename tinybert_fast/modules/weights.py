"""A layer's weights as its products take them: in autocast's dtype, and on a GPU with heads padded.

    W, b (H S, ...)   -> (H (S + P), ...)     of queries, keys and values: P rows of zeros a head
    W_o  (C, H S)     -> (C, H (S + P))       of what reads their context: columns of zeros

H heads of S numbers, S + P a multiple of HEAD_UNIT. On a GPU, where a launch takes longer than the
rounding of a matrix, all of a layer is one autograd node: a launch for zeros, one for what only
changes its dtype, one for each that is padded; and so are its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tinybert_fast.ops.dispatch import apply

HEAD_UNIT = 8  # numbers; 16 bytes in half precision, the widest load and what fused kernels ask for
ROWS, COLUMNS = 0, 1  # along which a matrix is cut into heads


def prepare(
    linears: Sequence[Any], plain: Collection[nn.Module], hidden: Tensor, size: int, padding: int
) -> Callable[[Tensor], Tensor]:
    """What a product with ``hidden`` takes in place of a parameter of the ``plain`` ones among a
    layer's linears: those of queries, keys and values, the output of attention, the two behind it.
    """
    together = pays_to_round_together(hidden)
    if not (padding or together):
        return _as_it_is
    *projections, output, inner, outer = linears
    axes: list[tuple[Tensor, int | None]] = [
        (p, ROWS) for dense in projections if dense in plain for p in (dense.weight, dense.bias)
    ]
    if output in plain:
        axes.append((output.weight, COLUMNS))
    # Not their biases: the ops behind them add those, in fp32.
    axes += [(dense.weight, None) for dense in (inner, outer) if dense in plain]
    padded = [(p, axis) for p, axis in axes if padding and axis is not None]
    others = [p for p, axis in axes if not padding or axis is None]
    if together:
        others = [p for p in others if p.dtype == torch.float32 != hidden.dtype]
        if not (padded or others):
            return _as_it_is
        parameters = [*(p for p, _ in padded), *others]
        kinds = tuple(axis for _, axis in padded)
        found = apply(_Prepare, hidden.dtype, size, padding, kinds, *parameters)
    else:
        parameters = [p for p, _ in padded]
        found = [_pad(p, axis, size, padding) for p, axis in padded]
    table = dict(zip(map(id, parameters), found, strict=True))
    return lambda parameter: table.get(id(parameter), parameter)


def pays_to_pad(hidden: Tensor) -> bool:
    """Whether kernels here read a head faster in whole units: on a GPU, not on a CPU."""
    return hidden.is_cuda


def pays_to_round_together(hidden: Tensor) -> bool:
    """Whether a launch takes longer than rounding a matrix: on a GPU, unless a compiler fuses."""
    return hidden.is_cuda and not torch.compiler.is_compiling()


def _as_it_is(parameter: Tensor) -> Tensor:
    return parameter


def _heads(x: Tensor, axis: int, size: int) -> Tensor:
    """A matrix or vector cut into heads of ``size``: (outer, H, size, inner), of ROWS (1, H, size,
    C), of COLUMNS (C, H, size, 1).
    """
    outer = x.shape[0] if axis == COLUMNS else 1
    return x.reshape(outer, x.shape[axis] // size, size, -1)


def _pad(x: Tensor, axis: int, size: int, padding: int) -> Tensor:
    """Zeros at the end of each head."""
    shape = list(x.shape)
    shape[axis] = -1
    return nn.functional.pad(_heads(x, axis, size), (0, 0, 0, padding)).reshape(shape)


class _Prepare(torch.autograd.Function):
    """The first parameters, as many as ``axes``, padded, the others as they are; in ``dtype``."""

    @staticmethod
    def forward(ctx, dtype, size, padding, axes, *wide):
        ctx.set_materialize_grads(False)
        ctx.heads, ctx.axes = (size, size + padding), axes
        ctx.like = [(x.shape, x.dtype) for x in wide]
        padded, others = wide[: len(axes)], wide[len(axes) :]
        numbers = [x.numel() // size * (size + padding) for x in padded]
        narrow = list(wide[0].new_zeros(sum(numbers), dtype=dtype).split(numbers)) if padded else []
        for i, (x, axis) in enumerate(zip(padded, axes, strict=True)):
            shape = list(x.shape)
            shape[axis] = -1
            cut = _heads(x, axis, size)
            narrow[i].view(*cut.shape[:2], size + padding, -1)[:, :, :size].copy_(cut)
            narrow[i] = narrow[i].view(shape)
        narrow += _in_one_launch(others, dtype)
        ctx.mark_non_differentiable(
            *(x for x, need in zip(narrow, ctx.needs_input_grad[4:], strict=True) if not need)
        )
        return tuple(narrow)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *narrow):
        size, whole = ctx.heads
        wide: list[Tensor | None] = []
        for x, axis, (shape, dtype) in zip(narrow, ctx.axes, ctx.like, strict=False):
            gradient = None if x is None else x.new_empty(shape, dtype=dtype)
            if gradient is not None:
                _heads(gradient, axis, size).copy_(_heads(x, axis, whole)[:, :, :size])
            wide.append(gradient)
        others = narrow[len(ctx.axes) :]
        there = iter(_in_one_launch([x for x in others if x is not None], torch.float32))
        return None, None, None, None, *wide, *(None if x is None else next(there) for x in others)


def _in_one_launch(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Copies in another dtype."""
    found = [torch.empty_like(x, dtype=dtype) for x in tensors]
    if found:
        torch._foreach_copy_(found, list(tensors))
    return found


def is_plain(dense: nn.Module) -> bool:
    """True if a layer is its weight and bias alone; adapters, hooks and a forward that somebody
    set on it need it to be called."""
    return (
        type(dense) is nn.Linear
        and dense.bias is not None
        and "forward" not in dense.__dict__
        and not hooks_of(dense)
    )


def hooks_of(module: nn.Module) -> list[Callable]:
    """Whoever waits for this module to be called."""
    kinds = (
        module._forward_pre_hooks,
        module._forward_hooks,
        module._backward_pre_hooks,
        module._backward_hooks,
    )
    return [hook for hooks in kinds for hook in hooks.values()] if any(kinds) else []
