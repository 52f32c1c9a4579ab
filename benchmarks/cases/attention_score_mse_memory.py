"""Peak memory of the attention loss, forward and backward, against the length N: at fixed B, where
it should grow with N, and at a fixed number of tokens B N, where it should not.

One matched layer of TinyBERT-4L (12 heads of 26) and its teacher (12 heads of 64), every position
real. The peak counts what the loss adds to its operands: temporaries and the gradients of q and k.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from tinybert_fast.benchmarks.case import Case, Cases, Setup
from tinybert_fast.benchmarks.cases.attention_score_mse import as_released, case_of

BATCH, TOKENS, STUDENT_WIDTH = 4, 4096, 26
LENGTHS = (128, 256, 512, 1024)
SMOKE_BATCH, SMOKE_TOKENS = 2, 256
SMOKE_LENGTHS = (64, 128)


def cases(setup: Setup, *, name: str, fixed_tokens: bool) -> Iterator[Case]:
    tokens = SMOKE_TOKENS if setup.smoke else TOKENS
    for length in SMOKE_LENGTHS if setup.smoke else LENGTHS:
        batch = tokens // length if fixed_tokens else SMOKE_BATCH if setup.smoke else BATCH
        yield from case_of(name, setup, batch, length, STUDENT_WIDTH, as_released, phases=("both",))


CASES: Cases = {
    name: partial(cases, name=name, fixed_tokens=fixed_tokens)
    for name, fixed_tokens in (
        ("attention_score_mse_memory", False),
        ("attention_score_mse_memory_of_tokens", True),
    )
}
