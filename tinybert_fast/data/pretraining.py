"""Masked batches of pre-training examples."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tinybert_fast.data.collate import Columns, columns_of, padded
from tinybert_fast.data.masking import CONTINUATION, SparseMaskingCollator
from tinybert_fast.ops import MaskingRule


class PreTrainingCollator:
    """Rows of ``open_shards`` -> a batch for BertForPreTraining, or for a masked-LM head.

    Rows are a list of them, or the columns that ``collate.Rows`` gives. What comes out, for B
    examples padded to N on the right:
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

    def reversed(self, examples: Sequence[Mapping] | Columns) -> Columns:
        """Each segment's tokens in reversed order, [CLS] and [SEP] where they were. A whole word
        stays one: it begins now where it ended.
        """
        columns = columns_of(examples)
        ids, lengths = columns["input_ids"], columns["lengths"]
        ends = np.cumsum(lengths)
        n = np.repeat(lengths, lengths)  # of each token: its example's length, where B begins, ...
        first = np.repeat(columns.get("first_length", lengths), lengths).astype(np.int64)
        start = np.repeat(ends - lengths, lengths)
        place = np.arange(len(ids)) - start
        in_a, in_b = (place > 0) & (place < first - 1), (place >= first) & (place < n - 1)
        turned = np.where(in_a, first - 1 - place, np.where(in_b, first + n - 2 - place, place))
        order = start + turned
        found = {**columns, "input_ids": ids[order]}
        if self.rule.unit != "token":
            starts = columns.get("word_starts", self._begins[ids])
            behind = np.append(starts[1:], True)
            behind[ends - 1] = True
            found["word_starts"] = behind[order]
        return found

    def __call__(self, examples: Sequence[Mapping] | Columns) -> dict[str, Any]:
        columns = columns_of(examples)
        tokenizer, multiple = self.masking.tokenizer, self.masking.pad_to_multiple_of or 1
        batch: dict[str, Any] = padded(columns, tokenizer.pad_token_id, multiple)
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        if "first_length" in columns:
            first = torch.tensor(columns["first_length"])[:, None]
            in_b = torch.arange(batch["input_ids"].shape[1]) >= first
            batch["token_type_ids"] += in_b * batch["attention_mask"]
        batch["example_id"] = torch.tensor(columns["example_id"])  # a table lends its own
        batch = self.masking.masked(batch)
        if "next_sentence_label" in columns:
            labels = torch.from_numpy(columns["next_sentence_label"].astype(np.int64))
            batch["next_sentence_label"] = labels.to(batch["input_ids"].device)
        batch["lengths"] = columns["lengths"].tolist()
        return batch
