"""Masked-LM batches for anyone's Trainer: ops.mlm_mask behind the interface of Transformers'
collator.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from tinybert_fast.ops import MaskingRule, mlm_mask

SEEDS = 2**63 - 1
PADDING = {
    "input_ids": None, "token_type_ids": 0, "attention_mask": 0, "special_tokens_mask": 1,
    "word_starts": 1,
}  # fmt: skip
CONTINUATION = "##"  # of WordPiece


@dataclass
class SparseMaskingCollator:
    """Encoded examples -> a batch with masked ``input_ids`` and ``labels`` (-100 elsewhere).

    The fields and what comes out are those of Transformers' ``DataCollatorForLanguageModeling``;
    the count is exact (``ops.mlm_mask``), and whole words are replaced like single tokens.

    Besides those fields:
        span_mask: spans of whole words, as SpanBERT masks them.
        token_weights, position_weights: h and g of ``MaskingRule.of``.
        compact_labels: also ``masked_rows`` (R,), flat places of the masked tokens, and
            ``masked_labels`` (R,).
        device: where batches are masked and end up; a GPU's only in the main process.

    Examples with ``example_id`` get the masks of (seed, step, example_id), whatever batch or worker
    they are in; ``set_step`` counts, an epoch, say. Others draw from torch's generator, as
    Transformers' collator does, or with a ``seed`` from one of this process alone. Whole words
    begin where a token does not begin with ``##``, or where the examples' ``word_starts`` say so.

    Raises:
        ValueError: what ``MaskingRule`` refuses; a tokenizer without a mask token.
    """

    tokenizer: Any
    mlm: bool = True
    whole_word_mask: bool = False
    mlm_probability: float = 0.15
    mask_replace_prob: float = 0.8
    random_replace_prob: float = 0.1
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"
    seed: int | None = None
    span_mask: bool = False
    token_weights: Any = None
    position_weights: Any = None
    compact_labels: bool = False
    device: str = "cpu"
    step: int = 0
    rule: MaskingRule | None = field(init=False, default=None, repr=False)

    def __post_init__(self) -> None:
        self._generator: torch.Generator | None = None
        if not self.mlm:
            if self.whole_word_mask or self.span_mask:
                raise ValueError("whole_word_mask and span_mask need mlm=True")
            return
        if self.tokenizer.mask_token is None:
            raise ValueError(
                f"{type(self.tokenizer).__name__} has no mask token; give it one, or use mlm=False"
            )
        size = len(self.tokenizer)
        self.rule = MaskingRule.of(
            size,
            self.tokenizer.mask_token_id,
            self.tokenizer.all_special_ids,
            token_weights=self.token_weights,
            position_weights=self.position_weights,
            device=self.device,
            ratio=self.mlm_probability,
            mask_share=self.mask_replace_prob,
            random_share=self.random_replace_prob,
            unit="span" if self.span_mask else "word" if self.whole_word_mask else "token",
        )
        tokens = self.tokenizer.convert_ids_to_tokens(range(size))
        continues = [token is not None and token.startswith(CONTINUATION) for token in tokens]
        self._starts = ~torch.tensor(continues, device=self.device)

    def set_step(self, step: int) -> None:
        """Another step gives every example another mask."""
        self.step = step

    def __call__(self, examples: Sequence[Any], return_tensors: str | None = None) -> dict:
        batch = self._pad(examples)
        ids, rule = batch["input_ids"], self.rule
        special = batch.pop("special_tokens_mask", None)
        numbers = batch.pop("example_id", None)
        starts = batch.pop("word_starts", None)
        if rule is None:
            pad = self.tokenizer.pad_token_id
            batch["labels"] = ids.clone() if pad is None else ids.masked_fill(ids == pad, -100)
            return self._converted(batch, return_tensors)
        if rule.unit == "token":
            starts = None
        else:
            starts = self._starts[ids] if starts is None else starts.bool()
        masked = mlm_mask(
            ids,
            rule,
            seed=self._draw_seed() if numbers is None else (self.seed or 0),
            step=self.step,
            example_ids=numbers,
            special_tokens_mask=special,
            attention_mask=batch.get("attention_mask"),
            word_starts=starts,
            dense_labels=True,
            allow_empty_rows=True,
            in_place=True,
        )
        assert masked.dense_labels is not None  # asked for
        batch["labels"] = masked.dense_labels
        if self.compact_labels:
            batch["masked_rows"], batch["masked_labels"] = masked.rows, masked.labels
        return self._converted(batch, return_tensors)

    def _pad(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """int64 (B, N) tensors on the device, and whatever else the tokenizer pads."""
        if not isinstance(examples[0], Mapping):
            examples = [{"input_ids": ids} for ids in examples]
        if self._simple(examples):
            lengths = [len(example["input_ids"]) for example in examples]
            multiple = self.pad_to_multiple_of or 1
            width = -(-max(lengths) // multiple) * multiple
            batch = {
                name: _padded([example[name] for example in examples], lengths, width, fill)
                for name, fill in {**PADDING, "input_ids": self.tokenizer.pad_token_id}.items()
                if name in examples[0]
            }
            if "attention_mask" not in batch and len(set(lengths)) > 1:
                ones = [np.ones(n, dtype=np.int64) for n in lengths]
                batch["attention_mask"] = _padded(ones, lengths, width, 0)
            if "example_id" in examples[0]:
                batch["example_id"] = torch.tensor([int(x["example_id"]) for x in examples])
        else:
            batch = dict(
                pad_without_fast_tokenizer_warning(
                    self.tokenizer,
                    list(examples),
                    return_tensors="pt",
                    pad_to_multiple_of=self.pad_to_multiple_of,
                )
            )
        return {name: x.to(self.device) for name, x in batch.items()}

    def _simple(self, examples: Sequence[Mapping]) -> bool:
        """Whether these are the tokenizer's own columns, padded on the right."""
        known = {*PADDING, "example_id"}
        right = getattr(self.tokenizer, "padding_side", "right") == "right"
        return right and self.tokenizer.pad_token_id is not None and set(examples[0]) <= known

    def _draw_seed(self) -> int:
        if self.seed is None:
            return int(torch.randint(SEEDS, ()))
        if self._generator is None:
            worker = torch.utils.data.get_worker_info()
            own = self.seed if worker is None else self.seed ^ worker.seed
            self._generator = torch.Generator().manual_seed(own)
        return int(torch.randint(SEEDS, (), generator=self._generator))

    def _converted(self, batch: dict[str, Tensor], return_tensors: str | None) -> dict:
        kind = return_tensors or self.return_tensors
        if kind not in ("pt", "np"):
            raise ValueError(f"return_tensors={kind!r} is not one of pt, np")
        return batch if kind == "pt" else {name: x.cpu().numpy() for name, x in batch.items()}


def _padded(rows: Sequence[Any], lengths: Sequence[int], width: int, fill: int) -> Tensor:
    """int64 (B, N): ``fill`` behind each row."""
    flat = np.concatenate([np.asarray(row, dtype=np.int64) for row in rows])
    out = np.full((len(rows), width), fill, dtype=np.int64)
    out[np.arange(width) < np.asarray(lengths)[:, None]] = flat
    return torch.from_numpy(out)
