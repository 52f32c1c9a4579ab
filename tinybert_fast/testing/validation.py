"""What `tinybert-fast validate` holds against fp64: every op, implementation and dtype here.

The shapes are TinyBERT's and BERT-base's, and the lengths at which kernels branch: one token, below
and beyond a tile, a whole tile, several, none at all. Budgets are those of ``testing/budgets.py``.
"""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial

import torch

from tinybert_fast.ops import BlockMask, dispatch
from tinybert_fast.ops.block_mask import SIDES
from tinybert_fast.testing import operands
from tinybert_fast.testing.budgets import Verdict, verdicts
from tinybert_fast.testing.exact import CLAIMS
from tinybert_fast.testing.operands import DTYPES, Case
from tinybert_fast.testing.proofs import implementations, serves

# What distinguishes a call -> its case, by dtype= and device=.
Calls = dict[str, Callable[..., Case]]

DROPOUT = 0.1
MIXED = (0, 1, 2, 31, 127, 128, 129)
# Width of a head -> lengths of its calls. Each bucket of kernels/configs.py is there for each width
# of a tile; the interpreter, which is slow, has other tiles.
ATTENTION = dict.fromkeys(
    (26, 32, 64, 128), ((5, 32), (1, 2, 64), (0, 31, 127, 128), (*MIXED, 512))
)
ATTENTION_INTERPRETED = {
    26: ((5, 32), MIXED),
    32: ((2, 31, 65), (512,)),
    64: ((1, 31, 97),),
    128: ((5, 32), (31, 65)),
}
SEVERAL_TILES = (31, 65 if dispatch.INTERPRETED else 129)
ROWS = ((0, 312), (1, 312), (131, 312), (33, 384), (1, 768), (33, 768))  # of a layer norm
HIDDEN = (312, 384, 768)  # TinyBERT-4, MiniLM, BERT-base
MASKED = 256  # tokens under a block mask
# Heads of the student, of the teacher, relation heads: of 26 and 64 numbers, 52 and 64, 16, 128.
RELATIONS = (
    ((2, 26), (2, 64), 2),
    ((4, 26), (2, 64), 2),
    ((1, 64), (2, 32), 4),
    ((1, 128), (2, 64), 1),
)
RELATION_LENGTHS = ((5, 32), (2, 64), (31, 97)) if dispatch.INTERPRETED else (
    (5, 32), (2, 64), (0, 31, 127, 128), (*MIXED, 512),
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One call of one implementation: each tensor beside its budget, or why there is none."""

    op: str
    impl: str
    dtype: str
    call: str
    tensors: tuple[Verdict, ...] = ()
    problem: str | None = None

    @classmethod
    def of(
        cls,
        op: str,
        impl: str,
        dtype: torch.dtype,
        call: str,
        hold: Callable[[], Collection[Verdict]],
    ) -> Finding:
        """What ``hold()`` finds. If it raises, that is the problem, and others can follow."""
        finding = partial(cls, op, impl, str(dtype).removeprefix("torch."), call)
        try:
            return finding(tuple(hold()))
        except Exception as error:  # noqa: BLE001  whatever a kernel or its compiler raises
            return finding(problem=f"{type(error).__name__}: {error}")

    @property
    def passed(self) -> bool:
        return self.problem is None and all(tensor.passed for tensor in self.tensors)

    @property
    def worst(self) -> Verdict | None:
        """The tensor that uses most of its budget."""
        return max(self.tensors, key=lambda tensor: tensor.share, default=None)


# Op, implementation, dtype, and which of its calls; an op with claims has them in one.
Job = tuple[str, str, torch.dtype, str | None]


def validate(
    ops: Collection[str] = (),
    device: torch.device | str = "cpu",
    dtypes: Collection[torch.dtype] = DTYPES,
    impls: Collection[str] = dispatch.FASTEST_FIRST,
    jobs: int = 1,
    calls: Collection[str] | None = None,
) -> Iterator[Finding]:
    """A finding per op, implementation, dtype and call, as they are made.

    ``calls`` keeps those with such a label, of an op on numbers.
    ``torch`` draws other cells than the reference, so it is held against it without dropout alone.

    Args:
        jobs: processes that share the calls, for kernels are compiled one after the other in each.
            The findings and their order are those of one process.

    Raises:
        ValueError: an op that does not exist, or no process.
    """
    held = {*CALLS, *CLAIMS}
    unknown = sorted(set(ops) - held)
    if unknown:
        raise ValueError(f"op {unknown[0]!r} is not one of {', '.join(sorted(held))}")
    if jobs < 1:
        raise ValueError(f"{jobs} processes validate nothing; at least 1 is needed")
    plan = _plan(sorted(ops or held), device, dtypes, impls, calls)
    if jobs == 1:
        for job in plan:
            yield from _findings(job, device)
    else:
        yield from _shared_out(list(plan), device, jobs)


def _plan(
    ops: Collection[str],
    device: torch.device | str,
    dtypes: Collection[torch.dtype],
    impls: Collection[str],
    calls: Collection[str] | None,
) -> Iterator[Job]:
    for op in ops:
        exact = op in CLAIMS
        for impl in implementations(op):
            for dtype in dispatch.OPS[op].reference.dtypes[:1] if exact else dtypes:
                if impl in impls and serves(op, impl, dtype, device):
                    for label in (None,) if exact else CALLS[op]():
                        if exact or calls is None or label in calls:
                            yield op, impl, dtype, label


def _findings(job: Job, device: torch.device | str) -> Iterator[Finding]:
    op, impl, dtype, label = job
    if label is None:
        for claim, hold in CLAIMS[op](device, impl):
            yield Finding.of(op, impl, dtype, claim, hold)
        return
    case = CALLS[op]()[label](dtype=dtype, device=device)
    if impl != "torch" or "dropout_p" not in case.options:
        hold = partial(verdicts, case, impl)
        yield Finding.of(op, impl, case.dtype, label, hold)


def _shared_out(plan: list[Job], device: torch.device | str, jobs: int) -> Iterator[Finding]:
    """The findings of processes, each with its own CUDA context, which fork could not give."""
    spawn = multiprocessing.get_context("spawn")
    others = multiprocessing.active_children()
    pool = ProcessPoolExecutor(jobs, spawn, torch.set_num_threads, (1,))
    made = [pool.submit(_listed, job, device) for job in plan]
    own = set(multiprocessing.active_children()).difference(others)  # spawned at the first submit
    left = len(plan)
    try:
        for (op, impl, dtype, label), answer in zip(plan, made, strict=True):
            left -= 1
            try:
                yield from answer.result()
            except BrokenProcessPool:  # which names no job: it may have been another's call
                name = str(dtype).removeprefix("torch.")
                problem = (
                    "not checked: a process died, of a crash in a kernel or for lack of memory"
                )
                yield Finding(op, impl, name, label or "all claims", problem=problem)
    finally:
        pool.shutdown(wait=not left, cancel_futures=True)
        if left:  # the caller wants no more of them, and a kernel may be compiled for minutes
            for process in own:
                process.terminate()


def _listed(job: Job, device: torch.device | str) -> list[Finding]:
    return list(_findings(job, device))


def _dropped(calls: Calls) -> Calls:
    """The calls, and each with dropout."""
    dropping = {
        f"{label}, dropout {DROPOUT}": partial(make, dropout_p=DROPOUT)
        for label, make in calls.items()
    }
    return {**calls, **dropping}


def _attention() -> Calls:
    widths = ATTENTION_INTERPRETED if dispatch.INTERPRETED else ATTENTION
    calls: Calls = {
        f"heads of {width}, lengths {_list(lengths)}": partial(
            operands.attention, lengths, 1, width
        )
        for width, by_width in widths.items()
        for lengths in by_width
    }
    both = itertools.product(("causal", "anti_causal"), ((5, 32), SEVERAL_TILES))
    for direction, lengths in both:
        calls[f"heads of 26, {direction}, lengths {_list(lengths)}"] = partial(
            operands.attention, lengths, 1, 26, direction=direction
        )
    calls["2 heads of 26, padded on the left, lengths 31 0 65"] = partial(
        operands.attention, (31, 0, 65), 2, 26, padded=True
    )
    for side in SIDES:
        calls[f"heads of 64, mask of blocks of {side}, lengths {MASKED} 31"] = partial(
            _masked_attention, side
        )
    calls["no token"] = partial(operands.attention, (0, 0), 2, 26)
    return _dropped(calls)


def _masked_pairs(device: torch.device | str) -> torch.Tensor:
    """A window of keys, a block of queries without any, and queries without any between others."""
    place = torch.arange(MASKED, device=device)
    allowed = (place[:, None] - place).abs() < 96
    allowed[64:128] = False
    allowed[140::7] = False
    return allowed


def _masked_attention(side: int, device: torch.device | str = "cpu", **options) -> Case:
    mask = BlockMask.from_dense(_masked_pairs(device), side)
    return operands.attention((MASKED, 31), 1, 64, device=device, block_mask=mask, **options)


def _list(lengths: tuple[int, ...]) -> str:
    return " ".join(map(str, lengths))


def _rows(factory: Callable[..., Case]) -> Calls:
    return {f"{rows} x {columns}": partial(factory, (rows, columns)) for rows, columns in ROWS}


def _dropout_add_layer_norm() -> Calls:
    calls = _rows(operands.dropout_add_layer_norm)
    return _dropped({**calls, "131 x 312 beside an fp32 residual": _narrow_branch})


def _narrow_branch(dtype: torch.dtype = torch.float32, **options) -> Case:
    """As autocast has it: the linear's output narrow, residual and parameters in fp32."""
    return operands.dropout_add_layer_norm((131, 312), **options).narrowed("x", dtype=dtype)


def _embedding_layer_norm() -> Calls:
    return _dropped(
        {
            f"{tokens} tokens of {columns}": partial(operands.embedding_layer_norm, tokens, columns)
            for tokens, columns in ROWS
        }
    )


def _attention_score_mse() -> Calls:
    calls: Calls = {}
    for width, teacher in ((26, 64), (32, 32), (64, 64)):
        heads, factory = f"heads of {width} against {teacher}", operands.attention_score_mse
        for form, loss in itertools.product(("direct", "gram"), ("full", "student")):
            calls[f"{heads}, {form}, {loss} loss, lengths {_list(MIXED)}"] = partial(
                factory, MIXED, 2, width, teacher, form=form, loss=loss
            )
        for side in SIDES:
            calls[f"{heads}, mask of blocks of {side}, lengths {MASKED} 31"] = partial(
                _masked_attention_score_mse, side, width, teacher
            )
    # One launch serves all lengths, in the form that suits the longest.
    calls[f"heads of 26 against 64, lengths {_list(MIXED)} 512"] = partial(
        operands.attention_score_mse, (*MIXED, 512), 1, 26, 64
    )
    calls["no token"] = partial(operands.attention_score_mse, (0, 0), 2, 26, 64)
    return calls


def _masked_attention_score_mse(
    side: int, width: int, teacher: int, device: torch.device | str = "cpu", **options
) -> Case:
    mask = BlockMask.from_dense(_masked_pairs(device), side)
    return operands.attention_score_mse(
        (MASKED, 31), 1, width, teacher, device=device, block_mask=mask, **options
    )


def _attention_relation_kl() -> Calls:
    calls: Calls = {}
    for heads, lengths in itertools.product(RELATIONS, RELATION_LENGTHS):
        (ours, width), (theirs, teacher), relations = heads
        label = (
            f"{ours} heads of {width} against {theirs} of {teacher} as {relations}, lengths "
            f"{_list(lengths)}"
        )
        make = partial(
            operands.attention_relation_kl, lengths, ours, width, theirs, teacher, relations
        )
        calls[label] = make
        calls[f"{label}, with itself"] = partial(_with_itself, make)
    return calls


def _with_itself(make: Callable[..., Case], **like) -> Case:
    return operands.with_itself(make(**like))


def _bias_gelu() -> Calls:
    calls: Calls = {  # of TinyBERT-4 and BERT-base
        f"{rows} x {columns}": partial(operands.bias_gelu, (rows, columns))
        for rows, columns in ((0, 1200), (131, 1200), (131, 3072))
    }
    for inputs, columns in ((312, 1200), (768, 3072)):
        shape = (131, columns), inputs
        label = f"131 x {inputs} to {columns}"
        calls[f"{label}, trained"] = partial(operands.bias_gelu, *shape)
        calls[f"{label}, frozen"] = partial(operands.frozen_bias_gelu, *shape)
    return calls


def _linear_cross_entropy() -> Calls:
    calls: Calls = {
        f"{labelled} of 131 rows of {columns}, 1,009 words": partial(
            operands.linear_cross_entropy, 131, labelled, columns, 1009
        )
        for columns in (312, 768)
        for labelled in (0, 20)
    }
    calls["losses of rows, smoothed, 3 ignored"] = partial(
        operands.linear_cross_entropy,
        131, 20, 312, 1009, ignored=3, label_smoothing=0.1, reduction="none",
    )  # fmt: skip
    return calls


def _soft_cross_entropy() -> Calls:
    calls: Calls = {
        f"32 x {classes}": partial(operands.soft_cross_entropy, 32, classes) for classes in (2, 30)
    }
    calls["32 x 30, divergence"] = partial(
        operands.soft_cross_entropy, 32, 30, form="kl", temperature=2.0
    )
    return calls


CALLS: dict[str, Callable[[], Calls]] = {
    "attention": _attention,
    "attention_relation_kl": _attention_relation_kl,
    "attention_score_mse": _attention_score_mse,
    "bias_gelu": _bias_gelu,
    "dropout_add_layer_norm": _dropout_add_layer_norm,
    "embedding_layer_norm": _embedding_layer_norm,
    "hidden_mse": lambda: {
        f"131 x {columns} against 768": partial(operands.hidden_mse, (131,), columns)
        for columns in HIDDEN
    },
    "layer_norm": lambda: _rows(operands.layer_norm),
    "linear_cross_entropy": _linear_cross_entropy,
    "soft_cross_entropy": _soft_cross_entropy,
}
