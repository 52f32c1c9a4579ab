"""How wrong an implementation may be, measured by how wrong the reference is.

    budget = 2 * max |reference(dtype) - reference(fp64)| + roundings * eps * max |reference(fp64)|

for each tensor of a call, its value and its gradients. So a budget needs no table of tolerances: it
follows the dtype, the shape and the op. Half precision is computed in fp32 and rounded once. In
fp32 the sums are rounded too, and a reference that sums in another order may be exact by luck. A
tensor much smaller than the call's largest gradient is a difference of such: its roundings are
relative to a quarter of that.

In half precision each sequence of attention has a budget of its own: entries shrink with its
length, and roundings of a short sequence's are as large as a key too many is to a long one. In fp32
no rounding hides that, and the batch has one: of a sequence of one token or two the gradient may be
0 but for the roundings of what cancels, which its own entries then say nothing of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
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
    """The error of one tensor of a call beside its budget, both in max-norm; where sequences have
    budgets of their own, of the one that uses most of it."""

    name: str
    error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget < math.inf  # False for NaN

    @property
    def share(self) -> float:
        """Error over budget; infinite for NaN, beyond a budget of 0, and beside an infinite one."""
        if self.error == 0.0 and self.budget < math.inf:
            return 0.0
        return self.error / self.budget if 0.0 < self.budget < math.inf > self.error else math.inf

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3e}, budget {self.budget:.3e}"


def verdicts(case: Case, impl: Impl, slack: float | None = None) -> list[Verdict]:
    """Value and gradients of ``impl``, against the reference in the case's dtype and in fp64.

    ``slack`` multiplies the roundings, by default as SLACK has it for the op.
    """
    slack = SLACK.get(case.served, 1) if slack is None else slack
    actual, low = case.run(impl), case.run("reference")
    exact = case.to(torch.float64).run("reference", upstream_dtype=case.dtype)
    return compare(actual, low, exact, slack * rounding(case.dtype), pieces=sequences_of(case))


def sequences_of(case: Case) -> Callable[[Tensor], Sequence[Tensor]]:
    """The sequences of a tensor of the call that have budgets of their own; or all of it, as one.

    Rows are packed (T, H, D), or padded with the batch in front, (B, H, N, D).
    """
    layout = case.options.get("layout")

    def sequences(x: Tensor) -> Sequence[Tensor]:
        if layout is None or case.dtype == torch.float32 or x.dim() < 3 or not layout.batch_size:
            return (x,)
        return x.split(layout.lengths) if x.dim() == 3 else x.unbind()

    return sequences


def rounding(dtype: torch.dtype) -> float:
    """What a budget allows a result of ``dtype`` beside the reference's own error, relative."""
    return ROUNDINGS[dtype] * torch.finfo(dtype).eps


def compare(
    actual: dict[str, Tensor],
    low: dict[str, Tensor],
    exact: dict[str, Tensor],
    rounding: float,
    group: Callable[[str], str] = lambda name: "",
    pieces: Callable[[Tensor], Sequence[Tensor]] = lambda x: (x,),
) -> list[Verdict]:
    """A verdict per tensor: ``actual`` against ``exact`` (fp64), beside the error of ``low``.

    Names of gradients begin with "d"; their roundings are relative to SMALLEST_SHARE of the largest
    gradient of their ``group`` at least, the others' to themselves alone. Each of the ``pieces`` of
    a tensor is held alone, beside the same piece of other gradients, and the worst is the verdict.

    Raises:
        AssertionError: a name, shape or dtype is another than ``low``'s.
    """
    if actual.keys() != exact.keys():
        raise AssertionError(f"only one side has {sorted(actual.keys() ^ exact.keys())[0]}")
    largest: dict[tuple[str, int], float] = {}
    for name, x in exact.items():
        if name.startswith("d"):
            for i, piece in enumerate(pieces(x)):
                of = group(name), i
                largest[of] = max(largest.get(of, 0.0), largest_of(piece))
    found = []
    for name, want in exact.items():
        if actual[name].shape != want.shape or actual[name].dtype != low[name].dtype:
            raise AssertionError(
                f"{name}: expected {low[name].dtype} {tuple(want.shape)}; got "
                f"{actual[name].dtype} {tuple(actual[name].shape)}"
            )
        held = []
        sides = (pieces(x) for x in (actual[name], low[name], want))
        for i, (ours, theirs, true) in enumerate(zip(*sides, strict=True)):
            scale = largest_of(true)
            if name.startswith("d"):
                scale = max(scale, SMALLEST_SHARE * largest[group(name), i])
            budget = 2 * largest_of(theirs.double() - true) + rounding * scale
            held.append(Verdict(name, largest_of(ours.double() - true), budget))
        found.append(max(held, key=lambda verdict: (verdict.share, verdict.budget)))
    return found


def assert_within_budget(case: Case, impl: Impl, slack: float | None = None) -> None:
    """AssertionError that lists each tensor of the call whose error is over its budget."""
    over = [str(verdict) for verdict in verdicts(case, impl, slack) if not verdict.passed]
    if over:  # raised, so that ``python -O`` checks too
        raise AssertionError(f"{case.op.__name__} impl={impl!r}: " + "; ".join(over))


def largest_of(x: Tensor) -> float:
    """max |x|, NaN if any is, 0.0 of no element."""
    return x.abs().max().item() if x.numel() else 0.0
