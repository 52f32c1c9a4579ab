"""What `tinybert-fast validate` holds of mlm_mask: bits, counts, frequencies, replacements."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tinybert_fast.ops import MaskedTokens, MaskingRule, mlm_mask
from tinybert_fast.reference.mlm_mask import ONE, inclusion_probabilities
from tinybert_fast.testing.budgets import Verdict

VOCABULARY, MASK, SPECIAL = 1000, 4, range(5)
DRAWS, BATCH, WIDTH = 200_000, 1000, 32
STANDARD_ERRORS = 4.0
LENGTHS = (1, 2, 7, 31, 128, 129, 512)


def claims(device: torch.device | str, impl: str) -> Iterator[tuple[str, Callable]]:
    """What is claimed of mlm_mask, and a function that gives its verdicts."""
    for unit in ("token", "word", "span"):
        for weighted in (False, True):
            label = f"{unit}s, {'weighted' if weighted else 'uniform'}, lengths {min(LENGTHS)} to "
            yield (
                f"{label}{max(LENGTHS)}",
                lambda u=unit, w=weighted: _equal(device, impl, u, w),
            )
    yield (
        f"{DRAWS:,} draws, of {STANDARD_ERRORS:.0f} standard errors",
        lambda: _frequencies(device, impl),
    )


def _rule(device: torch.device | str, unit: str = "token", weighted: bool = False) -> MaskingRule:
    weights = torch.linspace(0.001, 1.0, VOCABULARY) ** 3 if weighted else None
    places = [1.0, 0.5, 2.0] if weighted else None
    return MaskingRule.of(
        VOCABULARY, MASK, SPECIAL, token_weights=weights, position_weights=places, unit=unit,
        device=device,
    )  # fmt: skip


def _equal(device: torch.device | str, impl: str, unit: str, weighted: bool) -> list[Verdict]:
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
        return mlm_mask(
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
        Verdict("numbers unlike the reference's", float(differ), 0.0),
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
        got = mlm_mask(rows, rule, seed=5, step=step, impl=impl)
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
