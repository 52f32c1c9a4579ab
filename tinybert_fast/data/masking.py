"""Masked-LM batches for anyone's Trainer: ops.mlm_mask behind the interface of Transformers'
collator.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from tinybert_fast.ops import MaskingRule, mlm_mask, native
from tinybert_fast.ops.dispatch import UNAVAILABLE

SEEDS = 2**63 - 1
KINDS = ("pt", "np")
CONTINUATION = "##"  # of WordPiece
# Columns with an entry for each token, and what stands at padding; input_ids have the tokenizer's.
COLUMNS = {
    "input_ids": None,
    "token_type_ids": 0,
    "attention_mask": 0,
    "special_tokens_mask": 1,
    "word_starts": 0,
    "offset_mapping": 0,
}


@dataclass
class SparseMaskingCollator:
    """Encoded examples -> a batch with masked ``input_ids`` and ``labels`` (-100 elsewhere).

    The fields and what comes out are those of Transformers' ``DataCollatorForLanguageModeling``;
    the count is exact (``ops.mlm_mask``), and whole words are replaced like single tokens.

    Besides those fields:
        span_mask: spans of whole words, as SpanBERT masks them.
        token_weights, position_weights: h and g of ``MaskingRule.of``.
        compact_labels: also ``masked_rows`` (R,), flat places of the masked tokens, and
            ``masked_labels`` (R,). On a GPU R is the most that can be, and (row 0, label -100)
            stands at their end: nothing waits for the device.
        device: where batches are masked and end up; a GPU's only in the main process.

    Examples with ``example_id`` get the masks of (seed, step, example_id), whatever batch or worker
    they are in; ``set_step`` counts, an epoch, say. Others draw from torch's generator, as
    Transformers' collator does, or with a ``seed`` from one of this process alone. Whole words
    begin where the examples' ``word_starts`` say so, or where their ``offset_mapping`` leaves a
    gap (Transformers' rule), or else where a token does not begin with ``##`` (BERT's rule).

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
        self._drawn_by: tuple[int, int] | None = None
        # Shared with the workers of a DataLoader, those that outlive an epoch too.
        self._step = torch.tensor(self.step, device="cpu").share_memory_()
        if self.return_tensors not in KINDS:
            raise ValueError(f"return_tensors={self.return_tensors!r} is not one of pt, np")
        if self.whole_word_mask and self.span_mask:
            raise ValueError("span_mask masks spans of whole words: leave out whole_word_mask")
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
        """Another step gives every example another mask, in running workers too."""
        self.step = step
        self._step.fill_(step)

    def __call__(self, examples: Sequence[Any], return_tensors: str | None = None) -> dict:
        if return_tensors not in (None, *KINDS):
            raise ValueError(f"return_tensors={return_tensors!r} is not one of pt, np")
        if not examples:
            raise ValueError("SparseMaskingCollator got no example")
        return self._converted(self.masked(self._pad(examples)), return_tensors)

    def masked(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a call makes of examples, of their columns already padded: int64 (B, N) on the CPU,
        ``example_id`` (B,).
        """
        most = None
        if self.rule is not None and self.device != "cpu":
            most = self.rule.most(_lengths(batch))
            batch = {
                name: x.pin_memory().to(self.device, non_blocking=True) for name, x in batch.items()
            }
        ids, rule = batch["input_ids"], self.rule
        special = batch.pop("special_tokens_mask", None)
        numbers = batch.pop("example_id", None)
        starts = self._word_starts(
            ids, batch.pop("word_starts", None), batch.pop("offset_mapping", None)
        )
        if rule is None:
            pad = self.tokenizer.pad_token_id
            batch["labels"] = ids.clone() if pad is None else ids.masked_fill(ids == pad, -100)
            return batch
        masked = mlm_mask(
            ids,
            rule,
            seed=self._draw_seed() if numbers is None else (self.seed or 0),
            step=int(self._step),
            example_ids=numbers,
            special_tokens_mask=special,
            attention_mask=batch.get("attention_mask"),
            word_starts=starts,
            dense_labels=True,
            capacity=most,
            allow_empty_rows=True,
            in_place=True,
        )
        assert masked.dense_labels is not None  # asked for
        batch["labels"] = masked.dense_labels
        if self.compact_labels:
            batch["masked_rows"], batch["masked_labels"] = masked.rows, masked.labels
        return batch

    def _word_starts(
        self, ids: Tensor, starts: Tensor | None, offsets: Tensor | None
    ) -> Tensor | None:
        """Bool (B, N), True where a word begins; None if tokens are masked one by one."""
        if self.rule is None or self.rule.unit == "token":
            return None
        if starts is not None:
            return starts.bool()
        if offsets is None:
            return self._starts[ids]
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[:, 1:] = offsets[:, 1:, 0] != offsets[:, :-1, 1]
        return begins  # a token behind one that cannot be masked begins a word anyway

    def _pad(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """int64 (B, N) tensors, and whatever else the tokenizer pads, on the CPU."""
        mapped = isinstance(examples[0], Mapping)
        if not mapped:
            examples = [{"input_ids": ids} for ids in examples]
        if not self._simple(examples):
            return dict(
                pad_without_fast_tokenizer_warning(
                    self.tokenizer,
                    list(examples),
                    return_tensors="pt",
                    pad_to_multiple_of=self.pad_to_multiple_of,
                )
            )
        lengths = [len(example["input_ids"]) for example in examples]
        multiple = self.pad_to_multiple_of or 1
        width = -(-max(lengths) // multiple) * multiple
        batch = {
            name: _padded(name, [example[name] for example in examples], lengths, width, fill)
            for name, fill in {**COLUMNS, "input_ids": self.tokenizer.pad_token_id}.items()
            if name in examples[0]
        }
        expected = mapped and "attention_mask" in self.tokenizer.model_input_names
        if "attention_mask" not in batch and (expected or min(lengths) < width):
            real = np.arange(width) < np.asarray(lengths)[:, None]
            batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
        if "example_id" in examples[0]:
            batch["example_id"] = torch.tensor(
                [int(x["example_id"]) for x in examples], device="cpu"
            )
        return batch

    def _simple(self, examples: Sequence[Mapping]) -> bool:
        """Whether these are the tokenizer's own columns, padded on the right."""
        right = getattr(self.tokenizer, "padding_side", "right") == "right"
        names = set(examples[0])
        known = names <= {*COLUMNS, "example_id"} and all(set(x) == names for x in examples)
        return right and self.tokenizer.pad_token_id is not None and known

    def _draw_seed(self) -> int:
        if self.seed is None:
            return int(torch.randint(SEEDS, ()))
        worker = torch.utils.data.get_worker_info()
        own = self.seed if worker is None else self.seed ^ worker.seed
        if self._generator is None or self._drawn_by != (os.getpid(), own):
            self._drawn_by = (os.getpid(), own)  # not the generator of the process before a fork
            self._generator = torch.Generator().manual_seed(own)
        return int(torch.randint(SEEDS, (), generator=self._generator))

    def _converted(self, batch: dict[str, Tensor], return_tensors: str | None) -> dict:
        kind = return_tensors or self.return_tensors
        return batch if kind == "pt" else {name: x.cpu().numpy() for name, x in batch.items()}


def _lengths(batch: Mapping[str, Tensor]) -> list[int]:
    """Real tokens of each row, by a mask on the host."""
    mask = batch.get("attention_mask")
    if mask is None:
        return [batch["input_ids"].shape[1]] * len(batch["input_ids"])
    return (mask != 0).sum(1).tolist()


def _padded(
    name: str, rows: Sequence[Any], lengths: Sequence[int], width: int, fill: int
) -> Tensor:
    """int64 (B, N), or (B, N, 2) of offsets: ``fill`` behind each row."""
    found = list(map(len, rows))
    if found != lengths:
        b = next(b for b, n in enumerate(lengths) if found[b] != n)
        raise ValueError(f"example {b} has {found[b]} {name} for {lengths[b]} input_ids")
    parts = 2 if name == "offset_mapping" else 1
    if isinstance(rows[0], list) and UNAVAILABLE["native"] is None:
        try:
            return native.pad_lists(rows, width, fill, parts)
        except (TypeError, OverflowError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
    flat = np.concatenate([np.asarray(row).reshape(n, -1) for row, n in zip(rows, lengths)])
    if flat.dtype.kind not in "iub" or flat.shape[1] != parts:
        raise TypeError(f"{name}: expected {parts} integers for a token; got {flat.dtype}")
    out = np.full((len(rows), width, parts), fill, dtype=np.int64)
    out[np.arange(width) < np.asarray(lengths)[:, None]] = flat
    return torch.from_numpy(out if parts > 1 else out[..., 0])
