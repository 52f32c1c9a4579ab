"""y = M * (z * weight + bias),   z = (e - mean) * rstd,
    e = word[ids] + position[positions] + token_type[types].

M is keep / keep rate of reference/philox.py, drawn anew by the backward: no mask is stored.
Backward, d = M * dy and g = d * weight:   de = rstd * (g - mean(g) - z * mean(g * z)),
    dweight = sum(d * z),   dbias = sum(d)   over all rows;
    row r of a table's gradient is the sum of de over the rows whose id is r.

Shapes: ids int64 (rows,); tables (V, C), (P, C), (S, C), S <= 2; y, e and their gradients (rows,
C); weight, bias (C,); mean, rstd (rows, 1) fp32; sequences, positions int32 (rows,). y and the
stored e have the word table's dtype. Statistics and sums are fp32 for every dtype.
Sources: Ba et al. 2016, arXiv:1607.06450; Devlin et al. 2018, arXiv:1810.04805.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinybert_fast.kernels import configs
from tinybert_fast.kernels.philox import Dropout, drop, site_key
from tinybert_fast.kernels.rows import (
    add,
    add_partials,
    gather_rows,
    input_gradient,
    load_place,
    load_rows,
    load_statistic,
    load_vector,
    multiply,
    normalise,
    partials,
    renormalise,
    store_rows,
    store_statistic,
    store_sum,
    where_rows,
    zeros,
)

aten = torch.ops.aten


@triton.jit
def _load_ids(ids_ptr, offs_m, rows, size):
    """The ids of a block of rows, each a row of its table: (BLOCK_M,)."""
    ids = tl.load(ids_ptr + offs_m, mask=offs_m < rows, other=0)
    tl.device_assert((ids >= 0) & (ids < size), "embedding_layer_norm: an id outside its table")
    return ids


# debug: device_assert is compiled only then.
@triton.jit(do_not_specialize=["rows", "words", "position_rows", "types", "site"], debug=True)
def _forward_kernel(
    word_ptr, position_ptr, token_type_ptr, weight_ptr, bias_ptr,
    input_ids_ptr, position_ids_ptr, token_type_ids_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    rows, words, position_rows, types, eps, dropout, site, sequences_ptr, positions_ptr,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = offs_m < rows
    ids = _load_ids(input_ids_ptr, offs_m, rows, words)
    position_ids = _load_ids(position_ids_ptr, offs_m, rows, position_rows)
    type_ids = _load_ids(token_type_ids_ptr, offs_m, rows, types)
    total = gather_rows(word_ptr, ids, live, C, BLOCK_N)
    total = add(total, gather_rows(position_ptr, position_ids, live, C, BLOCK_N))
    total = add(total, gather_rows(token_type_ptr, type_ids, live, C, BLOCK_N))
    store_rows(total_ptr, offs_m, rows, total, C, BLOCK_N)
    z, mean, rstd = normalise(total, eps, C, BLOCK_N)
    weight = load_vector(weight_ptr, C, BLOCK_M, BLOCK_N)
    y = add(multiply(z, weight), load_vector(bias_ptr, C, BLOCK_M, BLOCK_N))
    if DROPOUT:
        sequence, position = load_place(sequences_ptr, positions_ptr, offs_m, rows)
        y = drop(y, site_key(dropout.seed, site), sequence, position, dropout, BLOCK_N)
    store_rows(y_ptr, offs_m, rows, y, C, BLOCK_N)
    store_statistic(mean_ptr, offs_m, rows, mean)
    store_statistic(rstd_ptr, offs_m, rows, rstd)


@triton.jit(do_not_specialize=["rows", "site"])
def _backward_kernel(
    grad_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr, token_type_ids_ptr, dtotal_ptr,
    partial_ptr, rows, dropout, site, sequences_ptr, positions_ptr,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    TYPES: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    key = site_key(dropout.seed, site) if DROPOUT else 0
    weight = load_vector(weight_ptr, C, BLOCK_M, BLOCK_N)
    dweight, dbias = zeros(C, BLOCK_M, BLOCK_N), zeros(C, BLOCK_M, BLOCK_N)
    dfirst, dsecond = zeros(C, BLOCK_M, BLOCK_N), zeros(C, BLOCK_M, BLOCK_N)  # token types
    step = tl.num_programs(0) * BLOCK_M
    for first in tl.range(tl.program_id(0) * BLOCK_M, rows, step, num_stages=STAGES):
        offs_m = first + tl.arange(0, BLOCK_M).to(tl.int64)
        grad = load_rows(grad_ptr, offs_m, rows, C, BLOCK_N)
        total = load_rows(total_ptr, offs_m, rows, C, BLOCK_N)
        mean, rstd = load_statistic(mean_ptr, offs_m, rows), load_statistic(rstd_ptr, offs_m, rows)
        if DROPOUT:
            sequence, position = load_place(sequences_ptr, positions_ptr, offs_m, rows)
            grad = drop(grad, key, sequence, position, dropout, BLOCK_N)
        z = renormalise(total, mean, rstd)
        dweight, dbias = add(dweight, multiply(grad, z)), add(dbias, grad)
        dtotal = input_gradient(grad, z, weight, rstd, C)
        store_rows(dtotal_ptr, offs_m, rows, dtotal, C, BLOCK_N)
        if TYPES == 1:
            dfirst = add(dfirst, dtotal)
        else:
            kind = tl.load(token_type_ids_ptr + offs_m, mask=offs_m < rows, other=0)[:, None]
            dfirst = add(dfirst, where_rows(kind == 0, dtotal))
            dsecond = add(dsecond, where_rows(kind == 1, dtotal))
    store_sum(partial_ptr, 0, dweight, C, BLOCK_N)
    store_sum(partial_ptr, 1, dbias, C, BLOCK_N)
    store_sum(partial_ptr, 2, dfirst, C, BLOCK_N)
    if TYPES > 1:
        store_sum(partial_ptr, 3, dsecond, C, BLOCK_N)


def _check_on_cpu(ids: Tensor, table: Tensor) -> None:
    """IndexError for an id outside its table. On a GPU the kernel's assertion stops the process'
    work instead, as PyTorch's own gathers do: to raise, the host would have to wait.
    """
    if ids.device.type == "cpu" and ((ids < 0) | (ids >= len(table))).any():
        raise IndexError(
            f"embedding_layer_norm: ids must lie in 0..{len(table) - 1}, the rows of their table; "
            f"got {int(ids.min())}..{int(ids.max())}"
        )


def forward(
    word, position, token_type, weight, bias, input_ids, position_ids, token_type_ids, padding_idx,
    eps, dropout_p, seed, site, sequences, positions,
):  # fmt: skip
    """Tables and (rows,) ids -> y, e in the words' dtype, mean, rstd (rows, 1), no stored cells."""
    rows, columns = len(input_ids), word.shape[1]
    y, total = (torch.empty(rows, columns, dtype=word.dtype, device=word.device) for _ in range(2))
    mean, rstd = (torch.empty(rows, 1, dtype=torch.float32, device=word.device) for _ in range(2))
    tables = [x.contiguous() for x in (word, position, token_type)]
    ids = [x.contiguous() for x in (input_ids, position_ids, token_type_ids)]
    for table, its_ids in zip(tables, ids, strict=True):
        _check_on_cpu(its_ids, table)
    if rows > 0:
        setting = configs.rows("forward", columns)
        _forward_kernel[(configs.cdiv(rows, setting.block_m),)](
            *tables, weight.contiguous(), bias.contiguous(), *ids, y, total, mean, rstd,
            rows, *map(len, tables), eps, Dropout.of(dropout_p, seed), site, sequences, positions,
            C=columns, DROPOUT=dropout_p > 0.0, **setting.launch(),
            sanitize_overflow=False,  # with debug on, each integer sum would assert too
        )  # fmt: skip
    return y, total, mean, rstd, torch.empty(0, dtype=torch.uint8, device=word.device)


def backward(
    grad, total, mean, rstd, cells, weight, input_ids, position_ids, token_type_ids, seed, site,
    sequences, positions, words, position_rows, types, padding_idx, dropout_p,
):  # fmt: skip
    """Gradients of the three tables (words, position_rows, types rows), weight and bias.

    The mask is drawn again; ``cells`` is empty. A token type's row sums over nearly all rows, like
    dbias, and is summed with it. The other tables' rows are many and short sums: PyTorch sorts the
    ids, in half as many passes if they have half as many bits, and adds segments in a fixed order,
    without atomics.
    """
    rows, columns = total.shape
    dtotal = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    dweight, dbias = torch.empty_like(weight), torch.empty_like(weight)
    dtoken_type = torch.empty(types, columns, dtype=total.dtype, device=total.device)
    setting = configs.rows("backward", columns, total.element_size())
    partial = partials(2 + types, rows, setting, total)
    if rows > 0:
        _backward_kernel[(partial.shape[1],)](
            grad.contiguous(), total, weight.contiguous(), mean, rstd, token_type_ids.contiguous(),
            dtotal, partial, rows, Dropout.of(dropout_p, seed), site, sequences, positions,
            C=columns, TYPES=types, DROPOUT=dropout_p > 0.0, **setting.launch(),
        )  # fmt: skip
    add_partials(partial, dweight, dbias, *dtoken_type.unbind())
    dense = aten.embedding_dense_backward
    dword = dense(dtotal, input_ids.int(), words, padding_idx, False)
    dposition = dense(dtotal, position_ids.int(), position_rows, -1, False)
    return dword, dposition, dtoken_type, dweight, dbias
