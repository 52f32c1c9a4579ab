"""Peak memory of the attention loss, forward and backward: against the length N at fixed B, where
it should grow with N; at a fixed number of tokens B N, where it should not grow; and against B at
fixed N, where it may grow with B.

One matched layer of TinyBERT-4L (12 heads of 26) and its teacher (12 heads of 64), every position
real. The peak counts what the loss adds to its operands: temporaries and the gradients of q and k.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tinybert_fast.benchmarks.case import Case, Cases, Setup
from tinybert_fast.benchmarks.cases.attention_score_mse import as_released, case_of

STUDENT_WIDTH = 26
Shapes = dict[str, list[tuple[int, int]]]  # case -> its (B, N)


def shapes(
    batch: int, tokens: int, lengths: tuple[int, ...], length: int, batches: tuple[int, ...]
) -> Shapes:
    """``lengths`` at ``batch`` and at so many ``tokens``, ``batches`` at ``length``."""
    return {
        "attention_score_mse_memory": [(batch, n) for n in lengths],
        "attention_score_mse_memory_of_tokens": [(tokens // n, n) for n in lengths],
        "attention_score_mse_memory_of_batch": [(b, length) for b in batches],
    }


SHAPES = shapes(4, 4096, (128, 256, 512, 1024), 512, (1, 2, 4, 8, 16))
SMOKE_SHAPES = shapes(2, 256, (64, 128), 64, (1, 2))


def cases(setup: Setup, *, name: str) -> Iterator[Case]:
    for batch, length in (SMOKE_SHAPES if setup.smoke else SHAPES)[name]:
        yield from case_of(name, setup, batch, length, STUDENT_WIDTH, as_released, phases=("both",))


CASES: Cases = {name: partial(cases, name=name) for name in SHAPES}
