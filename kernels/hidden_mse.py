"""loss = sum(E^2) / n,   E = S W^T + bias - T,   n numbers of T: TinyBERT's hidden-state loss
(Jiao et al. 2020, arXiv:1909.10351, equations 8 and 9), and its gradients:

    dS = (2 / n) E W,   dW = (2 / n) E^T S,   dbias = (2 / n) sum(E)

Shapes: S, dS (rows, C), W, dW (Ct, C), bias (Ct,), T, E (rows, Ct). The products are cuBLAS's, on
chunks of rows whose E stays in the L2 cache; between them one kernel puts E in the place of S W^T
and sums it and its square over rows. Sums are fp32. E is rounded once, to the operands' dtype;
without W, where 2 / n times E is a gradient, it is not.
"""

import torch
import triton
import triton.language as tl

from tinybert_fast.kernels import configs
from tinybert_fast.kernels.products import add_product, multiply_into
from tinybert_fast.kernels.rows import (
    add,
    add_partials,
    load_rows,
    load_vector,
    multiply,
    partials,
    scaled,
    store_rows,
    store_sum,
    where_rows,
    zeros,
)


@triton.jit(do_not_specialize=["rows"])
def _error_kernel(
    projected_ptr, bias_ptr, teacher_ptr, error_ptr, partial_ptr, rows, scale,
    C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    squares, errors = zeros(C, BLOCK_M, BLOCK_N), zeros(C, BLOCK_M, BLOCK_N)
    bias = zeros(C, BLOCK_M, BLOCK_N)
    if bias_ptr is not None:
        bias = load_vector(bias_ptr, C, BLOCK_M, BLOCK_N)
    step = tl.num_programs(0) * BLOCK_M
    for first in tl.range(tl.program_id(0) * BLOCK_M, rows, step, num_stages=STAGES):
        offs_m = first + tl.arange(0, BLOCK_M).to(tl.int64)
        teacher = load_rows(teacher_ptr, offs_m, rows, C, BLOCK_N)
        error = add(load_rows(projected_ptr, offs_m, rows, C, BLOCK_N), scaled(teacher, -1.0))
        error = where_rows((offs_m < rows)[:, None], add(error, bias))
        squares, errors = add(squares, multiply(error, error)), add(errors, error)
        store_rows(error_ptr, offs_m, rows, scaled(error, scale), C, BLOCK_N)
    store_sum(partial_ptr, 0, squares, C, BLOCK_N)
    store_sum(partial_ptr, 1, errors, C, BLOCK_N)


def forward(student, weight, bias, teacher, wanted):
    """-> loss, and its gradients with respect to student, weight and bias, all fp32; empty unless
    wanted.
    """
    with_student, with_weight, with_bias = wanted
    rows, width = teacher.shape
    n = max(teacher.numel(), 1)
    sums = student.new_zeros(2, width, dtype=torch.float32)
    projection = None if weight is None else weight.to(student.dtype)
    bias = None if bias is None else bias.contiguous()
    # Without W it is where the kernel writes, wanted or not.
    dstudent = sums.new_empty(student.shape if with_student or weight is None else (0,))
    dweight = sums.new_zeros(weight.shape if with_weight else (0,))
    setting = configs.rows("backward", width, teacher.element_size())
    size = max(1, configs.L2_BYTES // (width * student.element_size()))
    for first in range(0, rows, size):
        chunk = slice(first, first + size)
        some, target = student[chunk].contiguous(), teacher[chunk].contiguous()
        projected = some if projection is None else some @ projection.mT
        error = dstudent[chunk] if projection is None else projected
        scale = 2.0 / n if projection is None else 1.0
        partial = partials(2, len(some), setting, target)
        _error_kernel[(partial.shape[1],)](
            projected, bias, target, error, partial, len(some), scale, C=width, **setting.launch()
        )
        found = [torch.empty_like(one) for one in sums]
        add_partials(partial, *found)
        sums += torch.stack(found)
        if projection is not None and with_student:
            multiply_into(dstudent[chunk], error, projection, 2.0 / n)
        if with_weight:
            add_product(dweight, error.mT, some, 2.0 / n)
    dbias = sums[1] * (2.0 / n) if with_bias else sums.new_empty(0)
    return sums[0].sum() / n, dstudent, dweight, dbias
