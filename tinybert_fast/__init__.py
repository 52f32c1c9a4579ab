"""Fast BERT training and TinyBERT distillation in PyTorch.

``accelerate(model)`` makes a Transformers BERT run without padding; ``ops`` holds the operators with
their references; the ``TinyBert*`` classes and the ``tinybert-fast`` command train students.
Importing this package needs torch alone: everything else loads at first use.
"""

from importlib import import_module

__version__ = "0.1.0"

_LAZY = {
    "SequenceLayout": "ops",
    "Capture": "modules",
    "accelerate": "integrations",
    "restore": "integrations",
    "is_accelerated": "integrations",
    "TinyBertConfig": "integrations",
    "TinyBertTokenizer": "integrations",
    "TinyBertModel": "integrations",
    "TinyBertForPreTraining": "integrations",
    "TinyBertForMaskedLM": "integrations",
    "TinyBertForNextSentencePrediction": "integrations",
    "TinyBertForSequenceClassification": "integrations",
    "TinyBertForTokenClassification": "integrations",
    "TinyBertForQuestionAnswering": "integrations",
}
_PACKAGES = ("ops", "modules", "integrations", "data", "training", "testing")

__all__ = ["__version__", *_LAZY, *_PACKAGES]


def __getattr__(name: str):
    if name in _LAZY:
        value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    elif name in _PACKAGES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
