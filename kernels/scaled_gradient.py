"""y = round(factor * x), in one pass: what the backward of a scalar loss does to gradients that its
forward left (ops/loss.py).

Shapes: x, y any, contiguous; factor one number, fp32. The product is fp32, whatever x is: a factor
rounded to bf16 would be off by as much for a whole tensor.
"""

import torch
import triton
import triton.language as tl

from tinybert_fast.kernels import configs


# Specialised on ``size``: by what divides it the compiler sees that whole loads are masked alike.
@triton.jit
def _scale_kernel(x_ptr, factor_ptr, y_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = offs < size
    x = tl.load(x_ptr + offs, mask=live, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, x * tl.load(factor_ptr).to(tl.float32), mask=live)


def forward(gradient, upstream, dtype):
    """``(gradient * upstream).to(dtype)``, upstream of one number."""
    y = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    size, tile = gradient.numel(), configs.ELEMENTWISE
    block = tile.block_m * tile.block_n
    if size > 0:
        _scale_kernel[(configs.cdiv(size, block),)](
            gradient.contiguous(), upstream, y, size,
            BLOCK=block, num_warps=tile.num_warps, **configs.COMPILED,
        )  # fmt: skip
    return y
