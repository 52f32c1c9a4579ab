"""Masking for masked language models: exact counts, weighted tokens, the same draws everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tinybert_fast.ops.dispatch import (
    NATIVE_DEVICES,
    Limit,
    Limits,
    check_devices,
    choose,
    define,
    integer,
)
from tinybert_fast.ops.native import UNITS
from tinybert_fast.reference.mlm_mask import IGNORE, ONE, Plan
from tinybert_fast.reference.mlm_mask import mlm_mask as reference

MOST_TOKENS = 8192  # of a row
MOST_WORDS = 2**31 - 1  # of a vocabulary, and tokens of a batch: places and ids are int32 inside
HEAVIEST = 2**31 - 1
FLAGS = (torch.bool, torch.uint8, torch.int64)

LIMITS = Limits(
    "mlm_mask",
    torch=None,
    native=Limit((torch.int64,), NATIVE_DEVICES),
    reference=Limit((torch.int64,)),
)


@dataclass(frozen=True, eq=False)
class MaskingRule:
    """How tokens are chosen and replaced; made once by ``MaskingRule.of``.

    Attributes:
        vocab_size: V. mask_id: what most chosen tokens become.
        table, places, ordinary: the quantised weights (see ``reference/mlm_mask.py``).
        ratio: of the eligible tokens of a row. ``dataclasses.replace(rule, ratio=...)`` follows a
            schedule and keeps the tables.
        mask_share, random_share: of the chosen tokens that become [MASK], and a random ordinary
            token; the rest stay as they are.
        unit: "token", "word" or "span".
    """

    vocab_size: int
    mask_id: int
    table: Tensor
    places: Tensor | None
    ordinary: Tensor
    ratio: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    unit: str = "token"
    plan: Plan = field(init=False, repr=False)  # what the implementations take

    def __post_init__(self) -> None:
        for name in ("ratio", "mask_share", "random_share"):
            share = getattr(self, name)
            if not isinstance(share, Real):
                raise ValueError(f"mlm_mask: {name}={share!r}; expected a number from 0 to 1")
            # NumPy's numbers too; a frozen instance sets them so.
            object.__setattr__(self, name, float(share))
        if not 0.0 < self.ratio <= 1.0:
            raise ValueError(f"mlm_mask: ratio={self.ratio!r}; expected above 0, at most 1")
        integer("mlm_mask", "vocab_size", self.vocab_size, 1, MOST_WORDS)
        integer("mlm_mask", "mask_id", self.mask_id, 0, self.vocab_size - 1)
        for name, table, dtype in (
            ("table", self.table, torch.int32),
            ("places", self.places, torch.int32),
            ("ordinary", self.ordinary, torch.int64),
        ):
            rows = (self.vocab_size,) if name == "table" else None
            if table is not None and not _is_table(table, dtype, rows):
                raise ValueError(
                    f"mlm_mask: {name} must be {dtype} {rows or '(n,)'}, contiguous, not empty; "
                    f"got {table.dtype} {tuple(table.shape)}. MaskingRule.of makes it"
                )
        if self.ordinary.device.type == "cpu":  # a GPU would be waited for at each new ratio
            low, high = (int(end) for end in self.ordinary.aminmax())
            if low < 0 or high >= self.vocab_size:
                raise ValueError(
                    f"mlm_mask: ordinary has ids from {low} to {high}; expected 0 to "
                    f"{self.vocab_size - 1}, the vocabulary"
                )
        shares = (self.mask_share, self.random_share)
        if not all(0.0 <= share <= 1.0 for share in shares) or sum(shares) > 1.0 + 1e-9:
            raise ValueError(
                f"mlm_mask: mask_share={shares[0]} and random_share={shares[1]}; expected shares "
                "from 0 to 1 that add up to at most 1"
            )
        if self.unit not in UNITS:
            raise ValueError(f"mlm_mask: unit={self.unit!r} is not one of {', '.join(UNITS)}")
        plan = Plan(
            self.table,
            self.places,
            self.ordinary,
            self.mask_id,
            _in_units(self.ratio),
            _in_units(self.mask_share),
            min(ONE, _in_units(self.mask_share + self.random_share)),
            self.unit,
        )
        object.__setattr__(self, "plan", plan)

    @classmethod
    def of(
        cls,
        vocab_size: int,
        mask_id: int,
        special_ids: Iterable[int],
        *,
        token_weights: Tensor | Sequence[float] | None = None,
        position_weights: Tensor | Sequence[float] | None = None,
        device: torch.device | str = "cpu",
        **numbers: Any,
    ) -> MaskingRule:
        """The rule for a vocabulary.

        Args:
            special_ids: never chosen, and never a random replacement.
            token_weights: h, (V,) numbers of 0 or more; 1 by default.
            position_weights: g, any number P of them over the place of a token among the real ones
                of its row: token r of L has weight ``g[r * P // L]``; 1 by default.
            numbers: ratio, mask_share, random_share and unit.

        Raises:
            ValueError: weights that are negative, NaN, infinite, all zero or of another length;
                ids outside the vocabulary; no ordinary token left.
        """
        size = integer("mlm_mask", "vocab_size", vocab_size, 1, MOST_WORDS)
        special = [integer("mlm_mask", "special_ids", x, 0, size - 1) for x in set(special_ids)]
        eligible = torch.ones(vocab_size, dtype=torch.int64, device="cpu")
        eligible[special] = 0
        if not eligible.any():
            raise ValueError(f"mlm_mask: all {vocab_size} tokens are special")
        weights = torch.full((vocab_size,), HEAVIEST, device="cpu")
        if token_weights is not None:
            weights = _quantise("token_weights", token_weights, HEAVIEST, eligible)
            if len(weights) != vocab_size:
                raise ValueError(
                    f"mlm_mask: token_weights has {len(weights)} numbers; expected {vocab_size}, "
                    "one for each token"
                )
        places = None
        if position_weights is not None:
            places = _bits(_quantise("position_weights", position_weights, ONE - 1)).to(device)
        return cls(
            vocab_size,
            mask_id,
            _bits((weights << 1 | 1) * eligible).to(device),
            places,
            eligible.nonzero().flatten().to(device),
            **numbers,
        )

    def to(self, device: torch.device | str) -> MaskingRule:
        """The same with its tables on another device."""
        places = None if self.places is None else self.places.to(device)
        table, ordinary = self.table.to(device), self.ordinary.to(device)
        return replace(self, table=table, places=places, ordinary=ordinary)

    def most(self, lengths: Iterable[int]) -> int:
        """The most tokens that rows with so many eligible tokens can have masked."""
        ratio = _in_units(self.ratio)
        return sum(min(n, max(1, (n * ratio + ONE // 2) // ONE)) for n in lengths)


class MaskedTokens(NamedTuple):
    """What ``mlm_mask`` gives.

    input_ids: (B, N) with the chosen tokens replaced. rows: int64 (R,), their flat places
    b * N + n, increasing. labels: int64 (R,), the ids that were there. offsets: int32 (B + 1,),
    running count of the rows' chosen tokens. dense_labels: (B, N), -100 where nothing was chosen,
    or None.
    """

    input_ids: Tensor
    rows: Tensor
    labels: Tensor
    offsets: Tensor
    dense_labels: Tensor | None


def _run_reference(
    ids, special, attention, starts, examples, table, places, ordinary, mask_id, ratio,
    mask_below, random_below, seed, step, unit, capacity, with_dense, allow_empty,
):  # fmt: skip
    plan = Plan(table, places, ordinary, mask_id, ratio, mask_below, random_below, unit)
    outside = ((ids < 0) | (ids >= len(table))).nonzero()
    if len(outside):
        b, i = outside[0].tolist()
        raise ValueError(
            f"mlm_mask: input_ids[{b}, {i}] is {int(ids[b, i])}; expected 0 to {len(table) - 1}, "
            "the vocabulary"
        )
    out, chosen = reference(ids, special, attention, starts, examples, plan, seed, step)
    counts = [len(of_row) for of_row in chosen]
    if not allow_empty:
        _refuse_empty(counts)
    total = sum(counts)
    if total > capacity:
        raise ValueError(f"mlm_mask: {total} tokens are masked and capacity is {capacity}")
    rows, labels = ids.new_zeros(capacity), ids.new_full((capacity,), IGNORE)
    flat = [of_row + b * ids.shape[1] for b, of_row in enumerate(chosen)]
    rows[:total] = torch.cat([*flat, ids.new_empty(0)])
    labels[:total] = ids.flatten()[rows[:total]]
    offsets = torch.tensor([0, *counts], device=ids.device).cumsum(0).int()
    dense = ids.new_empty(0)
    if with_dense:
        dense = torch.full_like(ids, IGNORE)
        dense.view(-1)[rows[:total]] = labels[:total]
    ids.copy_(out)
    return rows, labels, offsets, dense


_mask = define(
    "mlm_mask_(Tensor(a!) ids, Tensor? special, Tensor? attention, Tensor? starts,"
    " Tensor? examples, Tensor table, Tensor? places, Tensor ordinary, int mask_id, int ratio,"
    " int mask_below, int random_below, int seed, int step, str unit, SymInt capacity,"
    " bool with_dense, bool allow_empty)"
    " -> (Tensor rows, Tensor labels, Tensor offsets, Tensor dense)",
    fake=lambda ids, *rest: (
        ids.new_empty(rest[-3]),
        ids.new_empty(rest[-3]),
        ids.new_empty(ids.shape[0] + 1, dtype=torch.int32),
        ids.new_empty(ids.shape if rest[-2] else 0),
    ),
    reference="tinybert_fast.ops.mlm_mask:_run_reference",
    native="tinybert_fast.ops.native:mlm_mask",
)


def mlm_mask(
    input_ids: Tensor,
    rule: MaskingRule,
    *,
    seed: int,
    step: int = 0,
    example_ids: Tensor | None = None,
    special_tokens_mask: Tensor | None = None,
    attention_mask: Tensor | None = None,
    word_starts: Tensor | None = None,
    dense_labels: bool = False,
    capacity: int | None = None,
    allow_empty_rows: bool = False,
    in_place: bool = False,
    impl: str = "auto",
) -> MaskedTokens:
    """Choose and replace tokens of every row.

    In unit "token" a row of n eligible tokens has exactly
    ``k = min(#{w > 0}, max(1, round(ratio * n)))`` masked, token i with probability exactly
    ``min(1, lambda * w_i)``, where w = g(position) * h(token) and the probabilities add up to k
    (quantised to 2^-32). In units "word" and "span" the count is at most k, and more than k minus
    the longest unit. Method and sources: ``reference/mlm_mask.py``. A row's draw depends on
    (seed, step, its example id) and its own tokens alone.

    Args:
        input_ids: int64 (B, N), contiguous, N up to 8192; a NumPy array is read where it is.
        seed: 0 to 2^63 - 1. step: 0 to 2^32 - 1.
        example_ids: int64 (B,); by default 0, 1, ...
        special_tokens_mask: (B, N) bool, uint8 or int64, non-zero where a token may not be chosen,
            besides the special ids of the rule.
        attention_mask: (B, N) likewise, zero at padding, which is no part of a row; all by default.
        word_starts: (B, N) bool or uint8, non-zero where a word begins; for words and spans.
        dense_labels: give labels (B, N) too.
        capacity: length of ``rows`` and ``labels``. None cuts them to what was chosen, which makes
            a GPU wait; a number leaves (row 0, label -100) at their end. ``rule.most(lengths)`` is
            always enough.
        allow_empty_rows: leave a row without an eligible token as it is; else it raises. On a GPU a
            given capacity needs it, since nobody could be told without waiting.
        in_place: replace tokens of ``input_ids`` itself; after a ValueError it is as it was.
        impl: "auto", "native" or "reference": ``ops/dispatch.py``.

    Raises:
        ValueError: shapes, dtypes, devices or values that do not fit. On a GPU an id outside the
            vocabulary, or more chosen tokens than ``capacity``, stops the kernel.
    """
    ids = _operand("input_ids", input_ids)
    flags = {
        name: _operand(name, x)
        for name, x in (
            ("special_tokens_mask", special_tokens_mask),
            ("attention_mask", attention_mask),
            ("word_starts", word_starts),
        )
        if x is not None
    }
    examples = None if example_ids is None else _operand("example_ids", example_ids)
    choice, _ = choose(impl, LIMITS, ids)
    seed, step = _check(ids, rule, flags, examples, seed, step, capacity)
    fixed, late = capacity is not None, not allow_empty_rows and _told_late(ids)
    if fixed and late:
        raise ValueError(
            "mlm_mask: a capacity on a GPU needs allow_empty_rows=True: a row without an eligible "
            "token could not be reported without waiting"
        )
    most = len(ids) * rule.most([ids.shape[1]])
    plan = rule.plan
    out = ids if in_place else ids.clone()
    rows, labels, offsets, dense = _mask(
        out, flags.get("special_tokens_mask"), flags.get("attention_mask"),
        flags.get("word_starts"), examples, *plan[:3], plan.mask_id, plan.ratio, plan.mask_below,
        plan.random_below, seed, step, plan.unit, capacity if fixed else most, dense_labels,
        allow_empty_rows or late, choice,
    )  # fmt: skip
    if in_place and not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)  # as every in-place operator of PyTorch
    if not fixed:
        count = int(offsets[-1])
        rows, labels = rows[:count], labels[:count]
        if late:
            counts = offsets.diff().tolist()
            if in_place and 0 in counts:
                out.view(-1)[rows] = labels
            _refuse_empty(counts)
    return MaskedTokens(out, rows, labels, offsets, dense if dense_labels else None)


def _told_late(ids: Tensor) -> bool:
    """Whether rows without an eligible token are known when the others have been masked."""
    return ids.is_cuda


def _refuse_empty(counts: list[int]) -> None:
    if 0 in counts:
        raise ValueError(
            f"mlm_mask: row {counts.index(0)} has no token that may be masked; leave the row out, "
            "or give allow_empty_rows=True to keep it as it is"
        )


def _operand(name: str, x: Any) -> Tensor:
    """A tensor over the same memory, which must be contiguous, and writable if NumPy's."""
    if not isinstance(x, Tensor):
        interface = getattr(x, "__array_interface__", None)
        if interface is None:
            raise ValueError(f"mlm_mask: {name} is {type(x).__name__}; expected a tensor or array")
        if interface["data"][1]:
            raise ValueError(
                f"mlm_mask: {name} is a read-only array, which torch cannot hold; give a copy"
            )
        if interface["strides"] is not None:
            raise ValueError(f"mlm_mask: {name} is not contiguous; give np.ascontiguousarray of it")
        x = torch.from_numpy(x)
    if not x.is_contiguous():
        raise ValueError(
            f"mlm_mask: {name} is not contiguous (strides {x.stride()}); give {name}.contiguous()"
        )
    return x


def _check(ids, rule, flags, examples, seed, step, capacity) -> tuple[int, int]:
    if ids.dim() != 2 or ids.shape[1] > MOST_TOKENS or ids.numel() > MOST_WORDS:
        raise ValueError(
            f"mlm_mask: input_ids must be (B, N) with N up to {MOST_TOKENS} (and below 2^31 "
            f"tokens); got shape {tuple(ids.shape)}"
        )
    for name, x in flags.items():
        allowed = FLAGS[:2] if name == "word_starts" else FLAGS
        if x.dtype not in allowed or x.shape != ids.shape:
            raise ValueError(
                f"mlm_mask: {name} must be {', '.join(map(str, allowed))} {tuple(ids.shape)}; got "
                f"{x.dtype} {tuple(x.shape)}"
            )
    if examples is not None and (examples.dtype != torch.int64 or examples.shape != ids.shape[:1]):
        raise ValueError(
            f"mlm_mask: example_ids must be int64 ({ids.shape[0]},); got {examples.dtype} "
            f"{tuple(examples.shape)}"
        )
    tables = {"table": rule.table, "places": rule.places, "ordinary": rule.ordinary}
    check_devices("mlm_mask", ids.device, **tables, example_ids=examples, **flags)
    if capacity is not None:
        integer("mlm_mask", "capacity", capacity, 0, MOST_WORDS)
    if (rule.unit != "token") != ("word_starts" in flags):
        needs = "needs" if rule.unit != "token" else "takes no"
        raise ValueError(f"mlm_mask: unit {rule.unit!r} {needs} word_starts")
    return (
        integer("mlm_mask", "seed", seed, 0, 2**63 - 1),
        integer("mlm_mask", "step", step, 0, 2**32 - 1),
    )


def _is_table(x: Tensor, dtype: torch.dtype, shape: tuple[int, ...] | None) -> bool:
    """Of one axis, not empty, whose entries are neighbours."""
    fits = x.dim() == 1 and len(x) > 0 if shape is None else x.shape == shape
    return fits and x.dtype == dtype and x.is_contiguous()


def _in_units(share: float) -> int:
    return round(share * ONE)


def _quantise(name: str, weights: Any, most: int, live: Tensor | None = None) -> Tensor:
    """Numbers of 0 or more -> int64 up to ``most`` in proportion; 0 stays 0, and nothing else."""
    numbers = torch.as_tensor(weights, dtype=torch.float64, device="cpu")
    if numbers.dim() != 1:
        raise ValueError(f"mlm_mask: {name} must be one row of numbers; got {tuple(numbers.shape)}")
    heaviest = float(numbers.max()) if len(numbers) else 0.0
    if live is not None and len(live) == len(numbers):
        heaviest = float((numbers * live).max())
    if not bool((numbers.isfinite() & (numbers >= 0)).all()) or heaviest <= 0:
        raise ValueError(
            f"mlm_mask: {name} must be finite numbers of 0 or more, one of them above 0 (for a "
            f"token that may be chosen); got {numbers.tolist()[:8]}"
        )
    scaled = (numbers / heaviest * most).round().clamp(0, most).long()
    return torch.where(numbers > 0, scaled.clamp_min(1), scaled)


def _bits(words: Tensor) -> Tensor:
    """int64 below 2^32 -> int32 of the same 32 bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
