"""What `tinybert-fast validate` holds of ops without a gradient: of those on integers every bit,
counts and frequencies; of 8-bit floats how far they are from fp64, and from their definition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.ops import BlockMask, BlockPattern, MaskedTokens, MaskingRule, SequenceLayout
from tinybert_fast.ops.block_mask import SIDES
from tinybert_fast.reference.mlm_mask import ONE, inclusion_probabilities
from tinybert_fast.testing.budgets import Verdict
from tinybert_fast.testing.operands import normal

UNLIKE = "numbers unlike the reference's"
VOCABULARY, MASK, SPECIAL = 1000, 4, range(5)
DRAWS, BATCH, WIDTH = 200_000, 1000, 32
STANDARD_ERRORS = 4.0
LENGTHS = (1, 2, 7, 31, 128, 129, 512)
ROUNDED = 0.05  # of the result, whose bias is half of it: what e4m3 changes at most
FLIPPED = 0.01  # what lies between two numbers of e4m3 is rounded to either, and y to bf16


# What is claimed of a call, and a function that gives its verdicts.
Claims = Iterator[tuple[str, Callable[[], list[Verdict]]]]


def sequence_layout(device: torch.device | str, impl: str) -> Claims:
    source = torch.Generator().manual_seed(2)
    for width in (0, 1, 128, 129, 512):
        mask = torch.rand(33, width, generator=source) < 0.6
        mask[5:7] = False
        mask[7:9] = True
        yield f"33 x {width}, with holes", partial(_same_layout, mask.to(device), impl)


def _same_layout(mask: Tensor, impl: str) -> list[Verdict]:
    """Numbers of a layout that differ from the reference's."""
    got, want = (SequenceLayout.from_mask(mask, impl=name) for name in (impl, "reference"))
    differ = 0
    for a, b in ((getattr(got, name), getattr(want, name)) for name in want.__dict__):
        differ += _differing(a, b) if isinstance(b, Tensor) else int(a != b)
    return [Verdict(UNLIKE, float(differ), 0.0)]


def mlm_mask(device: torch.device | str, impl: str) -> Claims:
    for unit in ("token", "word", "span"):
        for weighted in (False, True):
            kind = "weighted" if weighted else "uniform"
            label = f"{unit}s, {kind}, lengths {min(LENGTHS)} to {max(LENGTHS)}"
            yield label, partial(_same_masking, device, impl, unit, weighted)
    label = f"{DRAWS:,} draws, of {STANDARD_ERRORS:.0f} standard errors"
    yield label, partial(_frequencies, device, impl)


def block_mask(device: torch.device | str, impl: str) -> Claims:
    source = torch.Generator().manual_seed(3)
    for side in SIDES:
        for size in (1, 129, 500):
            steps = torch.rand(3, size, generator=source) < 0.02
            options = {
                "documents": steps.cumsum(1).int().to(device),
                "lengths": torch.tensor([size, size // 2, 0], device=device),
            }
            patterns = {
                "documents": BlockPattern(side=side),
                "Longformer": BlockPattern.longformer(64, (0, 70), side=side),
                "BigBird": BlockPattern.bigbird(3, 1, 1, side=side),
            }
            for name, pattern in patterns.items():
                label = f"{name}, blocks of {side}, 3 x {size}"
                yield label, partial(_same_lists, pattern, size, impl, options)


def _same_lists(pattern: BlockPattern, size: int, impl: str, options: dict) -> list[Verdict]:
    """Numbers of the lists that differ from the reference's."""
    got, want = (
        BlockMask.from_pattern(pattern, size, **options, impl=name) for name in (impl, "reference")
    )
    differ = sum(_differing(a, b) for a, b in zip(got.lists, want.lists, strict=True))
    return [Verdict(UNLIKE, float(differ), 0.0)]


def feed_forward_fp8(device: torch.device | str, impl: str) -> Claims:
    for rows, width, hidden in ((200, 768, 3072), (1, 768, 3072), (33, 320, 1200)):
        size = rows, width, hidden
        yield f"{rows} x {width} to {hidden}", partial(_same_block, device, impl, *size)


def _same_block(
    device: torch.device | str, impl: str, rows: int, width: int, hidden: int
) -> list[Verdict]:
    shapes = ((rows, width), (hidden, width), (hidden,), (width, hidden), (width,))
    x, first, bias, second, last = (
        normal(shape, seed, device=device) for seed, shape in enumerate(shapes)
    )
    x, first, second = x.bfloat16(), first * width**-0.5, second * hidden**-0.5
    weights = ops.Fp8Weights.of(first, bias, second, last)
    truth = F.gelu(F.linear(x.double(), first.double(), bias.double()))
    truth = F.linear(truth, second.double(), last.double())
    got, want = (
        ops.feed_forward_fp8(x, weights, impl=name).double() for name in (impl, "reference")
    )
    return [
        Verdict("distance from fp64", float((got - truth).norm() / truth.norm()), ROUNDED),
        Verdict("distance from the reference", float((got - want).norm() / want.norm()), FLIPPED),
    ]


CLAIMS = {
    "block_mask": block_mask,
    "feed_forward_fp8": feed_forward_fp8,
    "mlm_mask": mlm_mask,
    "sequence_layout": sequence_layout,
}


def _rule(device: torch.device | str, unit: str = "token", weighted: bool = False) -> MaskingRule:
    weights = torch.linspace(0.001, 1.0, VOCABULARY) ** 3 if weighted else None
    places = [1.0, 0.5, 2.0] if weighted else None
    return MaskingRule.of(
        VOCABULARY, MASK, SPECIAL, token_weights=weights, position_weights=places, unit=unit,
        device=device,
    )  # fmt: skip


def _same_masking(
    device: torch.device | str, impl: str, unit: str, weighted: bool
) -> list[Verdict]:
    """Bits that differ from the reference; and rows whose count is not what k is by its formula."""
    source = torch.Generator().manual_seed(1)
    width = max(LENGTHS)
    ids = torch.randint(0, VOCABULARY, (len(LENGTHS), width), generator=source)
    options: dict[str, Any] = {
        "attention_mask": torch.arange(width) < torch.tensor(LENGTHS)[:, None]
    }
    if unit != "token":
        options["word_starts"] = torch.rand(ids.shape, generator=source) < 0.6
    eligible = (options["attention_mask"] & (ids >= len(SPECIAL))).sum(1).tolist()
    options = {name: x.to(device) for name, x in options.items()}
    rule = _rule(device, unit, weighted)

    def run(impl: str) -> MaskedTokens:
        return ops.mlm_mask(
            ids.to(device), rule, seed=7, step=3, dense_labels=True, allow_empty_rows=True,
            impl=impl, **options,
        )  # fmt: skip

    got, want = run(impl), run("reference")
    pairs = zip(got, want, strict=True)
    differ = sum(_differing(a, b) for a, b in pairs if a is not None and b is not None)
    counts = got.offsets.diff().tolist()
    ratio = round(rule.ratio * ONE)
    budgets = [min(n, max(1, (n * ratio + ONE // 2) // ONE)) for n in eligible]
    wrong = sum(
        count != k if unit == "token" else count > k
        for count, k in zip(counts, budgets, strict=True)
    )
    return [
        Verdict(UNLIKE, float(differ), 0.0),
        Verdict("rows of another count than k", float(wrong), 0.0),
    ]


def _differing(a: Tensor, b: Tensor) -> int:
    return int((a != b).sum()) if a.shape == b.shape else max(a.numel(), b.numel())


def _frequencies(device: torch.device | str, impl: str) -> list[Verdict]:
    """Deviations in standard errors: of each token's frequency from its p, and of the shares."""
    ids = torch.arange(5, VOCABULARY, (VOCABULARY - 5) // WIDTH)[:WIDTH]
    rule = MaskingRule.of(
        VOCABULARY, MASK, SPECIAL, token_weights=torch.linspace(0.01, 1.0, VOCABULARY) ** 2,
        device=device,
    )  # fmt: skip
    rows = ids.expand(BATCH, -1).contiguous().to(device)
    chosen = torch.zeros(WIDTH, dtype=torch.int64, device=device)
    masked = changed = total = 0
    for step in range(DRAWS // BATCH):
        got = ops.mlm_mask(rows, rule, seed=5, step=step, impl=impl)
        chosen += torch.bincount(got.rows % WIDTH, minlength=WIDTH)
        new = got.input_ids.flatten()[got.rows]
        masked += int((new == MASK).sum())
        changed += int((new != got.labels).sum())
        total += len(new)
    weights = ((rule.table.long().cpu() & (ONE - 1)) >> 1)[ids].tolist()
    k = max(1, round(rule.ratio * WIDTH))
    p = torch.tensor(inclusion_probabilities(weights, k), dtype=torch.float64) / ONE
    error = (p * (1 - p) / DRAWS).sqrt()
    deviation = (chosen.cpu() / DRAWS - p).abs() / error.clamp_min(1 / DRAWS / DRAWS)
    shares = {
        "share of [MASK]": (masked, rule.mask_share),
        # a random token is at times the one that was there
        "share that changed": (
            changed,
            rule.mask_share + rule.random_share * (1 - 1 / len(rule.ordinary)),
        ),
    }
    return [
        Verdict("inclusion", float(deviation.max()), STANDARD_ERRORS),
        *(
            Verdict(
                name,
                abs(count / total - share) / (share * (1 - share) / total) ** 0.5,
                STANDARD_ERRORS,
            )
            for name, (count, share) in shares.items()
        ),
    ]
