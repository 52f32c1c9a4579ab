"""TinyBert*: Transformers' BERT classes, accelerated at construction, in TinyBERT's sizes.

What they save says ``model_type: bert`` and a plain Bert class, so it loads where tinybert_fast is
not installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForNextSentencePrediction,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertTokenizer,
)
from transformers.models.bert.modeling_bert import (
    BertForSequenceClassification,
    BertForTokenClassification,
)

from tinybert_fast.integrations.bert import (
    Accelerated,
    AcceleratedBertForMaskedLM,
    AcceleratedBertForNextSentencePrediction,
    AcceleratedBertForPreTraining,
    AcceleratedBertForQuestionAnswering,
    AcceleratedBertModel,
    accelerate,
    bears_name_of,
    reads_first_tokens,
    say_once,
    stands_for,
)

TinyBertTokenizer = BertTokenizer  # an alias: the same WordPiece and the same files


class TinyBertConfig(BertConfig):
    """BertConfig whose defaults are TinyBERT-4L-312; written and read as ``model_type: bert``.

    ``pooled_relu``: classifiers read relu(pooler), as those that the TinyBERT authors trained do.
    """

    hidden_size: int = 312
    num_hidden_layers: int = 4
    intermediate_size: int = 1200
    pooled_relu: bool = False

    @classmethod
    def tiny_4l_312(cls, **changes: Any) -> TinyBertConfig:
        """4 layers, 312 wide, FFN 1200, 12 heads of 26; with English BERT's 30,522 words 14.4 M
        parameters."""
        return cls(**changes)

    @classmethod
    def tiny_6l_768(cls, **changes: Any) -> TinyBertConfig:
        """6 layers, 768 wide, FFN 3072, 12 heads of 64 (67 M parameters, likewise)."""
        size = {"hidden_size": 768, "num_hidden_layers": 6, "intermediate_size": 3072}
        return cls(**{**size, **changes})


class PooledReLU(nn.Dropout):
    """dropout(relu(x)), between pooler and classifier."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.relu(x))


class ReluClassifier(BertForSequenceClassification):
    """BertForSequenceClassification that heeds ``config.pooled_relu``.

    The flag is saved with the config, and Transformers' own class does not know it: it would read
    the pooler without the ReLU and give other logits, which saving warns of.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        with_pooled_relu(self)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.config, "pooled_relu", False):
            say_once(
                "this classifier reads relu(pooler) (pooled_relu in its config.json), which plain "
                "Transformers leaves out: load it with TinyBertForSequenceClassification"
            )
        return super().save_pretrained(*args, **kwargs)


bears_name_of(BertForSequenceClassification, ReluClassifier)


@stands_for(ReluClassifier)
class AcceleratedReluClassifier(Accelerated, ReluClassifier):
    forward = reads_first_tokens(BertForSequenceClassification)


def with_pooled_relu(model: Any) -> Any:
    """In place, and only a BertForSequenceClassification whose config asks for it."""
    if isinstance(model, BertForSequenceClassification) and getattr(
        model.config, "pooled_relu", False
    ):
        if type(model) is BertForSequenceClassification:
            model.__class__ = ReluClassifier
        model.dropout = PooledReLU(model.dropout.p)
    return model


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


class TinyBertForNextSentencePrediction(
    _AcceleratedAtConstruction, AcceleratedBertForNextSentencePrediction
):
    """BertForNextSentencePrediction on packed rows."""


class TinyBertForSequenceClassification(_AcceleratedAtConstruction, AcceleratedReluClassifier):
    """BertForSequenceClassification on packed rows; ``pooled_relu``: see TinyBertConfig."""


class TinyBertForTokenClassification(_AcceleratedAtConstruction, BertForTokenClassification):
    """BertForTokenClassification on packed rows."""


class TinyBertForQuestionAnswering(_AcceleratedAtConstruction, AcceleratedBertForQuestionAnswering):
    """BertForQuestionAnswering on packed rows."""


for _tiny in _AcceleratedAtConstruction.__subclasses__():
    bears_name_of(next(c for c in _tiny.__mro__ if c.__module__.startswith("transformers.")), _tiny)

# Auto classes look a model up by the class of its config; folders say `bert` and stay BERT's.
for _auto, _model in (
    (AutoModel, TinyBertModel),
    (AutoModelForPreTraining, TinyBertForPreTraining),
    (AutoModelForMaskedLM, TinyBertForMaskedLM),
    (AutoModelForNextSentencePrediction, TinyBertForNextSentencePrediction),
    (AutoModelForSequenceClassification, TinyBertForSequenceClassification),
    (AutoModelForTokenClassification, TinyBertForTokenClassification),
    (AutoModelForQuestionAnswering, TinyBertForQuestionAnswering),
):
    _auto.register(TinyBertConfig, _model)
