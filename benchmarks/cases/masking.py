"""Masking of a batch of 256 rows: the call that masks, and whole collators from lists of integers.

    transformers, ... numpy  the two paths of DataCollatorForLanguageModeling
    torch exact              an exact number in each row, as ours, by multinomial or by top-k

Transformers' collators choose every token by its own coin and ours an exact number, so there are no
equal results to compare. Instead ours, the call and what the collators return, is held bit for bit
to the Python reference on some rows before anything is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinybert_fast.benchmarks.batches import IGNORED
from tinybert_fast.benchmarks.case import (
    BASELINE,
    CAREFUL,
    OURS,
    Case,
    Cases,
    Disagreement,
    Outcome,
    Setup,
)
from tinybert_fast.benchmarks.op_call import fastest
from tinybert_fast.data import SparseMaskingCollator
from tinybert_fast.ops import MaskingRule, mlm_mask
from tinybert_fast.testing.tiny_models import tiny_tokenizer

BATCH, WIDTHS = 256, (128, 512)
SMOKE_BATCH, SMOKE_WIDTHS = 8, (16,)
VOCABULARY = 30522  # BERT's English one
PIECES = round(0.2 * VOCABULARY)  # continue a word
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FIRST_WORD = len(SPECIAL) + PIECES  # ids: special tokens, pieces, words
CHECKED_ROWS = 4
INTEGERS = ("int64",)
RATIO = 0.15  # of the tokens, masked
CALLS, SHORT_CALLS = 10, 50  # in a row, for one measurement


class Call:
    """A call as a provider, or the fastest of several."""

    def __init__(
        self, name: str, role: str, calls: Callable[[], Any] | dict[str, Callable[[], Any]]
    ) -> None:
        self.name, self.role = name, role
        self.calls = calls if isinstance(calls, dict) else {"": calls}
        self._chosen = next(iter(self.calls))

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        def choose(setting: str) -> None:
            self._chosen = setting

        if len(self.calls) > 1:
            fastest(self, dtype, tuple(self.calls), choose, seconds)

    def setting(self, dtype: str) -> str:
        return self._chosen

    def run(self, dtype: str) -> None:
        self.calls[self._chosen]()

    def outcome(self, what: str, dtype: str) -> Outcome:
        raise NotImplementedError("masks are drawn, and differ")


def by_multinomial(allowed: Tensor, count: int) -> Tensor:
    return torch.multinomial(allowed, count)


def by_top_keys(allowed: Tensor, count: int) -> Tensor:
    return (torch.rand_like(allowed) * allowed).topk(count, sorted=False).indices


EXACT = {"multinomial": by_multinomial, "top-k": by_top_keys}


def exactly(
    choose: Callable[[Tensor, int], Tensor], mask_id: int, ids: Tensor, special: Tensor
) -> tuple[Tensor, Tensor]:
    """Ids (B, N) with as many tokens masked in every row, which are full, and their labels."""
    width = ids.shape[1] - 2  # without the special ones
    chosen = choose((special == 0).float(), round(RATIO * width))
    words = ids.gather(1, chosen)
    coin = torch.rand(chosen.shape)
    other = torch.randint(VOCABULARY, chosen.shape)
    new = torch.where(coin < 0.8, mask_id, torch.where(coin < 0.9, other, words))
    return ids.scatter(1, chosen, new), torch.full_like(ids, IGNORED).scatter_(1, chosen, words)


def tokenizer() -> Any:
    """WordPiece with a vocabulary of BERT's size, of made-up words."""
    words = [f"##p{n}" if n < PIECES else f"w{n}" for n in range(VOCABULARY - len(SPECIAL))]
    with tempfile.TemporaryDirectory() as folder:
        return tiny_tokenizer(Path(folder), (*SPECIAL, *words))


def draw_examples(setup: Setup, batch: int, width: int) -> list[dict[str, list]]:
    """Rows of exactly ``width`` tokens as a tokenizer gives them, lists of Python integers."""
    generator = setup.generator()
    drawn = torch.randint(len(SPECIAL), VOCABULARY, (batch, width), generator=generator)
    drawn[:, 0], drawn[:, -1] = SPECIAL.index("[CLS]"), SPECIAL.index("[SEP]")
    special = [1, *[0] * (width - 2), 1]
    examples = []
    for ids in drawn.tolist():
        offsets, stop = [(0, 0)], 0
        for token in ids[1:-1]:
            start = stop + (token >= FIRST_WORD)  # a space before every word
            stop = start + 4
            offsets.append((start, stop))
        examples.append(
            {
                "input_ids": ids,
                "token_type_ids": [0] * width,
                "attention_mask": [1] * width,
                "special_tokens_mask": list(special),
                "offset_mapping": [*offsets, (0, 0)],
            }
        )
    return examples


def mask_cases(setup: Setup) -> Iterator[Case]:
    """The masking call alone on int64 ids, given the special tokens; dense labels. Transformers'
    replaces tokens in place: it gets a copy, which ours makes by itself.
    """
    from transformers import DataCollatorForLanguageModeling

    known = tokenizer()
    theirs = DataCollatorForLanguageModeling(known)

    def in_torch(ids: Tensor, special: Tensor) -> Any:
        return theirs.torch_mask_tokens(ids.clone(), special)

    def in_numpy(ids: np.ndarray, special: np.ndarray) -> Any:
        return theirs.numpy_mask_tokens(ids.copy(), special)

    rule = MaskingRule.of(VOCABULARY, known.mask_token_id, known.all_special_ids)
    weights = torch.rand(VOCABULARY, generator=setup.generator()) + 0.1
    weighted = MaskingRule.of(
        VOCABULARY, known.mask_token_id, known.all_special_ids, token_weights=weights
    )
    batch, widths = (SMOKE_BATCH, SMOKE_WIDTHS) if setup.smoke else (BATCH, WIDTHS)
    for width in widths:
        examples = draw_examples(setup, batch, width)
        special = torch.tensor([example["special_tokens_mask"] for example in examples])
        ids = torch.tensor([example["input_ids"] for example in examples])
        for each in (rule, weighted):
            hold_to_reference(ids, each, special)
        arrays = ids.numpy(), special.numpy()
        ours = partial(mlm_mask, ids, seed=1, special_tokens_mask=special, dense_labels=True)
        yield Case(
            name="mlm_mask",
            batch=batch,
            width=width,
            valid_tokens=batch * width,
            dropout=0.0,
            optimizer="none",
            providers=[
                Call("transformers", BASELINE, partial(in_torch, ids, special)),
                Call("transformers numpy", CAREFUL, partial(in_numpy, *arrays)),
                Call(
                    "torch exact",
                    "torch exact",
                    {
                        setting: partial(exactly, choose, known.mask_token_id, ids, special)
                        for setting, choose in EXACT.items()
                    },
                ),
                Call("ours", OURS, partial(ours, rule)),
                Call("ours weighted", OURS, partial(ours, weighted)),
            ],
            checks=(),
            dtypes=INTEGERS,
            calls=SHORT_CALLS,
        )


def collate_cases(setup: Setup, *, name: str, whole_words: bool) -> Iterator[Case]:
    """From the tokenizer's lists to padded tensors or arrays with labels."""
    from transformers import DataCollatorForLanguageModeling

    known = tokenizer()
    options: dict[str, Any] = {"whole_word_mask": whole_words}
    if whole_words:  # as Transformers' collator has it
        options |= {"mask_replace_prob": 1.0, "random_replace_prob": 0.0}
    batch, widths = (SMOKE_BATCH, SMOKE_WIDTHS) if setup.smoke else (BATCH, WIDTHS)
    for width in widths:
        examples = draw_examples(setup, batch, width)
        if not whole_words:
            for example in examples:
                del example["offset_mapping"]
        ours = SparseMaskingCollator(known, **options)
        hold_collator_to_reference(ours, examples)

        def of_copies(collate: Callable, examples: list = examples) -> Any:
            return collate([dict(example) for example in examples])

        yield Case(
            name=name,
            batch=batch,
            width=width,
            valid_tokens=batch * width,
            dropout=0.0,
            optimizer="none",
            providers=[
                Call(label, role, partial(of_copies, collator))
                for label, role, collator in (
                    ("transformers", BASELINE, DataCollatorForLanguageModeling(known, **options)),
                    (
                        "transformers numpy",
                        CAREFUL,
                        DataCollatorForLanguageModeling(known, return_tensors="np", **options),
                    ),
                    ("ours", OURS, ours),
                )
            ],
            checks=(),
            dtypes=INTEGERS,
            calls=CALLS,
        )


def hold_to_reference(ids: Tensor, rule: MaskingRule, special: Tensor) -> None:
    """Disagreement unless the first rows come out as the reference masks them."""
    few, marks = ids[:CHECKED_ROWS].contiguous(), special[:CHECKED_ROWS].contiguous()
    exact, got = (
        mlm_mask(few, rule, seed=1, special_tokens_mask=marks, impl=impl)
        for impl in ("reference", "auto")
    )
    for what in ("input_ids", "rows", "labels", "offsets"):
        if not torch.equal(getattr(exact, what), getattr(got, what)):
            raise Disagreement(f"mlm_mask: {what} differs from the reference's")


def hold_collator_to_reference(collator: SparseMaskingCollator, examples: list[dict]) -> None:
    """Disagreement unless it returns, of the first rows, what the tokenizer gave with the
    reference's masks, and labels where the reference chooses and nowhere else."""
    few = [{**example, "example_id": b} for b, example in enumerate(examples[:CHECKED_ROWS])]
    got = collator(few)  # numbered, so that the masks are a function of seed, step and number
    ids, special, types, attention = (
        torch.tensor([example[name] for example in few])
        for name in ("input_ids", "special_tokens_mask", "token_type_ids", "attention_mask")
    )
    rule = collator.rule
    assert rule is not None  # the collator masks
    exact = mlm_mask(
        ids,
        rule,
        seed=collator.seed or 0,
        step=collator.step,
        example_ids=torch.arange(len(few)),
        special_tokens_mask=special,
        word_starts=None if rule.unit == "token" else ids >= FIRST_WORD,
        impl="reference",
    )
    labels = torch.full_like(ids, IGNORED)
    labels.view(-1)[exact.rows] = ids.view(-1)[exact.rows]
    expected = {
        "input_ids": exact.input_ids,
        "labels": labels,
        "token_type_ids": types,
        "attention_mask": attention,
    }
    if got.keys() != expected.keys():
        raise Disagreement(
            f"SparseMaskingCollator: returned {', '.join(got)}; expected {', '.join(expected)}"
        )
    for what, value in expected.items():
        if not torch.equal(got[what], value):
            raise Disagreement(f"SparseMaskingCollator: {what} differs from the reference's")


CASES: Cases = {
    "mlm_mask": mask_cases,
    "collate_tokens": partial(collate_cases, name="collate_tokens", whole_words=False),
    "collate_words": partial(collate_cases, name="collate_words", whole_words=True),
}
