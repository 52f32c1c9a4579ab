"""h(token), g(position) and the ratio of masking over time, for ``ops.MaskingRule``.

Rare tokens are held to be the important ones, and there are two schools. "important-more" masks
them more often, as most of the literature does (XLM and DistilBERT: count^-0.7); "important-less"
masks them less often, so that they stay as context from which the common ones are told.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tinybert_fast.data.text_files import read_lines

DIRECTIONS = ("important-more", "important-less")
SCHEDULES = ("constant", "linear", "cosine")
LOSS_UNIT = 2**-20  # in which losses are added up: whole numbers give the same sum in any order


def count_weights(
    counts: Sequence[int], direction: str, *, alpha: float = 0.5, most: float = 100.0
) -> np.ndarray:
    """h = max(count, 1)^-alpha for "important-more", its reciprocal for "important-less".

    ``counts``: (V,) occurrences (``Manifest.token_counts``). ``most``: the largest weight over the
    smallest; see ``bounded``. Returns float64 (V,).
    """
    if not 0.0 <= alpha <= 2.0:
        raise ValueError(f"alpha is {alpha}; expected 0 (uniform) to 2")
    seen = np.maximum(np.asarray(counts, np.float64), 1.0)
    return bounded(_directed(seen**-alpha, direction), counts, most)


def idf_weights(
    sentence_counts: Sequence[int],
    sentences: int,
    counts: Sequence[int],
    direction: str,
    *,
    most: float = 100.0,
) -> np.ndarray:
    """h = log(1 + sentences / max(1, sentences with the token)), or its reciprocal; float64 (V,).

    Inverse document frequency with sentences for documents, of which a corpus always has many.
    """
    holding = np.maximum(np.asarray(sentence_counts, np.float64), 1.0)
    return bounded(_directed(np.log1p(sentences / holding), direction), counts, most)


def read_token_weights(path: str | Path, tokenizer) -> np.ndarray:
    """h from a file of lines ``token<TAB>weight``; tokens it does not name weigh 1. float64 (V,).

    Raises:
        ValueError: a line that is no such pair, a token the vocabulary lacks, a weight below 0 or
            not finite; with the number of the line.
    """
    vocabulary = tokenizer.get_vocab()
    weights = np.ones(len(tokenizer))
    for number, line in _numbered(path):
        token, tab, weight = line.rpartition("\t")
        if not tab:
            raise ValueError(f"{path}: line {number} is {line!r}; expected token, tab, number")
        if token not in vocabulary:
            raise ValueError(f"{path}: line {number}: {token!r} is not in the vocabulary")
        weights[vocabulary[token]] = _weight(path, number, weight)
    return weights


def read_position_weights(path: str | Path) -> np.ndarray:
    """g from a file with one number in a line: P of them, spread over the length of each row."""
    weights = [_weight(path, number, line) for number, line in _numbered(path)]
    if not weights:
        raise ValueError(f"{path} holds no weights; expected one number in each line")
    return np.array(weights)


def bounded(weights: np.ndarray, counts: Sequence[int], most: float) -> np.ndarray:
    """Weights of more than 0, the largest at most ``most`` times the smallest.

    Outliers on both sides come nearer: the range lies around the geometric mean over the corpus, so
    that tokens of ordinary frequency keep their proportions.
    """
    if not most >= 1.0:
        raise ValueError(f"most is {most}; expected a ratio of 1 (uniform) or more")
    shares = np.asarray(counts, np.float64)
    logs = np.log(weights)
    middle = np.average(logs, weights=shares) if shares.any() else logs.mean()
    reach = math.log(most) / 2
    return np.exp(np.clip(logs - middle, -reach, reach))


class LossWeights:
    """h that follows training: tokens whose loss stays high are masked more often.

    average: float32 (V,), exponential moving average of each token's loss, 0 where it has not been
    seen. The same bits for any order of the tokens in a batch, on any device.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        decay: float = 0.9,
        most: float = 10.0,
        device: torch.device | str = "cpu",
    ):
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay is {decay}; expected 0 to less than 1")
        if not most >= 1.0:
            raise ValueError(f"most is {most}; expected a ratio of 1 (uniform) or more")
        self.decay, self.most = decay, most
        self.average = torch.zeros(vocab_size, device=device)

    @torch.no_grad()
    def update(
        self, ids: Tensor, losses: Tensor, over_processes: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """ids: int64 (R,), the masked tokens; one below 0 is none. losses: (R,), theirs, finite.
        ``over_processes``: adds up an int64 tensor of each process, so that all of them keep the
        same averages.
        """
        real = (ids >= 0).long()
        units, ids = (losses.double() / LOSS_UNIT).round().long() * real, ids.clamp_min(0)
        sums = torch.zeros((2, len(self.average)), dtype=torch.int64, device=self.average.device)
        sums[0].index_add_(0, ids, units)
        sums[1].index_add_(0, ids, real)
        totals, times = sums if over_processes is None else over_processes(sums)
        mean = (totals.double() * LOSS_UNIT / times.clamp_min(1)).float()
        moved = torch.lerp(mean, self.average, self.decay)
        first = self.average == 0
        self.average = torch.where(times > 0, torch.where(first, mean, moved), self.average)

    def weights(self) -> Tensor:
        """h, float32 (V,): the average loss over its mean, within sqrt(most) of 1; 1 where a token
        has not been seen.
        """
        seen = self.average > 0
        mean = self.average.sum() / seen.sum().clamp_min(1)
        reach = math.sqrt(self.most)
        relative = (self.average / mean.clamp_min(LOSS_UNIT)).clamp(1 / reach, reach)
        return torch.where(seen, relative, 1.0)

    def state_dict(self) -> dict[str, Tensor]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        average = state["average"]
        if average.shape != self.average.shape:
            raise ValueError(
                f"losses of {len(average)} tokens cannot go on with {len(self.average)} tokens"
            )
        self.average = average.to(self.average.device, torch.float32, copy=True)


@dataclass(frozen=True)
class RatioSchedule:
    """The share of tokens to mask at a step: from ``start`` to ``end``.

    kind: "constant" stays at start, "linear" goes straight, "cosine" is flat at both ends.
    """

    start: float = 0.15
    end: float | None = None
    kind: str = "constant"

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise ValueError(f"schedule is {self.kind!r}; expected one of {', '.join(SCHEDULES)}")
        if self.end is None and self.kind != "constant":
            raise ValueError(f"a {self.kind} masking ratio needs an end (--ratio-end)")
        if self.end is not None and self.kind == "constant":
            raise ValueError(
                f"a masking ratio that ends at {self.end} is not constant; choose the schedule "
                "linear or cosine (--ratio-schedule)"
            )
        for ratio in (self.start, self.end):
            if ratio is not None and not 0.0 < ratio <= 1.0:
                raise ValueError(f"a masking ratio is {ratio}; expected above 0, at most 1")

    def __call__(self, step: int, steps: int) -> float:
        """At ``step`` of ``steps``, which is 0 at first."""
        if self.end is None:
            return self.start
        done = min(1.0, step / max(1, steps))
        if self.kind == "cosine":
            done = (1.0 - math.cos(math.pi * done)) / 2.0
        return self.start + (self.end - self.start) * done


def _directed(importance: np.ndarray, direction: str) -> np.ndarray:
    if direction not in DIRECTIONS:
        raise ValueError(f"direction is {direction!r}; expected one of {', '.join(DIRECTIONS)}")
    return importance if direction == "important-more" else 1.0 / importance


def _numbered(path: str | Path):
    """(number, line) of the lines that hold something."""
    for number, line in enumerate(read_lines(Path(path)), 1):
        if line:
            yield number, line


def _weight(path: str | Path, number: int, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0.0 <= weight < math.inf:
        raise ValueError(f"{path}: line {number}: {text!r} is no weight; expected a number >= 0")
    return weight
