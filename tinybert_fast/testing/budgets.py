"""How wrong an implementation may be, measured by how wrong the reference is.

    budget = 2 * max |reference(dtype) - reference(fp64)| + roundings * eps * max |reference(fp64)|

for each tensor of a call, its value and its gradients. So a budget needs no table of tolerances: it
follows the dtype, the shape and the op. Half precision is computed in fp32 and rounded once. In
fp32 the sums are rounded too, and a reference that sums in another order may be exact by luck. A
tensor much smaller than the call's largest gradient is a difference of such: its roundings are
relative to a quarter of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tinybert_fast.ops.dispatch import Impl
from tinybert_fast.testing.operands import Case

ROUNDINGS = {torch.float32: 4, torch.float16: 1, torch.bfloat16: 1}
SMALLEST_SHARE = 0.25  # of the call's largest gradient
# Roundings beside the usual, of ops whose intermediates are larger than their results.
SLACK = {
    # dS = P (dP - rowsum(P dP)) is a difference of sums of D products.
    "attention": 4,
    # E = P - Q is a difference of softmaxes. Of each, a GPU rounds the score, its distance from the
    # largest, exp2 (ex2.approx: 2 units in the last place), the sum and its reciprocal.
    "attention_relation_kl": 4,
    # Gram: dQ = a Q (K^T K) - b P (R^T K) is a difference of two products.
    "attention_score_mse": 2,
}


@dataclass(frozen=True)
class Verdict:
    """The error of one tensor of a call beside its budget, both in max-norm."""

    name: str
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget < math.inf  # False for NaN

    @property
    def share(self) -> float:
        """Error over budget; infinite for NaN, and beyond a budget of 0."""
        if self.error == 0.0:
            return 0.0
        return self.error / self.budget if self.budget > 0.0 and self.error < math.inf else math.inf

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3e}, budget {self.budget:.3e}"


def verdicts(case: Case, impl: Impl, slack: float | None = None) -> list[Verdict]:
    """Value and gradients of ``impl``, against the reference in the case's dtype and in fp64.

    ``slack`` multiplies the roundings, by default as SLACK has it for the op.
    """
    slack = SLACK.get(case.served, 1) if slack is None else slack
    actual, low = case.run(impl), case.run("reference")
    exact = case.to(torch.float64).run("reference", upstream_dtype=case.dtype)
    return compare(actual, low, exact, slack * rounding(case.dtype))


def rounding(dtype: torch.dtype) -> float:
    """What a budget allows a result of ``dtype`` beside the reference's own error, relative."""
    return ROUNDINGS[dtype] * torch.finfo(dtype).eps


def compare(
    actual: dict[str, Tensor],
    low: dict[str, Tensor],
    exact: dict[str, Tensor],
    rounding: float,
    group: Callable[[str], str] = lambda name: "",
) -> list[Verdict]:
    """A verdict per tensor: ``actual`` against ``exact`` (fp64), beside the error of ``low``.

    Names of gradients begin with "d"; their roundings are relative to SMALLEST_SHARE of the largest
    gradient of their ``group`` at least, the others' to themselves alone.

    Raises:
        AssertionError: a name, shape or dtype is another than ``low``'s.
    """
    if actual.keys() != exact.keys():
        raise AssertionError(f"only one side has {sorted(actual.keys() ^ exact.keys())[0]}")
    largest: dict[str, float] = {}
    for name, x in exact.items():
        if name.startswith("d"):
            largest[group(name)] = max(largest.get(group(name), 0.0), largest_of(x))
    found = []
    for name, want in exact.items():
        if actual[name].shape != want.shape or actual[name].dtype != low[name].dtype:
            raise AssertionError(
                f"{name}: expected {low[name].dtype} {tuple(want.shape)}; got "
                f"{actual[name].dtype} {tuple(actual[name].shape)}"
            )
        scale = largest_of(want)
        if name.startswith("d"):
            scale = max(scale, SMALLEST_SHARE * largest[group(name)])
        budget = 2 * largest_of(low[name].double() - want) + rounding * scale
        found.append(Verdict(name, largest_of(actual[name].double() - want), budget))
    return found


def assert_within_budget(case: Case, impl: Impl, slack: float | None = None) -> None:
    """AssertionError that lists each tensor of the call whose error is over its budget."""
    over = [str(verdict) for verdict in verdicts(case, impl, slack) if not verdict.passed]
    if over:  # raised, so that ``python -O`` checks too
        raise AssertionError(f"{case.op.__name__} impl={impl!r}: " + "; ".join(over))


def largest_of(x: Tensor) -> float:
    """max |x|, NaN if any is, 0.0 of no element."""
    return x.abs().max().item() if x.numel() else 0.0
