"""The autograd.Function of scalar losses whose gradients are computed in the forward.

The upstream gradient of a scalar is a scalar, so the forward that has the loss's intermediates at
hand also leaves the gradients, and the backward scales them (Hsu et al. 2024, arXiv:2410.10989).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tinybert_fast.ops.dispatch import reference_gradient


class ScalarLoss(torch.autograd.Function):
    """``forward_op(*operands, impl) -> loss, *gradients`` of the leading operands.

    ``gradients`` may be empty (0 elements) for an operand that is None.
    """

    @staticmethod
    def forward(ctx, forward_op: Callable, reference: Callable, impls, *operands) -> Tensor:
        loss, *gradients = forward_op(*operands, impls[0])
        ctx.reference = reference if impls[1] == "reference" else None
        tensors = operands if ctx.reference is not None else gradients
        ctx.save_for_backward(*(x for x in tensors if isinstance(x, Tensor)))
        ctx.others = [None if isinstance(x, Tensor) else (x,) for x in tensors]
        ctx.count = len(operands)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        saved = iter(ctx.saved_tensors)
        kept = [next(saved) if other is None else other[0] for other in ctx.others]
        needs = ctx.needs_input_grad[3:]
        if ctx.reference is not None:
            gradients = reference_gradient(ctx.reference, tuple(kept), needs, upstream)
        else:
            kept += [None] * (ctx.count - len(kept))
            gradients = tuple(
                g * upstream.to(g.dtype) if need else None
                for g, need in zip(kept, needs, strict=True)
            )
        return (None, None, None, *gradients)
