"""y = dropout(LayerNorm(word[ids] + position[positions] + token_type[types])): BERT's input layer.

Shapes: ids, types, position_ids (T,); word (V, C), position (P, C), token_type (S, C); y (T, C).
Devlin et al. 2018, arXiv:1810.04805.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast.reference import philox


def embedding_layer_norm(
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    token_type_ids: Tensor,
    padding_idx: int,
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    site: int,
    sequences: Tensor,
    positions: Tensor,
) -> Tensor:
    """The sum of three embeddings, normalised and dropped; row ``padding_idx`` gets no gradient."""
    wide = torch.promote_types(word.dtype, torch.float32)
    total = F.embedding(input_ids, word, padding_idx if padding_idx >= 0 else None).to(wide)
    total = total + F.embedding(position_ids, position) + F.embedding(token_type_ids, token_type)
    centred = total - total.mean(-1, keepdim=True)
    normal = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = normal * weight + bias
    if seed is not None and dropout_p > 0.0:
        keep = philox.hidden_keep(seed, site, sequences, positions, y.shape[-1], dropout_p)
        y = y * keep * philox.keep_scale(dropout_p)
    return y.to(word.dtype)
