"""Texts with labels: reading, encoding, padding, and batches of similar length. Plain text:
sentence pairs on disk, masked batches, a vocabulary.
"""

from tinybert_fast.data.collate import LengthCollator, LengthGroupedSampler, sort_by_length
from tinybert_fast.data.corpus import Corpus
from tinybert_fast.data.masking import SparseMaskingCollator
from tinybert_fast.data.pretraining import PreTrainingCollator
from tinybert_fast.data.shards import Manifest, Shards, open_shards, write_shards
from tinybert_fast.data.tasks import Task, encode_examples, load_examples, usable_length
from tinybert_fast.data.token_weights import LossWeights, RatioSchedule
from tinybert_fast.data.wordpiece import train_wordpiece

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
