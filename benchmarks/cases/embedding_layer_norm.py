"""BERT's input layer, rows 312 (TinyBERT-4) and 768 wide: the sum of three embeddings, layer norm
and dropout in plain PyTorch, compiled and not, and ours; 30,522 words, drawn evenly.

Work: a word's row read and y written forward; dy and the word's row read, three tables of gradients
written backward; the ids both times.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.benchmarks.case import Case, Cases, Setup, Work
from tinybert_fast.benchmarks.cases.layer_norm import COLUMNS, EPS, STATISTICS
from tinybert_fast.benchmarks.cases.op_case import batch_of, normal, row_case, sum_of
from tinybert_fast.ops.layout import SequenceLayout

WORDS, POSITIONS, TYPES = 30522, 512, 2
SMOKE_WORDS = 101
PADDING = 0  # the word that gets no gradient
IDS = 3 * 8  # bytes of a token's, int64


def eager(
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    positions: Tensor,
    types: Tensor,
    *,
    dropout_p: float,
) -> Tensor:
    total = F.embedding(ids, word, PADDING)
    total = total + F.embedding(types, token_type) + F.embedding(positions, position)
    return F.dropout(F.layer_norm(total, word.shape[-1:], weight, bias, EPS), dropout_p)


def ours(
    layout: SequenceLayout,
    seed: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    positions: Tensor,
    types: Tensor,
    **how: Any,
) -> Tensor:
    return ops.embedding_layer_norm(
        ids,
        types,
        positions,
        word,
        position,
        token_type,
        weight,
        bias,
        eps=EPS,
        seed=seed,
        layout=layout,
        padding_idx=PADDING,
        **how,
    )


def work_of(rows: int, columns: int, words: int, phase: str, size: int) -> Work:
    row, tables = columns * size, (words + POSITIONS + TYPES + 2) * columns * size
    forward = rows * (2 * row + STATISTICS + IDS)
    return sum_of(phase, Work(0, forward), Work(0, forward + tables))


def cases(setup: Setup, *, name: str, columns: int) -> Iterator[Case]:
    batch, width = batch_of(setup)
    draw, rows = normal(setup), batch * width
    words = SMOKE_WORDS if setup.smoke else WORDS
    layout = SequenceLayout.full(batch, width, setup.device)
    ids = torch.randint(1, words, (rows,), generator=setup.generator()).to(setup.device)
    types = (layout.columns >= width // 2).long()  # two segments
    tables = (draw(words, columns), draw(POSITIONS, columns), draw(TYPES, columns))
    seed = torch.tensor([setup.seed, 1], device=setup.device)
    yield from row_case(
        name,
        setup,
        eager,
        partial(ours, layout, seed),
        (*tables, draw(columns), draw(columns), ids, layout.columns, types),
        5,
        partial(work_of, rows, columns, words),
        dropout=setup.dropout,
    )


CASES: Cases = {
    name: partial(cases, name=name, columns=columns)
    for columns in COLUMNS
    for name in (f"embedding_layer_norm_d{columns}",)
}
