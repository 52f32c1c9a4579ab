"""Masked batches of pre-training examples."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinybert_fast.data.masking import CONTINUATION, SparseMaskingCollator
from tinybert_fast.ops import MaskingRule


class PreTrainingCollator:
    """Rows of ``open_shards`` -> a batch for BertForPreTraining, or for a masked-LM head.

    What comes out, for B examples padded to N:
        input_ids, attention_mask, token_type_ids: int64 (B, N).
        labels: int64 (B, N), -100 where nothing is masked. masked_rows, masked_labels: int64 (R,),
            the same without the -100, at flat places b * N + n.
        next_sentence_label: int64 (B,), where the examples are pairs.
        lengths: list of B numbers, for a packed encoder (``LengthCollator(lengths=True)``).

    Masks are a function of (seed, step, example_id) and the rule, so they do not depend on how the
    examples are batched and shared out. ``masking``: fields of SparseMaskingCollator, such as
    ``mlm_probability``, ``whole_word_mask``, ``token_weights`` and ``pad_to_multiple_of``.
    """

    def __init__(self, tokenizer, *, seed: int = 0, **masking: Any):
        self.masking = SparseMaskingCollator(
            tokenizer, seed=seed, **{"compact_labels": True, **masking}
        )
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        self._begins = np.array([not (t or "").startswith(CONTINUATION) for t in tokens])

    @property
    def rule(self) -> MaskingRule:
        rule = self.masking.rule
        assert rule is not None
        return rule

    def set_step(self, step: int) -> None:
        """Another step gives every example another mask."""
        self.masking.set_step(step)

    def set_ratio(self, ratio: float) -> None:
        """The share of tokens to mask from now on (``RatioSchedule``)."""
        self.masking.rule = replace(self.rule, ratio=ratio)

    def set_token_weights(self, weights: Tensor | Sequence[float]) -> None:
        """h, (V,), from now on (``LossWeights``)."""
        rule, special = self.rule, self.masking.tokenizer.all_special_ids
        fresh = MaskingRule.of(
            rule.vocab_size,
            rule.mask_id,
            special,
            token_weights=weights,
            device=rule.table.device,
        )
        self.masking.rule = replace(rule, table=fresh.table)

    def reversed(self, examples: Sequence[Mapping]) -> list[dict[str, Any]]:
        """Each segment's tokens in reversed order, [CLS] and [SEP] where they were. A whole word
        stays one: it begins now where it ended.
        """
        rows = []
        for example in examples:
            ids = np.asarray(example["input_ids"])
            n = len(ids)
            first = example.get("first_length", n)
            order = np.arange(n)
            for start, stop in ((1, first - 1), (first, n - 1)):
                order[start:stop] = order[start:stop][::-1]
            row = {**example, "input_ids": ids[order]}
            if self.rule.unit != "token":
                starts = np.asarray(example.get("word_starts", self._begins[ids]), bool)
                row["word_starts"] = np.append(starts[1:], True)[order]
            rows.append(row)
        return rows

    def __call__(self, examples: Sequence[Mapping]) -> dict[str, Any]:
        lengths = [len(example["input_ids"]) for example in examples]
        rows = []
        for example, length in zip(examples, lengths):
            row = {
                "input_ids": example["input_ids"],
                "token_type_ids": np.zeros(length, np.int64),
                "attention_mask": np.ones(length, np.int64),
                "example_id": example["example_id"],
            }
            if "first_length" in example:
                row["token_type_ids"][example["first_length"] :] = 1
            if "word_starts" in example:
                row["word_starts"] = example["word_starts"]
            rows.append(row)
        batch = self.masking(rows)
        if "next_sentence_label" in examples[0]:
            labels = [int(example["next_sentence_label"]) for example in examples]
            batch["next_sentence_label"] = torch.tensor(labels, device=batch["input_ids"].device)
        batch["lengths"] = lengths
        return batch
