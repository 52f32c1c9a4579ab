"""Attention of one layer: 12 heads of 26 (TinyBERT-4), 32 or 64 (TinyBERT-6, BERT) on full
sequences, and on ragged ones whose lengths are 20 to 100 % of N.

    sdpa           F.scaled_dot_product_attention on padded rows, key mask if ragged
    careful        the fastest of it, its backends by name (heads padded to 32 where that helps),
                   FlashAttention-2 on packed rows and, without dropout, compiled FlexAttention
    flash, ...     on a GPU, each of these by itself
    xformers       memory_efficient_attention on packed rows, on a GPU where it is installed
    ours           packed rows

Work: 4 sum(n^2) H D operations forward and 2.5 times that backward, padding and padded heads left
out; q, k, v, out and the row sums once, and what the backward reads and writes besides.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from tinybert_fast import ops
from tinybert_fast.benchmarks.baselines.attention import (
    BACKENDS,
    Sdpa,
    Xformers,
    flash_varlen,
    flex,
    with_any_heads,
    with_backend,
)
from tinybert_fast.benchmarks.batches import draw_lengths
from tinybert_fast.benchmarks.case import BASELINE, CAREFUL, OURS, Case, Cases, Setup, Work
from tinybert_fast.benchmarks.cases.op_case import (
    FEW_CALLS,
    GPU_CALLS,
    compiled,
    has_kernels,
    normal,
    op_case,
    sum_of,
)
from tinybert_fast.benchmarks.op_call import Fastest, OpCall
from tinybert_fast.ops.layout import SequenceLayout

HEADS, HEAD_WIDTHS = 12, (26, 32, 64)
FIRST_WIDTHS = (26, 64)  # those that models have
LENGTHS, RAGGED_LENGTHS, TOKENS, GPU_TOKENS = (128, 512), (512,), 4096, 65536
SMOKE_LENGTHS, SMOKE_HEADS, SMOKE_TOKENS = (16,), 2, 64
FLEX_FROM = 512  # shorter sequences are one block of it: a compilation that nobody would keep
# PyTorch's fused kernels keep the random state of dropout on the host when their forward runs
# outside a capture; a backward captured by itself would read that address on the device.
CAPTURED = ("forward", "both")
GPU_ALONE = ("flash", "efficient", "cudnn", "flash varlen", "flex")


def ours(
    layout: SequenceLayout, seed: Tensor, q: Tensor, k: Tensor, v: Tensor, **how: Any
) -> Tensor:
    return ops.attention(q, k, v, layout=layout, seed=seed, **how)


def work_of(lengths: tuple[int, ...], heads: int, width: int, phase: str, size: int) -> Work:
    rows = sum(lengths) * heads
    flops = 4.0 * sum(n * n for n in lengths) * heads * width
    forward = Work(flops, rows * (4 * width * size + 4))  # q, k, v, out; fp32 row sums
    return sum_of(phase, forward, Work(2.5 * flops, rows * (8 * width * size + 4)))


def cases(
    setup: Setup, *, name: str, width: int, dropout: bool = True, ragged: bool = False
) -> Iterator[Case]:
    heads, tokens, widths = HEADS, TOKENS, RAGGED_LENGTHS if ragged else LENGTHS
    if setup.on_gpu:
        tokens = GPU_TOKENS
    if setup.smoke:
        heads, tokens, widths = SMOKE_HEADS, SMOKE_TOKENS, SMOKE_LENGTHS
    for length in widths:
        batch = tokens // length
        lengths = [length] * batch
        if ragged:
            lengths = draw_lengths(batch, length, setup.generator())
        layout = SequenceLayout.from_lengths(lengths, length, setup.device)
        rate = setup.dropout if dropout else 0.0
        yield from op_case(
            name,
            setup,
            batch,
            length,
            providers_of(setup, layout, heads, width, rate),
            partial(work_of, layout.lengths, heads, width),
            valid_tokens=layout.total,
            dropout=rate,
            optional=(*GPU_ALONE, "xformers"),
            captured=CAPTURED,
            gpu_calls=FEW_CALLS if ragged else GPU_CALLS,  # a mask may take every fused kernel away
        )


def providers_of(
    setup: Setup, layout: SequenceLayout, heads: int, width: int, rate: float
) -> list[OpCall | Fastest]:
    draw = normal(setup)
    batch, length = layout.batch_size, layout.width
    # As BERT has them: (B, N, H D) that become heads by a view. Padding gets no gradient.
    *operands, incoming = (draw(batch, length, heads, width) for _ in range(4))
    packed = tuple(layout.pack(x) for x in operands)
    padded = tuple(x.transpose(1, 2) for x in operands)
    mask = None
    if not layout.is_full:
        at = torch.arange(length, device=setup.device)
        stops = torch.tensor(layout.lengths, device=setup.device)
        mask = (at < stops[:, None])[:, None, None]
    on_packed = {"incoming": layout.pack(incoming)}
    on_padded = {
        "incoming": layout.pad(layout.pack(incoming)).transpose(1, 2),
        "compared": lambda x: layout.pack(x.transpose(1, 2)),
    }

    sdpa = Sdpa(mask, "sdpa", BASELINE, padded, 3, rate, **on_padded)
    others = {
        name: OpCall(
            name,
            name,
            with_any_heads(partial(with_backend, backend, mask), width),
            padded,
            3,
            rate,
            **on_padded,
        )
        for name, backend in BACKENDS.items()
        if setup.on_gpu or name in ("flash", "math")
    }
    if setup.on_gpu:
        varlen = partial(flash_varlen, layout.cu_seqlens, layout.max_length)
        settings = with_any_heads(varlen, width)
        others["flash varlen"] = OpCall(
            "flash varlen", "flash varlen", settings, packed, 3, rate, **on_packed
        )
        if rate == 0.0 and layout.is_full and length >= FLEX_FROM:
            settings = with_any_heads(partial(flex, compiled(flex_attention)), width)
            others["flex"] = OpCall("flex", "flex", settings, padded, 3, rate, **on_padded)
    foreign = []
    if has_kernels(setup, "xformers"):
        settings = with_any_heads(Xformers(layout.lengths, setup.device), width)
        foreign.append(OpCall("xformers", "xformers", settings, packed, 3, rate, **on_packed))
    seed = torch.tensor([setup.seed, 1], device=setup.device)
    return [
        sdpa,
        Fastest("careful", CAREFUL, {"sdpa": sdpa, **others}),
        *(others[name] for name in GPU_ALONE if setup.on_gpu and name in others),
        *foreign,
        OpCall("ours", OURS, partial(ours, layout, seed), packed, 3, rate, **on_packed),
    ]


def _named(*widths: int, suffix: str = "", **options: bool) -> Cases:
    return {
        name: partial(cases, name=name, width=width, **options)
        for width in widths
        for name in (f"attention_d{width}{suffix}",)
    }


CASES: Cases = _named(*FIRST_WIDTHS)
MORE_CASES: Cases = {
    **_named(*FIRST_WIDTHS, suffix="_ragged", ragged=True),
    **_named(*FIRST_WIDTHS, suffix="_no_dropout", dropout=False),
    **_named(32),
    **_named(32, suffix="_no_dropout", dropout=False),
}
