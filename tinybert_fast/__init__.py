"""Fast BERT training and TinyBERT distillation in PyTorch.

``accelerate(model)`` makes a Transformers BERT run without padding; ``ops`` holds the operators
with their references; the ``TinyBert*`` classes and the ``tinybert-fast`` command train students.
Importing this package needs torch alone: everything else loads at first use.
"""

from importlib import import_module
from types import ModuleType

__version__ = "0.1.0"

_LAZY = {
    "SequenceLayout": "ops",
    "Capture": "modules",
    "accelerate": "integrations",
    "restore": "integrations",
    "is_accelerated": "integrations",
    "register_attention": "integrations",
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


def __getattr__(name: str) -> object:
    if name in _LAZY:
        value = getattr(_load(_LAZY[name]), name)
    elif name in _PACKAGES:
        value = _load(name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _load(package: str) -> ModuleType:
    try:
        return import_module(f"{__name__}.{package}")
    except ModuleNotFoundError as error:
        if (error.name or "").startswith(__name__):
            raise
        raise ModuleNotFoundError(
            f"{__name__}.{package} needs the package {error.name!r}: "
            "pip install '.[train]' in the checkout",
            name=error.name,
        ) from error


def __dir__() -> list[str]:
    return sorted(__all__)
