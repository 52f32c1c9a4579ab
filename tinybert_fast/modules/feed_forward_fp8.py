"""A frozen layer's feed-forward block of 8-bit floats, as a module in the place of two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tinybert_fast import ops
from tinybert_fast.ops.feed_forward_fp8 import Fp8Weights


class FeedForwardFp8(nn.Module):
    """``ops.feed_forward_fp8`` in the place of a layer's BertIntermediate and of the linear layer
    in its BertOutput: (..., C) -> (..., C), both biases added.
    """

    def __init__(self, inner: nn.Linear, outer: nn.Linear) -> None:
        super().__init__()
        weights = Fp8Weights.of(inner.weight, inner.bias, outer.weight, outer.bias)
        # As the second product takes it.
        weights = weights._replace(outer_bias=weights.outer_bias.to(torch.bfloat16))
        for name, tensor in weights._asdict().items():
            self.register_buffer(name, tensor)

    def forward(self, hidden: Tensor, impl: Any = "auto") -> Tensor:
        weights = Fp8Weights(*(getattr(self, name) for name in Fp8Weights._fields))
        return ops.feed_forward_fp8(hidden, weights, impl=impl)

    @classmethod
    def replace(cls, layer: Any) -> None:
        """Put one into a BERT layer; its BertOutput keeps dropout, residual and norm."""
        layer.intermediate = cls(layer.intermediate.dense, layer.output.dense)
        layer.output.dense = nn.Identity()
