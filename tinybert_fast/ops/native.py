"""The one door to the compiled module tinybert_fast._native, which takes addresses.

The operators of this package have checked shapes, dtypes and devices, in terms of their arguments.
The door refuses once more what no address may be taken of: another device's memory, strided memory.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

TILE = 32  # columns of csrc/dropout_mask.cpp's kTile
DIRECTIONS = ("both", "causal", "anti_causal")  # csrc/attention.h's enum Direction
UNITS = ("token", "word", "span")  # csrc/mlm_mask.h's enum Unit


_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):  # Windows has no forks
    os.register_at_fork(after_in_child=_mark_forked)


@cache
def module() -> ModuleType:
    """Loaded at the first call that needs it."""
    loaded = import_module("tinybert_fast._native")
    if _forked:
        loaded.mark_forked()
    return loaded


CPU = torch.device("cpu")


def _at(x: Tensor | None, device: torch.device = CPU) -> int:
    """The address of what a function on ``device`` reads, or 0."""
    if x is None:
        return 0
    # What an operator forgot to check must not be read as it lies, nor where it does not.
    if x.device != device or not x.is_contiguous():
        raise ValueError(
            f"the compiled module runs on {device} and reads contiguous operands; got one on "
            f"{x.device} of strides {x.stride()}"
        )
    return x.data_ptr()


def _run(name: str, device: torch.device, *arguments: Any) -> Any:
    """The function for this device, with the threads or the stream that torch would use."""
    if device.type == "cpu":
        return getattr(module(), f"{name}_cpu")(*arguments, torch.get_num_threads())
    stream = torch.cuda.current_stream(device).cuda_stream
    return getattr(module(), f"{name}_cuda")(*arguments, stream)


def pad_lists(rows: Sequence[Sequence], width: int, fill: int, parts: int = 1) -> Tensor:
    """Rows of integers, or of ``parts`` integers each -> int64 (B, width[, parts])."""
    shape = (len(rows), width, parts) if parts > 1 else (len(rows), width)
    out = torch.empty(shape, dtype=torch.int64, device="cpu")
    module().pad_lists(rows, len(rows), width, parts, fill, _at(out))
    return out


def mlm_mask(
    ids, special, attention, starts, examples, table, places, ordinary, mask_id, ratio,
    mask_below, random_below, seed, step, unit, capacity, with_dense, allow_empty,
):  # fmt: skip
    """Replaces tokens of ``ids`` (B, N); gives their places and labels, ``capacity`` of each,
    offsets (B + 1,) and dense labels.
    """
    batch, width = ids.shape
    device = ids.device
    at = partial(_at, device=device)
    dense = torch.empty_like(ids) if with_dense else ids.new_empty(0)
    rows, labels = ids.new_empty(capacity), ids.new_empty(capacity)
    offsets = torch.empty(batch + 1, dtype=torch.int32, device=device)
    call = module().MlmMask(
        ids=at(ids),
        batch=batch,
        width=width,
        special=at(special),
        special_bytes=0 if special is None else special.element_size(),
        attention=at(attention),
        attention_bytes=0 if attention is None else attention.element_size(),
        starts=at(starts),
        examples=at(examples),
        table=at(table),
        vocabulary=len(table),
        places=at(places),
        place_count=0 if places is None else len(places),
        ordinary=at(ordinary),
        ordinary_count=len(ordinary),
        mask_id=mask_id,
        ratio=ratio,
        mask_below=mask_below,
        random_below=random_below,
        seed=seed,
        step=step,
        unit=UNITS.index(unit),
        dense=at(dense) if with_dense else 0,
    )
    lists = module().MaskedRows(
        places=at(rows), labels=at(labels), offsets=at(offsets), capacity=capacity
    )
    if device.type == "cpu":
        module().mlm_mask_cpu(call, lists, allow_empty, torch.get_num_threads())
    else:
        scratch = torch.empty(batch * (2 * width + 1), dtype=torch.int32, device=device)
        _run("mlm_mask", device, call, lists, at(scratch))
    return rows, labels, offsets, dense


def sequence_extents(real: Tensor) -> Tensor:
    """Bool (B, N) -> int64 (3, B): real tokens, column of the first, one past that of the last."""
    extents = torch.empty(3, len(real), dtype=torch.int64, device=real.device)
    _run("sequence_extents", real.device, _padding(real), _at(extents, real.device))
    return extents


def sequence_layout(real: Tensor, cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bool (B, N) -> rows int64, sequences and positions int32, (total,) each."""
    at = partial(_at, device=real.device)
    rows = torch.empty(total, dtype=torch.int64, device=real.device)
    sequences, positions = (rows.new_empty(total, dtype=torch.int32) for _ in range(2))
    packed = module().PackedRows(
        cu_seqlens=at(cu_seqlens),
        rows=at(rows),
        sequences=at(sequences),
        positions=at(positions),
        total=total,
    )
    _run("sequence_layout", real.device, _padding(real), packed)
    return rows, sequences, positions


def _padding(real: Tensor) -> Any:
    return module().Padding(real=_at(real, real.device), batch=real.shape[0], width=real.shape[1])


def attention_forward(
    q, k, v, cu_seqlens, scale, direction, threshold, seed, site
) -> tuple[Tensor, Tensor]:
    """fp32 or bf16 (T, H, D) on the CPU, whose heads lie together -> out (T, H, D), lse (T, H)."""
    out = torch.empty(q.shape, dtype=q.dtype, device="cpu")
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device="cpu")
    call = _attention(q, k, v, cu_seqlens, scale, direction, threshold, seed, site)
    _run("attention_forward", q.device, call, _at(out), _at(lse))
    return out, lse


def attention_backward(
    grad, q, k, v, out, lse, cu_seqlens, scale, direction, threshold, seed, site
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv (T, H, D)."""
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device="cpu") for _ in range(3))
    call = _attention(q, k, v, cu_seqlens, scale, direction, threshold, seed, site)
    results = (_at(x) for x in (dq, dk, dv))
    _run("attention_backward", q.device, call, _heads(grad), _at(out), _at(lse), *results)
    return dq, dk, dv


def _attention(q, k, v, cu_seqlens, scale, direction, threshold, seed, site) -> Any:
    first, second = (number & (2**64 - 1) for number in seed.tolist()) if threshold else (0, 0)
    return module().Attention(
        q=_heads(q),
        k=_heads(k),
        v=_heads(v),
        cu_seqlens=_at(cu_seqlens),
        sequences=len(cu_seqlens) - 1,
        heads=q.shape[1],
        width=q.shape[2],
        bf16=q.dtype == torch.bfloat16,
        scale=scale,
        direction=DIRECTIONS.index(direction),
        seed0=first,
        seed1=second,
        site=site,
        threshold=threshold,
    )


def attention_score_mse(
    q, k, p, r, cu_seqlens, direct_up_to: int, loss: str, gradients: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 or bf16 (T, H, D) and (T, H, Dt) on the CPU, whose heads lie together -> fp32
    loss, dq, dk, empty without ``gradients``. Sequences of more tokens than ``direct_up_to`` take
    the Gram form.
    """
    total = torch.empty((), dtype=torch.float32, device="cpu")
    shape = q.shape if gradients else (0,)
    dq, dk = (torch.empty(shape, dtype=q.dtype, device="cpu") for _ in range(2))
    call = module().AttentionScoreMse(
        q=_heads(q),
        k=_heads(k),
        p=_heads(p),
        r=_heads(r),
        cu_seqlens=_at(cu_seqlens),
        sequences=len(cu_seqlens) - 1,
        heads=q.shape[1],
        width=q.shape[2],
        teacher_width=p.shape[2],
        bf16=q.dtype == torch.bfloat16,
        student=loss == "student",
        direct_up_to=direct_up_to,
        gradients=gradients,
    )
    _run("attention_score_mse", q.device, call, _at(total), _at(dq), _at(dk))
    return total, dq, dk


def attention_relation_kl(a, b, c, d, cu_seqlens, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    """fp32 or bf16 (T, R, D) and (T, R, Dt) on the CPU, whose heads lie together -> loss, da, db in
    fp32, empty without ``gradients``. b and d None: a relation with itself, whose db is empty.
    """
    total = torch.empty((), dtype=torch.float32, device="cpu")
    itself = b is None
    da = torch.empty(a.shape if gradients else (0,), dtype=torch.float32, device="cpu")
    db = torch.empty((0,) if itself else da.shape, dtype=torch.float32, device="cpu")
    call = module().AttentionRelationKl(
        a=_heads(a),
        b=_heads(a if itself else b),
        c=_heads(c),
        d=_heads(c if itself else d),
        itself=itself,
        cu_seqlens=_at(cu_seqlens),
        sequences=len(cu_seqlens) - 1,
        tokens=a.shape[0],
        heads=a.shape[1],
        width=a.shape[2],
        teacher_width=c.shape[2],
        bf16=a.dtype == torch.bfloat16,
        gradients=gradients,
    )
    _run("attention_relation_kl", a.device, call, _at(total), _at(da), _at(db))
    return total, da, db


def cross_entropy(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weights: Tensor,
    smoothing: float,
    gradients: bool,
    dbias: Tensor | None,
) -> Tensor:
    """fp32 or bf16 (R, V) on the CPU, whose rows lie together, before their bias (V,) -> unweighted
    losses (R,). With ``gradients`` those of the weighted ones take the place of the logits, and
    their sum over the rows is added to ``dbias`` (V,).
    """
    losses = torch.empty(len(logits), dtype=torch.float32, device="cpu")
    if not logits.is_cpu or logits.stride(1) != 1:
        raise ValueError(
            "the compiled module runs on cpu and reads rows of stride 1; got some on "
            f"{logits.device} of stride {logits.stride(1)}"
        )
    call = module().CrossEntropy(
        logits=logits.data_ptr(),
        bias=_at(bias),
        labels=_at(labels),
        weights=_at(weights),
        rows=len(logits),
        words=logits.shape[1],
        row=logits.stride(0),
        smoothing=smoothing,
        bf16=logits.dtype == torch.bfloat16,
        gradients=gradients,
    )
    _run("cross_entropy", logits.device, call, _at(losses), _at(dbias))
    return losses


def _heads(x: Tensor) -> Any:
    """Address and strides of (T, H, D) on the CPU, whose heads lie together."""
    together = x.stride(-1) == 1 or x.shape[-1] == 1 or not x.numel()
    if not x.is_cpu or not together:
        raise ValueError(
            "the compiled module runs on cpu and reads heads of stride 1; got some on "
            f"{x.device} of stride {x.stride(-1)}"
        )
    return module().Heads(x.data_ptr(), x.stride(0), x.stride(1))


def attention_keep(
    seed: Tensor, site: int, sequences: Tensor, heads: slice, first: int, queries: int,
    tiles: Tensor, keys: int, threshold: int,
) -> Tensor:  # fmt: skip
    """fp32 (sequences, heads, queries, keys) on the CPU, 1 where a cell is kept, else 0.

    The queries begin at ``first``, a multiple of 16; the keys are those of ``tiles``, int64 numbers
    of TILE columns each, the last of which may be cut.
    """
    count = heads.stop - heads.start
    shape = (len(sequences), count, queries, keys)
    keep = torch.empty(shape, dtype=torch.float32, device="cpu")
    first_seed, second_seed = (number & (2**64 - 1) for number in seed.tolist())
    module().attention_keep(
        seed0=first_seed,
        seed1=second_seed,
        site=site,
        sequences=_at(sequences),
        count=len(sequences),
        first_head=heads.start,
        heads=count,
        first=first,
        queries=queries,
        tiles=_at(tiles),
        keys=keys,
        threshold=threshold,
        keep=_at(keep),
        threads=torch.get_num_threads(),
    )
    return keep


def hidden_cells(
    seed: Tensor, site: int, sequences: Tensor, positions: Tensor, columns: int
) -> Tensor:
    """uint8 (rows, columns) on the CPU: the random byte of every hidden cell."""
    cells = torch.empty(len(sequences), columns, dtype=torch.uint8, device="cpu")
    first, second = (number & (2**64 - 1) for number in seed.tolist())
    module().hidden_cells(
        seed0=first,
        seed1=second,
        site=site,
        sequences=_at(sequences),
        positions=_at(positions),
        rows=len(sequences),
        columns=columns,
        cells=_at(cells),
        threads=torch.get_num_threads(),
    )
    return cells


def block_mask_kinds(*operands: Any) -> Tensor:
    """uint8 (M, n, n): 0 for a block that is left out, 1 for a partial one, 2 for a full one."""
    pattern, (size, masks, side, *_), device = _pattern(*operands)
    count = -(-size // side)
    kinds = torch.empty(masks, count, count, dtype=torch.uint8, device=device)
    _run("block_mask_kinds", device, pattern, _at(kinds, device))
    return kinds


def block_mask_lists(kinds: Tensor, entries: int, partials: int, *operands: Any) -> list[Tensor]:
    """The seven lists of ``reference/block_mask.py``, of so many entries and partial blocks."""
    pattern, (_, masks, side, *_), device = _pattern(*operands)

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    at = partial(_at, device=device)
    sizes = ((masks, 2 * kinds.shape[1] + 1), (entries,), (entries,))
    by_row, by_column = ([new(*size) for size in sizes] for _ in range(2))
    tile_of, cells = new(*kinds.shape), new(partials, side, side // 32)
    lists = module().PatternLists(
        kinds=at(kinds),
        tile_of=at(tile_of),
        row_offsets=at(by_row[0]),
        row_blocks=at(by_row[1]),
        row_tiles=at(by_row[2]),
        column_offsets=at(by_column[0]),
        column_blocks=at(by_column[1]),
        column_tiles=at(by_column[2]),
    )
    _run("block_mask_fill", device, pattern, lists, at(cells))
    return [*by_row, *by_column, cells]


def _pattern(
    probe, document_first, document_stop, global_words, lengths, dense, size, masks, side,
    everything, window, window_blocks, random_blocks, seed,
):  # fmt: skip
    """The C++ pattern; sizes; device."""
    at = partial(_at, device=probe.device)
    pattern = module().Pattern(
        size=size,
        masks=masks,
        side=side,
        everything=everything,
        window=window,
        window_blocks=window_blocks,
        global_words=at(global_words),
        random_blocks=random_blocks,
        seed=seed,
        document_first=at(document_first),
        document_stop=at(document_stop),
        lengths=at(lengths),
        dense=at(dense),
    )
    return pattern, (size, masks, side), probe.device
