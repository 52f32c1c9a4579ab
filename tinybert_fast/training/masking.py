"""Which tokens pre-training masks: how many, in what units, and which ones more often."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tinybert_fast.data import LossWeights, PreTrainingCollator, RatioSchedule
from tinybert_fast.data.token_weights import (
    DIRECTIONS,
    count_weights,
    idf_weights,
    read_position_weights,
    read_token_weights,
)

if TYPE_CHECKING:
    from tinybert_fast.data import Manifest

UNITS = ("token", "word", "span")
BY_COUNTS = ("count", "idf")
WEIGHTS = ("uniform", *BY_COUNTS, "loss")
MOST = {"count": 100.0, "idf": 100.0, "loss": 10.0}  # the largest weight over the smallest
ALPHA = 0.5
SERVES = {"direction": BY_COUNTS, "alpha": ("count",), "most": tuple(MOST)}  # option -> weights


@dataclass(frozen=True)
class Masking:
    """Token i of a row is masked with probability min(1, c h(token) g(place)), exactly k of a row.

    Attributes:
        ratio, ratio_end, schedule: share of tokens, over the steps (``RatioSchedule``).
        unit: "token", "word" or "span" (of words, as SpanBERT's).
        weights: h: "uniform", "count" and "idf" of the corpus, "loss" follows training, or a file
            (``read_token_weights``).
        direction: "important-more" or "important-less", for count and idf, which both need it.
        alpha: the power of "count"; ALPHA by default.
        most: bounds the weights of "count", "idf" and "loss"; MOST by default.
        positions: g, a file (``read_position_weights``).
    """

    ratio: float = 0.15
    ratio_end: float | None = None
    schedule: str = "constant"
    unit: str = "token"
    weights: str | Path = "uniform"
    direction: str | None = None
    alpha: float | None = None
    most: float | None = None
    positions: str | Path | None = None

    def __post_init__(self) -> None:
        _ = self.over_steps
        if self.unit not in UNITS:
            raise ValueError(f"unit (--mask) is {self.unit!r}; expected one of {', '.join(UNITS)}")
        if self.weights in BY_COUNTS and self.direction is None:
            raise ValueError(
                f"weights={self.weights!r} needs a direction: {' or '.join(DIRECTIONS)}"
            )
        for name, kinds in SERVES.items():
            value = getattr(self, name)
            if value is not None and self.weights not in kinds:
                raise ValueError(
                    f"{name}={value!r} is for weights {' and '.join(kinds)}; "
                    f"got {str(self.weights)!r}"
                )
        if self.weights in MOST:  # one token, for what the numbers are refused for
            direction = self.direction or DIRECTIONS[0]
            count_weights([1], direction, alpha=self._alpha, most=self._most)
        for name, path in (("weights", self._table), ("positions", self.positions)):
            if path is not None and not Path(path).is_file():
                known = f"{', '.join(WEIGHTS)} or a file" if name == "weights" else "a file"
                raise ValueError(f"{name} is {str(path)!r}; expected {known}")
        if self.positions is not None:
            read_position_weights(self.positions)

    @property
    def over_steps(self) -> RatioSchedule:
        return RatioSchedule(self.ratio, self.ratio_end, self.schedule)

    @property
    def _table(self) -> str | Path | None:
        return None if self.weights in WEIGHTS else self.weights

    @property
    def _most(self) -> float:
        return MOST[str(self.weights)] if self.most is None else self.most

    @property
    def _alpha(self) -> float:
        return ALPHA if self.alpha is None else self.alpha

    def settings(self) -> dict[str, Any]:
        """JSON values that decide the masks; files by what they hold."""
        found = asdict(self) | {"alpha": self._alpha}
        for name in ("weights", "positions"):
            path = self._table if name == "weights" else self.positions
            if path is not None:
                found[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
        return {f"masking_{name}": value for name, value in found.items()}

    def token_weights(self, manifest: Manifest, tokenizer: Any) -> np.ndarray | None:
        """h, float64 (V,), before training; None is uniform."""
        if self._table is not None:
            return read_token_weights(self._table, tokenizer)
        counts, direction = manifest.token_counts, self.direction or ""
        if self.weights == "count":
            return count_weights(counts, direction, alpha=self._alpha, most=self._most)
        if self.weights == "idf":
            spread, sentences = manifest.sentence_counts, manifest.sentences
            return idf_weights(spread, sentences, counts, direction, most=self._most)
        return None

    def collator(self, manifest: Manifest, tokenizer: Any, seed: int) -> PreTrainingCollator:
        return PreTrainingCollator(
            tokenizer,
            seed=seed,
            mlm_probability=self.ratio,
            whole_word_mask=self.unit == "word",
            span_mask=self.unit == "span",
            token_weights=self.token_weights(manifest, tokenizer),
            position_weights=None
            if self.positions is None
            else read_position_weights(self.positions),
        )

    def losses(self, tokenizer: Any, device: Any) -> LossWeights | None:
        if self.weights != "loss":
            return None
        return LossWeights(len(tokenizer), most=self._most, device=device)
