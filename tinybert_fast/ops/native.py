"""The one door to the compiled module tinybert_fast._native, which takes addresses.

Its callers, the operators of this package, have checked dtypes, devices and contiguity.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

UNITS = ("token", "word", "span")  # csrc/mlm_mask.h's enum Unit


@cache
def module() -> ModuleType:
    """Loaded at the first call that needs it."""
    return import_module("tinybert_fast._native")


def _at(x: Tensor | None) -> int:
    if x is None:
        return 0
    assert x.is_contiguous(), "operands of the compiled module are contiguous"
    return x.data_ptr()


def _run(name: str, device: torch.device, *arguments: Any) -> Any:
    """The function for this device, with the threads or the stream that torch would use."""
    if device.type == "cpu":
        return getattr(module(), f"{name}_cpu")(*arguments, torch.get_num_threads())
    stream = torch.cuda.current_stream(device).cuda_stream
    return getattr(module(), f"{name}_cuda")(*arguments, stream)


def mlm_mask(
    ids, special, attention, starts, examples, table, places, ordinary, mask_id, ratio,
    mask_below, random_below, seed, step, unit, capacity, with_dense, allow_empty,
):  # fmt: skip
    """Replaces tokens of ``ids`` (B, N); gives their places and labels, ``capacity`` of each,
    offsets (B + 1,) and dense labels.
    """
    batch, width = ids.shape
    device = ids.device
    dense = torch.empty_like(ids) if with_dense else ids.new_empty(0)
    rows, labels = ids.new_empty(capacity), ids.new_empty(capacity)
    offsets = torch.empty(batch + 1, dtype=torch.int32, device=device)
    call = module().MlmMask(
        ids=_at(ids),
        batch=batch,
        width=width,
        special=_at(special),
        special_bytes=0 if special is None else special.element_size(),
        attention=_at(attention),
        attention_bytes=0 if attention is None else attention.element_size(),
        starts=_at(starts),
        examples=_at(examples),
        table=_at(table),
        vocabulary=len(table),
        places=_at(places),
        place_count=0 if places is None else len(places),
        ordinary=_at(ordinary),
        ordinary_count=len(ordinary),
        mask_id=mask_id,
        ratio=ratio,
        mask_below=mask_below,
        random_below=random_below,
        seed=seed,
        step=step,
        unit=UNITS.index(unit),
        dense=_at(dense) if with_dense else 0,
    )
    lists = module().MaskedRows(
        places=_at(rows), labels=_at(labels), offsets=_at(offsets), capacity=capacity
    )
    if device.type == "cpu":
        module().mlm_mask_cpu(call, lists, allow_empty, torch.get_num_threads())
    else:
        scratch = torch.empty(batch * (2 * width + 1), dtype=torch.int32, device=device)
        _run("mlm_mask", device, call, lists, _at(scratch))
    return rows, labels, offsets, dense


def sequence_extents(real: Tensor) -> Tensor:
    """Bool (B, N) -> int64 (3, B): real tokens, column of the first, one past that of the last."""
    extents = torch.empty(3, len(real), dtype=torch.int64, device=real.device)
    _run("sequence_extents", real.device, _padding(real), _at(extents))
    return extents


def sequence_layout(real: Tensor, cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bool (B, N) -> rows int64, sequences and positions int32, (total,) each."""
    rows = torch.empty(total, dtype=torch.int64, device=real.device)
    sequences, positions = (rows.new_empty(total, dtype=torch.int32) for _ in range(2))
    packed = module().PackedRows(
        cu_seqlens=_at(cu_seqlens),
        rows=_at(rows),
        sequences=_at(sequences),
        positions=_at(positions),
    )
    _run("sequence_layout", real.device, _padding(real), packed)
    return rows, sequences, positions


def _padding(real: Tensor) -> Any:
    return module().Padding(real=_at(real), batch=real.shape[0], width=real.shape[1])


def attention_keep(
    seed: Tensor, site: int, sequences: Tensor, heads: slice, length: int, threshold: int
) -> Tensor:
    """fp32 (sequences, heads, length, length) on the CPU, 1 where a cell is kept, else 0."""
    count = heads.stop - heads.start
    keep = torch.empty(len(sequences), count, length, length)
    first, second = (number & (2**64 - 1) for number in seed.tolist())
    module().attention_keep(
        seed0=first,
        seed1=second,
        site=site,
        sequences=_at(sequences),
        count=len(sequences),
        first_head=heads.start,
        heads=count,
        length=length,
        threshold=threshold,
        keep=_at(keep),
        threads=torch.get_num_threads(),
    )
    return keep


def hidden_cells(
    seed: Tensor, site: int, sequences: Tensor, positions: Tensor, columns: int
) -> Tensor:
    """uint8 (rows, columns) on the CPU: the random byte of every hidden cell."""
    cells = torch.empty(len(sequences), columns, dtype=torch.uint8)
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
