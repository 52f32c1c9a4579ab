"""Texts with labels: reading, encoding, padding, and batches of similar length."""

from tinybert_fast.data.collate import LengthCollator, LengthGroupedSampler, sort_by_length
from tinybert_fast.data.masking import SparseMaskingCollator
from tinybert_fast.data.tasks import Task, encode_examples, load_examples, usable_length

__all__ = [
    "LengthCollator",
    "LengthGroupedSampler",
    "SparseMaskingCollator",
    "Task",
    "encode_examples",
    "load_examples",
    "sort_by_length",
    "usable_length",
]
