"""Texts with labels: reading, encoding, padding, and batches of similar length."""

from .collate import LengthCollator, LengthGroupedSampler, sort_by_length
from .tasks import Task, encode_examples, load_examples, usable_length

__all__ = [
    "LengthCollator",
    "LengthGroupedSampler",
    "Task",
    "encode_examples",
    "load_examples",
    "sort_by_length",
    "usable_length",
]
