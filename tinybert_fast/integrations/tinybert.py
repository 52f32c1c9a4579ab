"""TinyBert*: Transformers' BERT classes, accelerated at construction, in TinyBERT's sizes.

What they save says ``model_type: bert`` and a plain Bert class, so it loads where tinybert_fast is
not installed.
"""

from __future__ import annotations

from typing import Any

from transformers import BertConfig, BertTokenizer
from transformers.models.bert.modeling_bert import (
    BertForNextSentencePrediction,
    BertForSequenceClassification,
    BertForTokenClassification,
)

from tinybert_fast.integrations.bert import (
    AcceleratedBertForMaskedLM,
    AcceleratedBertForPreTraining,
    AcceleratedBertForQuestionAnswering,
    AcceleratedBertModel,
    accelerate,
    bears_name_of,
)

TinyBertTokenizer = BertTokenizer  # the same WordPiece and the same files


class TinyBertConfig(BertConfig):
    """BertConfig whose defaults are TinyBERT-4L-312; written and read as ``model_type: bert``."""

    hidden_size: int = 312
    num_hidden_layers: int = 4
    intermediate_size: int = 1200

    @classmethod
    def tiny_4l_312(cls, **changes: Any) -> TinyBertConfig:
        """4 layers, 312 wide, FFN 1200, 12 heads of 26 (14.5 M parameters in English)."""
        return cls(**changes)

    @classmethod
    def tiny_6l_768(cls, **changes: Any) -> TinyBertConfig:
        """6 layers, 768 wide, FFN 3072, 12 heads of 64 (67 M parameters in English)."""
        size = {"hidden_size": 768, "num_hidden_layers": 6, "intermediate_size": 3072}
        return cls(**{**size, **changes})


class _AcceleratedAtConstruction:
    config_class: Any = TinyBertConfig

    def __init__(self, config: BertConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        accelerate(self)


class TinyBertModel(_AcceleratedAtConstruction, AcceleratedBertModel):
    """BertModel on packed rows."""


class TinyBertForPreTraining(_AcceleratedAtConstruction, AcceleratedBertForPreTraining):
    """BertForPreTraining (masked LM and next sentence) on packed rows."""


class TinyBertForMaskedLM(_AcceleratedAtConstruction, AcceleratedBertForMaskedLM):
    """BertForMaskedLM on packed rows."""


class TinyBertForNextSentencePrediction(_AcceleratedAtConstruction, BertForNextSentencePrediction):
    """BertForNextSentencePrediction on packed rows."""


class TinyBertForSequenceClassification(_AcceleratedAtConstruction, BertForSequenceClassification):
    """BertForSequenceClassification on packed rows."""


class TinyBertForTokenClassification(_AcceleratedAtConstruction, BertForTokenClassification):
    """BertForTokenClassification on packed rows."""


class TinyBertForQuestionAnswering(_AcceleratedAtConstruction, AcceleratedBertForQuestionAnswering):
    """BertForQuestionAnswering on packed rows."""


for _tiny in _AcceleratedAtConstruction.__subclasses__():
    bears_name_of(next(c for c in _tiny.__mro__ if c.__module__.startswith("transformers.")), _tiny)
