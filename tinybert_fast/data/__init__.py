"""Texts with labels: reading, encoding, padding, and batches of similar length. Plain text:
sentence pairs on disk, masked batches, a vocabulary.

Names load at first use: masking and padding need no `datasets`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tinybert_fast.data.collate import LengthCollator, LengthGroupedSampler, sort_by_length
    from tinybert_fast.data.corpus import Corpus
    from tinybert_fast.data.masking import SparseMaskingCollator
    from tinybert_fast.data.pretraining import PreTrainingCollator
    from tinybert_fast.data.shards import Manifest, Shards, open_shards, write_shards
    from tinybert_fast.data.tasks import Task, encode_examples, load_examples, usable_length
    from tinybert_fast.data.token_weights import LossWeights, RatioSchedule
    from tinybert_fast.data.wordpiece import train_wordpiece

_HOMES = {
    "Corpus": "corpus",
    "LengthCollator": "collate",
    "LengthGroupedSampler": "collate",
    "LossWeights": "token_weights",
    "Manifest": "shards",
    "PreTrainingCollator": "pretraining",
    "RatioSchedule": "token_weights",
    "Shards": "shards",
    "SparseMaskingCollator": "masking",
    "Task": "tasks",
    "encode_examples": "tasks",
    "load_examples": "tasks",
    "open_shards": "shards",
    "sort_by_length": "collate",
    "train_wordpiece": "wordpiece",
    "usable_length": "tasks",
    "write_shards": "shards",
}

__all__ = [
    "Corpus",
    "LengthCollator",
    "LengthGroupedSampler",
    "LossWeights",
    "Manifest",
    "PreTrainingCollator",
    "RatioSchedule",
    "Shards",
    "SparseMaskingCollator",
    "Task",
    "encode_examples",
    "load_examples",
    "open_shards",
    "sort_by_length",
    "train_wordpiece",
    "usable_length",
    "write_shards",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
