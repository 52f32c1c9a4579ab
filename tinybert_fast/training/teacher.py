"""The frozen model that a student learns from: what it is asked, and the numbers it computes in.

    fp32   as it was trained
    bf16   autocast over linear layers whose weights are kept in bf16
    int8   y = (x_q W_q^T) s_x s_W + b, sums in int32, of every linear layer of the encoder:
           x_q = round(x / s_x), s_x = max|x| / 127 of each token; W_q likewise of each output
    fp8    bf16, but for both products of each feed-forward block, two thirds of a layer's work,
           whose operands are rounded to e4m3 (modules/feed_forward_fp8.py)

A scale per token keeps what the teacher says of one text from depending on the others in its batch,
and an outlier from coarsening any token but its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tinybert_fast.integrations.bert import is_accelerated
from tinybert_fast.modules.capture import Capture, encoder_of, record_padded
from tinybert_fast.modules.encoder import is_erf_gelu
from tinybert_fast.modules.feed_forward_fp8 import FeedForwardFp8
from tinybert_fast.modules.weights import is_plain, lay_side_by_side, pays_to_prepare_together
from tinybert_fast.ops.dispatch import UNAVAILABLE
from tinybert_fast.ops.feed_forward_fp8 import UNIT, why_not
from tinybert_fast.ops.layout import SequenceLayout

TeacherDtype = Literal["fp32", "bf16", "int8", "fp8"]
TEACHER_DTYPES = ("fp32", "bf16", "int8", "fp8")
UNDER_AUTOCAST = ("bf16", "fp8")  # those that a teacher runs in under autocast to bf16
LARGEST = 127  # of symmetric int8
TINY = 1e-12  # stands for the scale of a row of zeros


def record(
    model: Any, batch: dict[str, Tensor], capture: Capture, layout: SequenceLayout | None = None
) -> None:
    """Run the encoder of any BERT class and leave in ``capture`` what it asks for; no head runs,
    and of an accelerated encoder nothing that lies behind the last state asked for.
    """
    encoder = model.base_model
    if is_accelerated(model):
        encoder(**batch, layout=layout, capture=capture, packed=True, record_only=True)
    else:
        with record_padded(model, capture):
            encoder(**batch)


def classify(
    model: Any, batch: dict[str, Tensor], layout: SequenceLayout | None = None, **more: Any
) -> Any:
    """What a sequence classification model answers: logits (B, K), a loss if labels are given."""
    if is_accelerated(model):
        more["layout"] = layout
    return model(**batch, **more)


def bf16_linears(teacher: nn.Module) -> nn.Module:
    """Keep the weights of linear layers in bf16, for a teacher that runs under autocast.

    The products are those of autocast on fp32 weights; only, autocast does not cache weights that
    need no gradient, so it would round them anew in every forward. The layers get new Parameters:
    what shares the old ones keeps them.
    """
    for module in teacher.modules():
        if isinstance(module, nn.Linear):
            for name, p in list(module.named_parameters(recurse=False)):
                rounded = p.detach().to(torch.bfloat16)
                setattr(module, name, nn.Parameter(rounded, requires_grad=p.requires_grad))
    return teacher


def join_projections(teacher: nn.Module) -> nn.Module:
    """Lay the weights of queries, keys and values of each layer side by side, of a frozen teacher
    that `bf16_linears` has made and that stands on a GPU: an accelerated encoder then takes them as
    one product. Others are left alone. Moved, a teacher lies apart again.

    The six share a storage then, which `safetensors.torch.save_model` takes for tied weights;
    ``save_pretrained`` does not.
    """
    if not is_accelerated(teacher):
        return teacher
    for layer in encoder_of(teacher).encoder.layer:
        heads = layer.attention.self
        projections = heads.query, heads.key, heads.value
        if all(map(is_plain, projections)) and _is_taken_as_it_is(heads.query.weight):
            lay_side_by_side(projections)
    return teacher


def _is_taken_as_it_is(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and pays_to_prepare_together(weight)


class Int8Linear(nn.Module):
    """A frozen ``nn.Linear`` in int8 (see the top of this file), fp32 (..., in) -> (..., out), on a
    CPU. ``weight`` int8 (out, in), ``scale`` and ``bias`` fp32 (out,).
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        weight, scale = _int8(dense.weight.detach().float())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.squeeze(-1))
        self.register_buffer("bias", None if dense.bias is None else dense.bias.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        rows, scale = _int8(x.reshape(-1, x.shape[-1]).float())
        y = torch._int_mm(rows, self.weight.mT).float().mul_(scale).mul_(self.scale)
        if self.bias is not None:
            y += self.bias
        return y.unflatten(0, x.shape[:-1])


def _int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(R, C) -> int8 (R, C) and the scale (R, 1) of each row."""
    scale = (rows.abs().amax(-1, keepdim=True) / LARGEST).clamp_(min=TINY)
    return (rows / scale).round_().to(torch.int8), scale


def int8_linears(teacher: nn.Module) -> nn.Module:
    """Put an `Int8Linear` in the place of every linear layer of the encoder; heads, the pooler and
    embeddings stay in fp32. ValueError unless the teacher is on a CPU.
    """
    device = next(teacher.parameters()).device
    if device.type != "cpu":
        raise ValueError(
            f"a teacher in int8 runs on a CPU, and this one is on {device}; take bf16 there"
        )
    for block in list(encoder_of(teacher).encoder.modules()):
        for name, module in list(block.named_children()):
            if type(module) is nn.Linear:
                setattr(block, name, Int8Linear(module))
    return teacher


def fp8_feed_forwards(teacher: nn.Module) -> nn.Module:
    """Put a `FeedForwardFp8` in the place of every feed-forward block of the encoder, the rest as
    `bf16_linears` leaves it; for a teacher that runs under autocast. ValueError if a block is
    another than BERT's, or of widths that the kernels do not take.
    """
    layers = list(encoder_of(teacher).encoder.layer)
    for layer in layers:
        inner, outer = layer.intermediate, layer.output
        if not is_erf_gelu(inner.intermediate_act_fn) or not all(
            map(is_plain, (inner.dense, outer.dense))
        ):
            raise ValueError(
                "a teacher in fp8 has feed-forward blocks of two linear layers and erf GELU; this "
                f"one has {inner.dense}, {inner.intermediate_act_fn} and {outer.dense}; take bf16"
            )
        widths = inner.dense.in_features, inner.dense.out_features, outer.dense.out_features
        if any(width % UNIT for width in widths):
            raise ValueError(
                f"a teacher in fp8 has feed-forward widths that are multiples of {UNIT}; got "
                f"{', '.join(map(str, widths))}; take bf16"
            )
    for layer in layers:
        FeedForwardFp8.replace(layer)
    return bf16_linears(teacher)


def check_teacher_dtype(dtype: str | None, device: torch.device) -> None:
    if dtype not in (None, *TEACHER_DTYPES):
        raise ValueError(f"teacher_dtype is {dtype!r}; expected one of {', '.join(TEACHER_DTYPES)}")
    if dtype == "int8" and device.type != "cpu":
        raise ValueError(
            f"teacher_dtype int8 is for CPUs, and this run is on {device.type}; take bf16"
        )
    if dtype == "fp8":
        reason = why_not(device) or UNAVAILABLE["triton"]  # the reference would be far too slow
        if reason is not None:
            raise ValueError(f"teacher_dtype fp8: {reason}; take bf16")


CONVERT: dict[TeacherDtype, Callable[[Any], Any]] = {
    "fp32": lambda model: model,
    "bf16": bf16_linears,
    "int8": int8_linears,
    "fp8": fp8_feed_forwards,
}


class Teacher:
    """A model that is loaded when it is first needed, if it ever is: where its lessons are cached,
    its ``config`` may be all that a run asks for. ``speed_up`` changes it in place.
    """

    def __init__(
        self,
        config: Any,
        load: Callable[[], Any],
        dtype: TeacherDtype = "fp32",
        speed_up: Callable[[Any], Any] = lambda model: model,
    ) -> None:
        self.config, self.dtype = config, dtype
        self._load, self._speed_up = load, speed_up

    @cached_property
    def model(self) -> Any:
        """In fp32, as it was saved."""
        return self._load()

    @property
    def base_model(self) -> Any:
        """Its encoder, which a student may start from."""
        return self.model.base_model

    @cached_property
    def exact(self) -> Any:
        """Ready to be asked, in fp32."""
        return self._speed_up(self.model)

    @cached_property
    def asked(self) -> Any:
        """Ready to be asked, in its dtype; shares the Parameters of ``exact`` that it does not
        round.
        """
        if self.dtype == "fp32":
            return self.exact
        shared = {id(p): p for p in self.exact.parameters()}
        return CONVERT[self.dtype](copy.deepcopy(self.exact, shared))

    def forget(self, *, asked: bool) -> None:
        """Give back the memory of the model in fp32 and, if so, of the one that is ``asked``."""
        for name in ("model", "exact", *(("asked",) if asked else ())):
            self.__dict__.pop(name, None)
