"""The words of the runner: providers do the same job, a case times them, checks hold them to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BASELINE, CAREFUL, OURS = "a", "b", "ours"  # roles: as it comes, as a careful user writes it
PASSES = ("forward", "backward", "both")
REFERENCE = "reference"  # the role of an op by its definition
COMPILED = "careful compile"  # the role of the latter's step compiled
CAREFUL_GRAPH = "careful graph"  # of the whole step as a CUDA graph


@dataclass(frozen=True)
class Setup:
    """What all cases of a run share. ``smoke``: sizes that take a second, for tests. ``reference``:
    time each op's reference too."""

    device: torch.device
    dropout: float = 0.1
    seed: int = 0
    smoke: bool = False
    reference: bool = True

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def compiles(self) -> bool:
        """Whether baselines are compiled too, each of which takes longer than a smoke run."""
        return not self.smoke

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a provider computed at dropout 0, to be compared with the others. ``loss``: or the
    result of what is none."""

    loss: float | Tensor
    gradients: dict[str, Tensor]


class Failed(RuntimeError):
    """Some cases gave no rows; the message says why. The others' rows are shown and written."""


class Disagreement(Failed):
    """Providers of one case computed different things; the message says which and by how much."""


class Unavailable(RuntimeError):
    """A provider cannot run here, said by its ``tune``: its case goes on without it."""


class Provider(Protocol):
    """One way to do the job. ``dtype`` is that of autocast; fp32 means none.

    One that does another job, which is timed beside the others and compared with none, has a
    ``work`` of its own, as its case has.
    """

    name: str
    role: str

    def tune(self, dtype: str, seconds: Callable[[Callable[[], Any]], float]) -> None:
        """Choose the fastest of its settings on this machine, if it has any.

        Raises:
            Unavailable: none of them runs here; the message says why.
        """

    def setting(self, dtype: str) -> str:
        """The chosen setting in words, empty if there is nothing to choose."""

    def run(self, dtype: str) -> Any:
        """What is timed."""

    def outcome(self, what: str, dtype: str) -> Outcome:
        """Loss and gradients at dropout 0 on the inputs of the check ``what``."""


class Work(NamedTuple):
    """What a job needs at least, whoever does it: each operand read once, each result written."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Check:
    """On the inputs ``what``, ``others`` must agree with ``reference`` in loss and gradients, but
    for what they round more coarsely than their dtype: ``rounding``, a relative difference."""

    what: str
    reference: str
    others: tuple[str, ...]
    rounding: float = 0.0


@dataclass(eq=False)
class Case:
    name: str
    batch: int  # sequences
    width: int  # padded length
    valid_tokens: int
    dropout: float
    optimizer: str  # inside what is timed; "none" if it is not
    providers: list[Any]
    checks: tuple[Check, ...]
    dtypes: tuple[str, ...] | None = None  # its only ones; by default those that are asked for
    calls: int = 1  # in a row that one measurement is the mean of, where one call is short
    phase: str = "both"  # what of it is timed, of PASSES
    work: Callable[[str], Work] | None = None  # of what is timed, by dtype
    captured: bool = False  # on a GPU also timed as a CUDA graph of those calls
    # Providers that are left out, with a warning, where they cannot serve a dtype or disagree:
    # other people's code, which must not take ours off the table.
    optional: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        which = "" if self.phase == "both" else f" {self.phase}"
        return f"{self.name} N={self.width}{which}"

    @property
    def valid_fraction(self) -> float:
        return self.valid_tokens / (self.batch * self.width)


Cases = dict[str, Callable[[Setup], Iterator[Case]]]  # built one at a time: models are large


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bf16")


def one_line(error: Exception) -> str:
    """Kind and first line of an error, for a line on stderr."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
