"""A layer's weights as its products take them: in autocast's dtype, and on a GPU with heads padded
and those of queries, keys and values as one.

    W, b (H S, ...)   -> (H (S + P), ...)     of queries, keys and values: P rows of zeros a head
    W_o  (C, H S)     -> (C, H (S + P))       of what reads their context: columns of zeros
    the three W, b    -> (3 H (S + P), ...)   for one product in place of three

H heads of S numbers, S + P a multiple of HEAD_UNIT. On a GPU, where a launch takes longer than the
rounding of a matrix, all of a layer is one autograd node: a launch for zeros, one for each that is
padded, one for all others; and so are its gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tinybert_fast.ops.dispatch import TENSORS, apply

ROWS, COLUMNS = 0, 1  # along which a matrix is cut into heads
STACKED = 3  # queries, keys and values


class Prepared(NamedTuple):
    """What products take: in place of a parameter, and of queries, keys and values as one."""

    changed: dict[int, Tensor]  # by the parameter's id
    stack: tuple[Tensor, Tensor] | None = None  # weight and bias

    def __call__(self, parameter: Tensor) -> Tensor:
        return self.changed.get(id(parameter), parameter)


def prepare(
    linears: Sequence[Any], plain: set[nn.Module], hidden: Tensor, size: int, padding: int
) -> Prepared:
    """What products with ``hidden`` take in place of the parameters of the ``plain`` ones among a
    layer's linears: those of queries, keys and values, the output of attention, others behind it.
    """
    projections, output, *behind = linears[:STACKED], *linears[STACKED:]
    heads = [
        (getattr(dense, name), ROWS)
        for name in ("weight", "bias")  # those of a kind together, as a stack has them
        for dense in projections
        if dense in plain
    ]
    # Not their biases: the ops behind them add those, in fp32.
    readers = [(output.weight, COLUMNS)] if output in plain else []
    if not pays_to_prepare_together(hidden):
        padded = [*heads, *readers] if padding else []
        return Prepared({id(p): _pad(p, axis, size, padding) for p, axis in padded})
    # A frozen one among trained ones would be given a gradient.
    stacks = plain.issuperset(projections) and len({p.requires_grad for p, _ in heads}) == 1
    stack = None
    if stacks and not padding:
        stack = _stack_in_place([p for p, _ in heads], hidden.dtype)
    every = [p for p, _ in (*heads, *readers)]
    every += [dense.weight for dense in behind if dense in plain]
    rounded = [p for p in every if p.dtype == torch.float32 != hidden.dtype]
    if not (padding or rounded):  # three products take less than a copy for one
        return Prepared({}, stack)
    copied = [*heads, *readers] if padding else heads if stacks and stack is None else []
    seen = {id(p) for p, _ in copied}
    rounded = [p for p in rounded if id(p) not in seen]
    stacks = stacks and bool(copied)
    parameters = [*(p for p, _ in copied), *rounded]
    axes = tuple(axis for _, axis in copied)
    found = apply(_Prepare, hidden.dtype, size, padding, stacks, axes, *parameters)
    if stacks:
        stack, found, parameters = found[:2], found[2:], parameters[2 * STACKED :]
    return Prepared(dict(zip(map(id, parameters), found, strict=True)), stack)


def lay_side_by_side(projections: Sequence[nn.Linear]) -> None:
    """Move the frozen weights and biases of queries, keys and values, all in one dtype and place,
    to where `prepare` takes them as one without a copy; where they lie so already, they stay.
    """
    parameters = [getattr(dense, name) for name in ("weight", "bias") for dense in projections]
    if _stack_in_place(parameters, parameters[0].dtype) is not None:
        return
    room = torch.cat([p.detach().flatten() for p in parameters])
    for p, piece in zip(parameters, room.split([p.numel() for p in parameters]), strict=True):
        p.data = piece.view(p.shape)


def _stack_in_place(parameters: Sequence[Tensor], dtype: torch.dtype) -> Any:
    """Weight and bias of queries, keys and values as one, if those lie so; None if not."""
    weight, *_, bias = parameters[: STACKED + 1]
    end = weight.storage_offset()
    for p in parameters:
        if (
            p.requires_grad
            or p.dtype != dtype
            or not p.is_contiguous()
            or p.storage_offset() != end
            or p.untyped_storage().data_ptr() != weight.untyped_storage().data_ptr()
        ):
            return None
        end += p.numel()
    rows, columns = weight.shape
    return (
        weight.as_strided((STACKED * rows, columns), (columns, 1)),
        bias.as_strided((STACKED * rows,), (1,)),
    )


def pays_to_pad(hidden: Tensor) -> bool:
    """Whether kernels here read a head faster in whole units: on a GPU, not on a CPU."""
    return hidden.is_cuda


def pays_to_prepare_together(hidden: Tensor) -> bool:
    """Whether a launch takes longer than a copy of a matrix: on a GPU, unless a compiler fuses."""
    return hidden.is_cuda and not torch.compiler.is_compiling()


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
    """The first parameters, as many as ``axes``, with ``padding`` zeros behind each head of
    ``size`` numbers, the others as they are; in ``dtype``. ``stacks``: the first three as one, and
    the next three.
    """

    @staticmethod
    def forward(ctx, dtype, size, padding, stacks, axes, *wide):
        ctx.set_materialize_grads(False)
        ctx.stacks, ctx.heads, ctx.axes = stacks, (size, size + padding), axes
        ctx.like = [(x.shape, x.dtype) for x in wide]
        copied, others = wide[: len(axes)], wide[len(axes) :]
        numbers = [x.numel() // size * (size + padding) for x in copied]
        new = wide[0].new_zeros if padding else wide[0].new_empty
        room = new(sum(numbers), dtype=dtype)
        pieces = [
            piece.view([-1 if i == axis else n for i, n in enumerate(x.shape)])
            for x, axis, piece in zip(copied, axes, room.split(numbers), strict=True)
        ]
        rounded = [torch.empty_like(x, dtype=dtype) for x in others]
        _copy(list(zip(pieces, copied, axes, strict=True)), (size + padding, size), rounded, others)
        needs = list(ctx.needs_input_grad[5:])
        if stacks:
            weights, biases = sum(numbers[:STACKED]), sum(numbers[: 2 * STACKED])
            stack = room[:weights].view(-1, wide[0].shape[1]), room[weights:biases]
            pieces = [*stack, *pieces[2 * STACKED :]]
            needs = [needs[0], needs[STACKED], *needs[2 * STACKED :]]
        found = (*pieces, *rounded)
        ctx.mark_non_differentiable(*(x for x, need in zip(found, needs, strict=True) if not need))
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *narrow):
        if ctx.stacks:
            weight, bias = (
                (None,) * STACKED if x is None else x.chunk(STACKED) for x in narrow[:2]
            )
            narrow = (*weight, *bias, *narrow[2:])
        wide = [
            None if x is None else x.new_empty(shape, dtype=dtype)
            for x, (shape, dtype) in zip(narrow, ctx.like, strict=True)
        ]
        n = len(ctx.axes)
        there = [cut for cut in zip(wide, narrow, ctx.axes, strict=False) if cut[1] is not None]
        others = [pair for pair in zip(wide[n:], narrow[n:], strict=True) if pair[1] is not None]
        _copy(there, ctx.heads, [y for y, _ in others], [x for _, x in others])
        return (*(None,) * 5, *wide)


def _copy(cut: Any, sizes: tuple[int, int], others: Any, from_others: Any) -> None:
    """Of ``cut`` (target, source, axis) the second into the first, where heads have ``sizes``
    numbers, the lesser of which are copied; ``from_others`` into ``others``. One launch; one for
    each of ``cut`` where there are gaps, as PyTorch would otherwise copy all of them one by one.
    """
    ours, theirs = [y for y, _, _ in cut], [x for _, x, _ in cut]
    if sizes[0] != sizes[1]:
        least = min(sizes)
        ours = [_heads(y, axis, sizes[0])[:, :, :least] for y, _, axis in cut]
        theirs = [_heads(x, axis, sizes[1])[:, :, :least] for _, x, axis in cut]
        if cut:
            torch._foreach_copy_(ours, theirs)
        ours = theirs = []
    if ours or others:
        torch._foreach_copy_([*ours, *others], [*theirs, *from_others])


def is_plain(dense: nn.Module) -> bool:
    """True if a layer is its weight and bias alone; adapters, hooks, a forward that somebody set on
    it and tensors of a class of their own (as of quantised weights) need it to be called."""
    return (
        type(dense) is nn.Linear
        and type(dense.weight) in TENSORS
        and type(dense.bias) in TENSORS
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
