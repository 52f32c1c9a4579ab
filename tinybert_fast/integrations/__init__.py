"""Transformers: accelerate() / restore(), the attention plug-in and the TinyBert* classes."""

from tinybert_fast.integrations.attention import register_attention
from tinybert_fast.integrations.bert import accelerate, is_accelerated, restore
from tinybert_fast.integrations.tinybert import (
    TinyBertConfig,
    TinyBertForMaskedLM,
    TinyBertForNextSentencePrediction,
    TinyBertForPreTraining,
    TinyBertForQuestionAnswering,
    TinyBertForSequenceClassification,
    TinyBertForTokenClassification,
    TinyBertModel,
    TinyBertTokenizer,
)
from tinybert_fast.ops.dispatch import count_flops

count_flops()

__all__ = [
    "TinyBertConfig",
    "TinyBertForMaskedLM",
    "TinyBertForNextSentencePrediction",
    "TinyBertForPreTraining",
    "TinyBertForQuestionAnswering",
    "TinyBertForSequenceClassification",
    "TinyBertForTokenClassification",
    "TinyBertModel",
    "TinyBertTokenizer",
    "accelerate",
    "is_accelerated",
    "register_attention",
    "restore",
]
