"""The vocabulary head and its cross-entropy, forward and backward: a batch of B=32, N=128 whose
15 % masked tokens have labels, against BERT's 30,522 words, 312 or 768 wide. On a GPU B=256.

    transformers   logits of every token, as BertForMaskedLM computes them
    careful        of labelled tokens alone; on a GPU the faster of eager and compiled, with words
                   that nobody predicts up to an aligned number of them
    liger, cce     the fused losses of these packages on labelled tokens, where they are installed;
                   CCE without its filter, which drops small gradients

Work: logits of labelled tokens and their two gradients; their states and the weights read once,
gradients (of the states of all tokens) written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.benchmarks.baselines.one_model import whole_words
from tinybert_fast.benchmarks.case import BASELINE, CAREFUL, OURS, Case, Cases, Setup, Work
from tinybert_fast.benchmarks.cases.op_case import (
    FEW_CALLS,
    compiled,
    has_kernels,
    loss_phases,
    loss_work,
    normal,
    op_case,
)
from tinybert_fast.benchmarks.op_call import OpCall

BATCH, GPU_BATCH, WIDTH, WORDS, RATIO = 32, 256, 128, 30522, 0.15
WIDTHS = (312, 768)
SMOKE_BATCH, SMOKE_WIDTH, SMOKE_WORDS = 2, 16, 101
SAME = "the labelled tokens"


def every_token(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor):
    every = labels.new_full((len(hidden),), -100).index_copy(0, rows, labels)
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), every)


def labelled(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor):
    if hidden.is_cuda:
        weight, bias = whole_words(weight, bias)
    return F.cross_entropy(F.linear(hidden[rows], weight, bias).float(), labels)


def liger(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor):
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden[rows], labels, bias)


def cce(hidden: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, labels: Tensor):
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden[rows], weight, labels, bias=bias, impl="cce_exact")


def work_of(tokens: int, labelled: int, words: int, columns: int, phase: str, size: int) -> Work:
    product = 2 * labelled * words * columns
    weights = words * (columns + 1) * size
    read, written = labelled * columns * size + weights, tokens * columns * size + weights
    return loss_work(phase, (product, 2 * product), read, written)


def cases(setup: Setup, *, name: str, columns: int) -> Iterator[Case]:
    batch, width, words = GPU_BATCH if setup.on_gpu else BATCH, WIDTH, WORDS
    if setup.smoke:
        batch, width, words = SMOKE_BATCH, SMOKE_WIDTH, SMOKE_WORDS
    generator, draw, tokens = setup.generator(), normal(setup), batch * width
    rows = torch.randperm(tokens, generator=generator)[: round(RATIO * tokens)].sort().values
    labels = torch.randint(words, (len(rows),), generator=generator)
    call = (
        draw(tokens, columns),
        draw(words, columns) * 0.02,
        draw(words) * 0.02,
        rows.to(setup.device),
        labels.to(setup.device),
    )
    careful = {"eager": labelled, "compiled": compiled(labelled)} if setup.compiles else labelled
    packages = {
        "liger": (liger, has_kernels(setup, "liger_kernel")),
        "cce": (cce, has_kernels(setup, "cut_cross_entropy")),
    }
    yield from op_case(
        name,
        setup,
        batch,
        width,
        [
            OpCall("transformers", BASELINE, every_token, call, 3),
            OpCall("careful", CAREFUL, careful, call, 3),
            *(OpCall(name, name, op, call, 3) for name, (op, here) in packages.items() if here),
            OpCall("ours", OURS, ops.linear_cross_entropy, call, 3),
        ],
        partial(work_of, tokens, len(rows), words, columns),
        what=SAME,
        optional=tuple(packages),
        phases=loss_phases(setup),
        gpu_calls=FEW_CALLS,
    )


CASES: Cases = {
    name: partial(cases, name=name, columns=columns)
    for columns in WIDTHS
    for name in (f"linear_cross_entropy_d{columns}",)
}
