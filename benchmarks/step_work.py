"""What a training step needs at least: the operations of its matrix products, and the bytes that no
cache can save. The first bind, at the sizes that are measured here.

T real tokens, P = sum of n^2 pairs of tokens of a sequence, C channels, F inner width, M layers.

    layer, forward     2 T (4 C^2 + 2 C F)  products with weights;  4 P C  scores and their sum
    backward           twice the forward: gradients of inputs and of weights, of both operands
    vocabulary head    2 R (C^2 + C V)  of R labelled tokens
    pooler, two classes  2 B (C^2 + 2 C)  of B sequences; rows that heads read alone pass the end
                       of the last layer
    projection         2 T C C_t  of each matched state
    attention loss     the smaller of scores, 2 P (C + C_t), and Gram matrices of H heads,
                       4 T H (d^2 + d d_t + d_t^2); gradients 4 P C or 4 T H (d^2 + d d_t)

Bytes: of a trained number, all in fp32, the weight is read in both passes, the gradient written and
read, weight and two moments read and written by the update; a teacher's weights are read once.
Activations could stay on the chip, and do not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tinybert_fast.benchmarks.case import DTYPES, Work

TRAINING = 3  # forward and backward, in forwards
CLASSES = 2
PARAMETER_BYTES = 4 * (2 + 2 + 6)  # two passes; gradient; the update of weight and two moments


def forward_flops(config: Any, lengths: Sequence[int], rows: int | None = None) -> float:
    """Of the encoder; the last layer computes only ``rows`` behind its attention."""
    tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    missing = 0 if rows is None else tokens - rows
    behind = 2 * (width * width + 2 * width * inner)
    each = tokens * (2 * 3 * width * width + behind) + 4 * pairs * width
    return layers * each - missing * behind


def parameters(config: Any) -> int:
    """Of the encoder: matrices, biases and norms."""
    width, inner = config.hidden_size, config.intermediate_size
    embeddings = config.vocab_size + config.max_position_embeddings + config.type_vocab_size + 2
    layer = 4 * width * width + 2 * width * inner + 9 * width + inner
    return embeddings * width + config.num_hidden_layers * layer


def masked_lm_work(config: Any, lengths: Sequence[int], labelled: int, dtype: str) -> Work:
    return _trained(config, lengths, labelled, _vocabulary_head(config, labelled))


def pre_training_work(config: Any, lengths: Sequence[int], labelled: int, dtype: str) -> Work:
    heads = _vocabulary_head(config, labelled), _class_head(config, len(lengths))
    return _trained(config, lengths, labelled + len(lengths), *heads)


def classifier_work(config: Any, lengths: Sequence[int], labelled: int, dtype: str) -> Work:
    return _trained(config, lengths, len(lengths), _class_head(config, len(lengths)))


Head = tuple[float, int]  # operations of a forward, parameters


def _vocabulary_head(config: Any, rows: int) -> Head:
    width, words = config.hidden_size, config.vocab_size
    # The decoder's matrix is that of the embeddings.
    return 2 * rows * (width * width + width * words), width * width + 3 * width + words


def _class_head(config: Any, sequences: int) -> Head:
    width = config.hidden_size
    return 2 * sequences * (width * width + CLASSES * width), (width + 1) * (width + CLASSES)


def _trained(config: Any, lengths: Sequence[int], read: int, *heads: Head) -> Work:
    """A step of an encoder of which ``read`` rows are read by these heads."""
    flops = forward_flops(config, lengths, read) + sum(flops for flops, _ in heads)
    count = parameters(config) + sum(count for _, count in heads)
    return Work(TRAINING * flops, PARAMETER_BYTES * count)


def distillation_work(
    student: Any, teacher: Any, lengths: Sequence[int], asked: bool, dtype: str
) -> Work:
    """``asked``: the teacher runs in the step."""
    tokens = sum(lengths)
    projection = 2 * tokens * student.hidden_size * teacher.hidden_size
    flops = TRAINING * forward_flops(student, lengths)
    flops += TRAINING * (student.num_hidden_layers + 1) * projection
    flops += student.num_hidden_layers * attention_loss_flops(student, teacher, lengths)
    trained = parameters(student) + (student.hidden_size + 1) * teacher.hidden_size
    read = PARAMETER_BYTES * trained
    if asked:
        flops += forward_flops(teacher, lengths)
        read += DTYPES[dtype].itemsize * parameters(teacher)
    return Work(flops, read)


def attention_loss_flops(student: Any, teacher: Any, lengths: Sequence[int]) -> float:
    """Of one matched layer, with its gradients."""
    tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    ours, theirs, heads = student.hidden_size, teacher.hidden_size, student.num_attention_heads
    d, t = ours // heads, theirs // heads
    scores = 2 * pairs * (ours + theirs) + 4 * pairs * ours
    gram = 4 * tokens * heads * ((d * d + d * t + t * t) + (d * d + d * t))
    return min(scores, gram)
