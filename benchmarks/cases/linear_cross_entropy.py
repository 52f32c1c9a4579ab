"""The vocabulary head and its cross-entropy, forward and backward: a batch of B=32, N=128 whose
15 % masked tokens have labels, against BERT's 30,522 words, 312 or 768 wide.

    transformers   logits of every token, as BertForMaskedLM computes them
    careful        of labelled tokens alone
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.benchmarks.case import BASELINE, CAREFUL, OURS, Case, Cases, Check, Setup
from tinybert_fast.benchmarks.op_call import OpCall

BATCH, WIDTH, WORDS, RATIO = 32, 128, 30522, 0.15
WIDTHS = (312, 768)
SMOKE_BATCH, SMOKE_WIDTH, SMOKE_WORDS = 2, 16, 101
SAME = "the labelled tokens"


def every_token(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor):
    every = labels.new_full((len(hidden),), -100).index_copy(0, rows, labels)
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), every)


def labelled(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor):
    return F.cross_entropy(F.linear(hidden[rows], weight, bias).float(), labels)


def cases(setup: Setup, *, name: str, columns: int) -> Iterator[Case]:
    batch, width, words = BATCH, WIDTH, WORDS
    if setup.smoke:
        batch, width, words = SMOKE_BATCH, SMOKE_WIDTH, SMOKE_WORDS
    generator, tokens = setup.generator(), batch * width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    rows = torch.randperm(tokens, generator=generator)[: round(RATIO * tokens)].sort().values
    labels = torch.randint(words, (len(rows),), generator=generator)
    operands = (normal(tokens, columns), normal(words, columns) * 0.02, normal(words) * 0.02)
    call = tuple(x.to(setup.device) for x in (*operands, rows, labels))
    yield Case(
        name=name,
        batch=batch,
        width=width,
        valid_tokens=tokens,
        dropout=0.0,
        optimizer="none",
        providers=[
            OpCall("transformers", BASELINE, every_token, call, 3),
            OpCall("careful", CAREFUL, labelled, call, 3),
            OpCall("ours", OURS, ops.linear_cross_entropy, call, 3),
        ],
        checks=(Check(SAME, "transformers", ("careful", "ours")),),
    )


CASES: Cases = {
    name: partial(cases, name=name, columns=columns)
    for columns in WIDTHS
    for name in (f"linear_cross_entropy_d{columns}",)
}
