"""Cross-entropy of a student's logits against a teacher's."""

from __future__ import annotations

from torch import Tensor

from tinybert_fast.ops.dispatch import (
    FLOATS_AND_DOUBLE,
    Impl,
    Limit,
    Limits,
    check_devices,
    choose,
    define,
    without_autocast,
)
from tinybert_fast.ops.loss import in_fp32, scalar_loss
from tinybert_fast.reference.soft_cross_entropy import soft_cross_entropy as reference

LIMITS = Limits("soft_cross_entropy", torch=Limit(FLOATS_AND_DOUBLE))
FORMS = ("cross_entropy", "kl")
REDUCTIONS = ("batch", "official")

_forward = define(
    "soft_cross_entropy_fwd(Tensor student, Tensor teacher, float temperature, SymInt divisor,"
    " str form) -> (Tensor loss, Tensor dstudent)",
    fake=lambda student, *rest: (in_fp32(student, ()), in_fp32(student)),
    sparing=("torch",),
    torch="tinybert_fast.tuned.soft_cross_entropy:forward",
)


def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    *,
    temperature: float = 1.0,
    form: str = "cross_entropy",
    reduction: str = "batch",
    impl: Impl = "auto",
) -> Tensor:
    """``F.cross_entropy(student / t, softmax(teacher / t))`` on (B, K) logits.

    Args:
        student_logits, teacher_logits: fp16, bf16, fp32 or fp64; any strides.
        temperature: t, divides both.
        form: "cross_entropy" as above, without a factor t^2 (Jiao et al. 2020, equation 10); or
            "kl", ``t**2 * F.kl_div(log_softmax(student / t), softmax(teacher / t),
            reduction="batchmean")``, whose gradient keeps its size as t grows (Hinton et al. 2015).
        reduction: "batch" averages over B (the paper); "official" over B and K, as the released
            code does, which makes the loss K times smaller.
        impl: "auto", a name, or one for each pass: ``ops/dispatch.py``.

    Returns:
        Scalar, fp32 or wider; no gradient to the teacher.

    Raises:
        ValueError: shapes or devices that disagree, a temperature that is not positive, an unknown
            form or reduction, or a named ``impl`` that cannot serve the call.
    """
    impls = choose(impl, LIMITS, student_logits)
    if student_logits.dim() != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "soft_cross_entropy: both logits must be (batch, classes); got student "
            f"{tuple(student_logits.shape)} and teacher {tuple(teacher_logits.shape)}"
        )
    check_devices("soft_cross_entropy", student_logits.device, teacher_logits=teacher_logits)
    if not temperature > 0.0:
        raise ValueError(f"soft_cross_entropy: temperature must be positive; got {temperature}")
    for name, value, known in (("form", form, FORMS), ("reduction", reduction, REDUCTIONS)):
        if value not in known:
            raise ValueError(
                f"soft_cross_entropy: {name}={value!r} is not one of {', '.join(known)}"
            )
    batch, classes = student_logits.shape
    divisor = max(batch if reduction == "batch" else batch * classes, 1)
    operands = (student_logits, teacher_logits.detach(), float(temperature), divisor, form)
    if impls[0] == "reference":
        return without_autocast(reference, *operands)
    return scalar_loss(_forward, reference, impls, 1, *operands)
