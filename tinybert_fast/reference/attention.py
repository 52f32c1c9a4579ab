"""Scaled dot-product attention over packed sequences, one sequence and one N x N matrix at a time.

    O = dropout(softmax(scale * Q K^T + mask)) V          per sequence and head

Shapes: q, k, v (T, H, D); output (T, H, D). Vaswani et al. 2017, arXiv:1706.03762.
A query with no allowed key gives a zero row and zero gradients.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from tinybert_fast.reference import philox


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    direction: str,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    block_mask: Tensor | None,
) -> Tensor:
    """``softmax(q @ k.mT * scale) @ v`` for each sequence; softmax in fp32 or wider."""
    bounds = cu_seqlens.tolist()
    wide = torch.promote_types(q.dtype, torch.float32)
    parts = []
    for b, (start, stop) in enumerate(pairwise(bounds)):
        queries, keys, values = (x[start:stop].transpose(0, 1) for x in (q, k, v))  # (H, n, D)
        scores = (queries @ keys.mT).to(wide) * scale  # (H, n, n)
        allowed = allowed_pairs(stop - start, direction, block_mask, b, q.device)
        live = allowed.any(-1, keepdim=True)
        scores = scores.masked_fill(~allowed & live, -torch.inf)
        probabilities = torch.softmax(scores, -1) * live
        if seed is not None and dropout_p > 0.0:
            keep = philox.attention_keep(
                seed, site, b, q.shape[1], stop - start, stop - start, dropout_p
            )
            probabilities = probabilities * keep * philox.keep_scale(dropout_p)
        parts.append((probabilities.to(q.dtype) @ values).transpose(0, 1))
    return torch.cat(parts) if parts else q[:0] + k[:0] + v[:0]  # of no sequence, with its graph


def allowed_pairs(
    length: int, direction: str, block_mask: Tensor | None, sequence: int, device: torch.device
) -> Tensor:
    """Bool (n, n): may query i attend to key j. block_mask: bool (N, N) or (B, N, N)."""
    allowed = torch.ones(length, length, dtype=torch.bool, device=device)
    if direction == "causal":
        allowed = allowed.tril()
    elif direction == "anti_causal":
        allowed = allowed.triu()
    if block_mask is not None:
        of_sequence = block_mask if block_mask.dim() == 2 else block_mask[sequence]
        allowed = allowed & of_sequence[:length, :length]
    return allowed
