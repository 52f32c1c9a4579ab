"""Values before speed: at dropout 0 the providers of a case must agree in loss and gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from tinybert_fast.benchmarks.case import Case, Disagreement, Failed, Outcome, Unavailable

# Relative differences allowed at dropout 0 in fp32, where the order of additions differs. In bf16:
# twice the reference's own distance from its fp32 answer, and these on top; of a loss, which may be
# near by chance, an eighth of a rounding to bf16 at least.
LOSS_TOLERANCE = 1e-5
LOSS_TOLERANCE_BF16 = 2.0**-12
GRADIENT_TOLERANCE = 2e-4
# A gradient is compared with its own norm, but with no less than this share of the largest one: the
# key biases' is zero but for rounding.
SMALLEST_NORM = 1e-3


def check(
    case: Case, dtype: str, left_out: dict[tuple[str, str], str] | None = None
) -> dict[str, tuple[float, float]]:
    """Largest (loss, gradient) error of each provider that a check compares, or Disagreement.

    An optional provider that fails or disagrees is written into ``left_out``, with the reason.
    """
    left_out = {} if left_out is None else left_out
    providers = {provider.name: provider for provider in case.providers}
    found: dict[str, tuple[float, float]] = {}
    for one in case.checks:
        if (one.reference, dtype) in left_out:
            raise Failed(f"{case.name}: {one.reference!r}, which others are held to, cannot run")
        exact = providers[one.reference].outcome(one.what, "fp32")
        allowed = [LOSS_TOLERANCE, GRADIENT_TOLERANCE]
        if dtype != "fp32":
            own, _ = errors_between(exact, providers[one.reference].outcome(one.what, dtype))
            allowed = [tolerance + 2 * e for tolerance, e in zip(allowed, own, strict=True)]
            allowed[0] = max(allowed[0], LOSS_TOLERANCE_BF16)
        allowed = [tolerance + one.rounding for tolerance in allowed]
        for name in one.others:
            if (name, dtype) in left_out:
                continue
            try:
                errors, worst = errors_between(exact, providers[name].outcome(one.what, dtype))
                # Written so that a NaN does not pass.
                if not all(e <= most for e, most in zip(errors, allowed, strict=True)):
                    raise Disagreement(
                        f"{case.name} in {dtype}, {one.what}: {name!r} does not compute what "
                        f"{one.reference!r} computes. Loss differs by {errors[0]:.2e} (allowed "
                        f"{allowed[0]:.1e}), gradient of {worst} by {errors[1]:.2e} (allowed "
                        f"{allowed[1]:.1e}). No speed is reported"
                    )
            except Exception as error:
                if not may_miss(case, name, error):
                    raise
                left_out[name, dtype] = str(error)
                continue
            before = found.get(name, (0.0, 0.0))
            found[name] = max(before[0], errors[0]), max(before[1], errors[1])
    return found


def errors_between(exact: Outcome, other: Outcome) -> tuple[tuple[float, float], str]:
    """Relative (loss, worst gradient) errors of ``other``, and the name of that gradient."""
    mine, theirs = (torch.as_tensor(each.loss, dtype=torch.float64) for each in (other, exact))
    loss = _norm(mine - theirs) / _norm(theirs)
    if exact.gradients.keys() != other.gradients.keys():
        strange = sorted(exact.gradients.keys() ^ other.gradients.keys())
        return (loss, float("inf")), f"{strange[0]} (only one side has it)"
    norms = {name: _norm(g) for name, g in exact.gradients.items()}
    if not norms:
        return (loss, 0.0), "nothing"
    floor = SMALLEST_NORM * max(norms.values())
    errors = {
        name: _norm(other.gradients[name].double() - g.double()) / max(norms[name], floor)
        for name, g in exact.gradients.items()
    }
    # A NaN compares false with everything: look for it first.
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return (loss, errors[worst]), worst


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double()))


def may_miss(case: Case, name: str, error: Exception) -> bool:
    """Whether the case goes on without a provider that raised this."""
    return name in case.optional or isinstance(error, Unavailable)
