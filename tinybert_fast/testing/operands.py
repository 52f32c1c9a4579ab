"""One call of each op on random operands: the same call runs on any implementation and in fp64.

T tokens, H heads, D head width, C channels, V vocabulary. Operands are normal; vectors that a layer
norm multiplies with are drawn around 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tinybert_fast import ops
from tinybert_fast.ops.layout import SequenceLayout

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = {  # name -> lengths of the sequences
    "ragged": (1, 7, 4),
    "equal": (5, 5, 5),  # one batch of adjacent rows
    "apart": (3, 6, 3),  # one batch of rows that do not touch
    "empty": (0, 4, 0, 1, 0),
    "nothing": (0, 0),  # T = 0
}


@dataclass(frozen=True)
class Case:
    """One call of a public op; the operands that require a gradient are what it differentiates."""

    op: Callable[..., Tensor]
    operands: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The parameter name of each operand."""
        return list(inspect.signature(self.op).parameters)[: len(self.operands)]

    @property
    def served(self) -> str:
        """The public op behind ``op``, which may be a form of its call."""
        return getattr(self.op, "form_of", self.op.__name__)

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest float dtype among the operands."""
        kinds = {x.dtype for x in self.operands if is_float(x)}
        return max(kinds, key=lambda kind: torch.finfo(kind).eps)

    def with_options(self, **changes: Any) -> Case:
        """The same operands, other options."""
        return replace(self, options={**self.options, **changes})

    def to(self, dtype: torch.dtype) -> Case:
        """The same values (rounded where ``dtype`` is narrower)."""
        return replace(
            self,
            operands=tuple(
                x.detach().to(dtype).requires_grad_(x.requires_grad) if is_float(x) else x
                for x in self.operands
            ),
        )

    def narrowed(self, *names: str, dtype: torch.dtype = torch.bfloat16) -> Case:
        """The named operands in half precision, the others as they are."""
        return self._each(names, lambda x: x.detach().to(dtype).requires_grad_(x.requires_grad))

    def freeze(self, *names: str) -> Case:
        """The named operands without a gradient."""
        return self._each(names, Tensor.detach)

    def _each(self, names: tuple[str, ...], change: Callable[[Tensor], Tensor]) -> Case:
        named = zip(self.names, self.operands, strict=True)
        return replace(self, operands=tuple(change(x) if n in names else x for n, x in named))

    def strided(self) -> Case:
        """Operands as views: the last two axes in each other's order in memory, vectors with other
        numbers of theirs in between.
        """

        def view(x: Tensor) -> Tensor:
            if x.dim() == 1:
                return torch.stack((x, x.roll(1)), 1)[:, 0]
            return x.mT.contiguous().mT

        tensors = [n for n, x in zip(self.names, self.operands) if isinstance(x, Tensor)]
        return self._each(
            tuple(tensors), lambda x: view(x.detach()).requires_grad_(x.requires_grad)
        )

    def trained(self) -> list[str]:
        """The names of the operands that require a gradient."""
        named = zip(self.names, self.operands, strict=True)
        return [n for n, x in named if is_float(x) and x.requires_grad]

    def leaves(self) -> list[Tensor]:
        """The operands that require a gradient."""
        return [x for x in self.operands if is_float(x) and x.requires_grad]

    def function(self, impl: ops.dispatch.Impl = "auto") -> Callable[..., Tensor]:
        """``leaves -> result``, everything else held fixed."""

        def call(*leaves: Tensor) -> Tensor:
            rest = iter(leaves)
            operands = [next(rest) if is_float(x) and x.requires_grad else x for x in self.operands]
            return self.op(*operands, **self.options, impl=impl)

        return call

    def run(
        self,
        impl: ops.dispatch.Impl = "auto",
        wrap: Callable[[Callable], Callable] = lambda f: f,
        upstream_dtype: torch.dtype | None = None,
    ) -> dict[str, Tensor]:
        """{"value": ..., "d<operand>": ...} of one forward and backward, as tensors apart.

        The upstream gradient is a function of the result's shape; ``upstream_dtype`` is what it is
        rounded to, so that a wider run can be given the same one.
        """
        leaves = [x.detach().clone().requires_grad_() for x in self.leaves()]
        value = wrap(self.function(impl))(*leaves)
        upstream = normal(value.shape, 99, torch.float64, value.device)
        upstream = upstream.to(upstream_dtype or self.dtype).to(value.dtype)
        gradients = torch.autograd.grad(value, leaves, upstream) if leaves else ()
        named = zip(self.trained(), gradients, strict=True)
        found = {f"d{name}": gradient for name, gradient in named}
        return {"value": value.detach(), **found}


def is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def normal(
    shape: tuple[int, ...] | torch.Size,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal; the same values on every device and, up to rounding, in every dtype."""
    source = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=source, dtype=torch.float64).to(device, dtype)


def leaves(
    *shapes: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[Tensor, ...]:
    """Normal tensors that require a gradient, one per shape."""
    return tuple(
        normal(shape, 100 * seed + i, dtype, device).requires_grad_()
        for i, shape in enumerate(shapes)
    )


def integers(high: int, count: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 (count,) below ``high``."""
    source = torch.Generator().manual_seed(seed)
    return torch.randint(high, (count,), generator=source).to(device)


def dropout(dropout_p: float, seed: int = 5, device: torch.device | str = "cpu") -> dict[str, Any]:
    """The options of an op that drops; {} at rate 0."""
    if dropout_p == 0.0:
        return {}
    words = torch.tensor([seed, 2**62 + seed], device=device)
    return {"dropout_p": dropout_p, "seed": words, "site": 3}


def attention(
    lengths: tuple[int, ...] = LENGTHS["ragged"],
    heads: int = 2,
    width: int = 26,
    *,
    padded: bool = False,
    dropout_p: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Case:
    """q, k, v packed (T, H, D); or padded on the left, (B, N, H, D), with the strides that
    Transformers hands over: views of (B, H, N, D).
    """
    layout = SequenceLayout.from_lengths(lengths, device=device)
    shape: tuple[int, ...] = (layout.total, heads, width)
    if padded:
        columns = torch.arange(layout.width, 0, -1, device=device)
        layout = SequenceLayout.from_mask(columns <= torch.tensor(lengths, device=device)[:, None])
        shape = (len(lengths), heads, layout.width, width)
    operands = leaves(shape, shape, shape, dtype=dtype, device=device)
    if padded:
        operands = tuple(x.detach().transpose(1, 2).requires_grad_() for x in operands)
    options = {"layout": layout, **dropout(dropout_p, device=device), **options}
    return Case(ops.attention, operands, options)


def attention_score_mse(
    lengths: tuple[int, ...] = LENGTHS["ragged"],
    heads: int = 2,
    width: int = 26,
    teacher_width: int = 64,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Case:
    """Student q, k (T, H, D) and teacher q, k (T, H, Dt), packed."""
    layout = SequenceLayout.from_lengths(lengths, device=device)
    rows = (layout.total, heads)
    q, k, p, r = leaves(
        *((*rows, width),) * 2, *((*rows, teacher_width),) * 2, dtype=dtype, device=device
    )
    operands = (q, k, p.detach(), r.detach())
    return Case(ops.attention_score_mse, operands, {"layout": layout, **options})


def attention_relation_kl(
    lengths: tuple[int, ...] = LENGTHS["ragged"],
    heads: int = 4,
    width: int = 13,
    teacher_heads: int = 2,
    teacher_width: int = 64,
    relation_heads: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Case:
    """Student a, b (T, H, D) and teacher a, b (T, Ht, Dt), packed.

    One number of a head varies most, as a model's do, so that relations differ: else a token would
    be related to itself alone, in student and teacher alike.
    """
    layout = SequenceLayout.from_lengths(lengths, device=device)
    ours, theirs = (layout.total, heads, width), (layout.total, teacher_heads, teacher_width)
    operands = leaves(ours, ours, theirs, theirs, dtype=torch.float64, device=device)
    for x in operands:
        x.detach()[..., 1:].mul_(0.3)
        x.detach()[..., 0].mul_(1.5 * x.shape[-1] ** 0.25)  # scores of 2 or so
    a, b, c, d = (x.detach().to(dtype) for x in operands)
    options = {"relation_heads": relation_heads, "layout": layout, **options}
    call = (a.requires_grad_(), b.requires_grad_(), c, d)
    return Case(ops.attention_relation_kl, call, options)


def with_itself(case: Case) -> Case:
    """Of attention_relation_kl: the relations of a alone, one tensor on both sides."""
    return Case(_relation_with_itself, case.operands[::2], case.options)


def _relation_with_itself(a_student: Tensor, a_teacher: Tensor, **options: Any) -> Tensor:
    return ops.attention_relation_kl(a_student, a_student, a_teacher, a_teacher, **options)


_relation_with_itself.form_of = "attention_relation_kl"  # type: ignore[attr-defined]


def layer_norm(
    shape: tuple[int, ...] = (3, 312),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Case:
    """x (..., C), weight and bias (C,)."""
    columns = shape[-1:]
    x, weight, bias = leaves(shape, columns, columns, dtype=dtype, device=device)
    return Case(ops.layer_norm, (x, around_one(weight), bias), options)


def around_one(x: Tensor) -> Tensor:
    """A leaf of 1 + x / 2."""
    return (1 + x.detach() / 2).requires_grad_()


def dropout_add_layer_norm(
    shape: tuple[int, ...] = (3, 312),
    *,
    with_bias: bool = True,
    dropout_p: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Case:
    """x and residual (..., C); bias (or None), weight and ln_bias (C,)."""
    columns = shape[-1:]
    x, bias, residual, weight, ln_bias = leaves(
        shape, columns, shape, columns, columns, dtype=dtype, device=device
    )
    operands = (x, bias if with_bias else None, residual, around_one(weight), ln_bias)
    options = {**dropout(dropout_p, device=device), **options}
    return Case(ops.dropout_add_layer_norm, operands, options)


def embedding_layer_norm(
    tokens: int = 9,
    columns: int = 312,
    words: int = 11,
    *,
    dropout_p: float = 0.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Case:
    """ids (T,), among them the padding word 0; tables of ``words``, T and 2 rows of C columns."""
    tables = ((words, columns), (max(tokens, 1), columns), (2, columns))
    word, position, token_type, weight, bias = leaves(
        *tables, (columns,), (columns,), dtype=dtype, device=device
    )
    input_ids = integers(words, tokens, 1, device)
    input_ids[::4] = 0
    types = integers(2, tokens, 2, device)
    position_ids = torch.arange(tokens, device=device) // 2
    operands = (input_ids, types, position_ids, word, position, token_type, around_one(weight))
    options = {**dropout(dropout_p, device=device), **options}
    return Case(ops.embedding_layer_norm, (*operands, bias), options)


def bias_gelu(
    shape: tuple[int, ...] = (3, 1200),
    inputs: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """x (..., C) and bias (C,); with ``inputs`` x (..., inputs), bias and a weight (C, inputs)."""
    if inputs is None:
        return Case(ops.bias_gelu, leaves(shape, shape[-1:], dtype=dtype, device=device))
    shapes = (*shape[:-1], inputs), shape[-1:], (shape[-1], inputs)
    x, bias, weight = leaves(*shapes, dtype=dtype, device=device)
    weight = (weight.detach() * inputs**-0.5).requires_grad_()  # products of order 1
    return Case(ops.bias_gelu, (x, bias, weight))


def frozen_bias_gelu(shape: tuple[int, ...], inputs: int, **like: Any) -> Case:
    """The product and the GELU where nobody wants a gradient."""
    return bias_gelu(shape, inputs, **like).freeze("x", "bias", "weight")


def hidden_mse(
    rows: tuple[int, ...] = (7,),
    columns: int = 312,
    teacher_columns: int = 768,
    *,
    projection: str = "bias",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Case:
    """student (..., C), teacher (..., Ct); projection: "none", "weight" or "bias" (with weight)."""
    student, teacher, weight, bias = leaves(
        (*rows, columns),
        (*rows, teacher_columns),
        (teacher_columns, columns),
        (teacher_columns,),
        dtype=dtype,
        device=device,
    )
    weight = (weight.detach() * columns**-0.5).requires_grad_()  # projected values of order 1
    affine = {"none": (), "weight": (weight,), "bias": (weight, bias)}[projection]
    return Case(ops.hidden_mse, (student, teacher.detach(), *affine))


def soft_cross_entropy(
    batch: int = 4,
    classes: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Case:
    """Logits (B, K) of student and teacher."""
    student, teacher = leaves((batch, classes), (batch, classes), dtype=dtype, device=device)
    return Case(ops.soft_cross_entropy, (student, teacher.detach()), options)


def linear_cross_entropy(
    tokens: int = 9,
    labelled: int = 4,
    columns: int = 312,
    words: int = 101,
    *,
    with_bias: bool = True,
    ignored: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Case:
    """hidden (T, C), weight (V, C), bias (V,) or None; ``labelled`` rows, repeats allowed, the
    last ``ignored`` of them without a label.
    """
    hidden, weight, bias = leaves(
        (tokens, columns), (words, columns), (words,), dtype=dtype, device=device
    )
    weight = (weight.detach() * columns**-0.5).requires_grad_()  # logits of order 1
    rows = integers(max(tokens, 1), labelled, 3, device)
    labels = integers(words, labelled, 4, device)
    labels[labelled - ignored :] = -100
    operands = (hidden, weight, bias if with_bias else None, rows, labels)
    return Case(ops.linear_cross_entropy, operands, options)


FACTORIES: dict[str, Callable[..., Case]] = {
    factory.__name__: factory
    for factory in (
        attention,
        attention_relation_kl,
        attention_score_mse,
        bias_gelu,
        dropout_add_layer_norm,
        embedding_layer_norm,
        hidden_mse,
        layer_norm,
        linear_cross_entropy,
        soft_cross_entropy,
    )
}
