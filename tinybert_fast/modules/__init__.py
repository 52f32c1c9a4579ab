"""BERT's encoder and heads on packed rows, over the Parameters of Transformers' modules."""

from tinybert_fast.modules.capture import Capture, record_padded
from tinybert_fast.modules.encoder import encode

__all__ = ["Capture", "encode", "record_padded"]
