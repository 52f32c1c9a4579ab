"""The operators: one public function each, with ``impl=`` to name an implementation."""

import sys

from tinybert_fast.ops import dispatch
from tinybert_fast.ops.attention import attention
from tinybert_fast.ops.attention_relation_kl import attention_relation_kl
from tinybert_fast.ops.attention_score_mse import attention_score_mse
from tinybert_fast.ops.bias_gelu import bias_gelu
from tinybert_fast.ops.block_mask import BlockMask, BlockPattern
from tinybert_fast.ops.dropout_add_layer_norm import dropout_add_layer_norm
from tinybert_fast.ops.embedding_layer_norm import embedding_layer_norm
from tinybert_fast.ops.feed_forward_fp8 import Fp8Weights, feed_forward_fp8
from tinybert_fast.ops.hidden_mse import hidden_mse
from tinybert_fast.ops.layer_norm import layer_norm
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.ops.linear_cross_entropy import linear_cross_entropy
from tinybert_fast.ops.mlm_mask import MaskedTokens, MaskingRule, mlm_mask
from tinybert_fast.ops.sequence_layout import sequence_layout
from tinybert_fast.ops.soft_cross_entropy import soft_cross_entropy

dispatch.check_environment()
if "torch.utils.flop_counter" in sys.modules:
    dispatch.count_flops()

__all__ = [
    "BlockMask",
    "BlockPattern",
    "Fp8Weights",
    "MaskedTokens",
    "MaskingRule",
    "SequenceLayout",
    "attention",
    "attention_relation_kl",
    "attention_score_mse",
    "bias_gelu",
    "dropout_add_layer_norm",
    "embedding_layer_norm",
    "feed_forward_fp8",
    "hidden_mse",
    "layer_norm",
    "linear_cross_entropy",
    "mlm_mask",
    "sequence_layout",
    "soft_cross_entropy",
]
