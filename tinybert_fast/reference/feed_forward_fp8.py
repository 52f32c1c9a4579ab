"""y = g W2^T + b2,   g = [gelu(u)],   u = [x] W1^T + b1: a feed-forward block of 8-bit floats.

[r] rounds a row to s q, q in e4m3 (3 bits of mantissa, up to 448), s fp32:

    s = max|x| / 448                                        of a row of x
    s = (1.07 |x| max_j |W1_j| + max_j |b1_j|) / 448        of a row of gelu(u)

The latter needs no row of gelu(u), which is made in tiles, and bounds it: |gelu(u)| <= |u|, and by
Cauchy-Schwarz |u_j| <= |[x]| |W1_j| + |b1_j|; 1.07 is more than rounding can make |[x]| longer.
Rows of W1 and W2 are rounded as those of x.

Shapes: x (rows, K); W1 (F, K), W2 (C, F) as e4m3 and a scale (F,), (C,) for each row; b1 (F,),
b2 (C,); reach (2,): max_j |W1_j| and max_j |b1_j|; y (rows, C).
Source: Micikevicius et al. 2022, arXiv:2209.05433.
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
TINY = 1e-12  # stands for the largest number of a row of zeros
SLACK = 1.07


def feed_forward_fp8(
    x: Tensor,
    inner: Tensor,
    inner_scale: Tensor,
    inner_bias: Tensor,
    outer: Tensor,
    outer_scale: Tensor,
    outer_bias: Tensor,
    reach: Tensor,
) -> Tensor:
    """``F.linear(F.gelu(F.linear(x, W1, b1)), W2, b2)`` of rounded operands, in x's dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, scale = rounded(x.to(wide))
    u = (rows.to(wide) @ inner.to(wide).mT) * scale[:, None] * inner_scale + inner_bias
    bound = SLACK * x.to(wide).norm(dim=1) * reach[0] + reach[1]
    scale = bound.clamp(min=TINY) / LARGEST
    gelu = 0.5 * u * (1.0 + torch.erf(u * 2**-0.5))
    rows = (gelu / scale[:, None]).to(E4M3)
    y = (rows.to(wide) @ outer.to(wide).mT) * scale[:, None] * outer_scale + outer_bias
    return y.to(x.dtype)


def rounded(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(R, C) -> e4m3 (R, C) and the scale (R,) of each row, in the rows' dtype."""
    largest = rows.abs().amax(1).clamp(min=TINY)
    return (rows * (LARGEST / largest)[:, None]).to(E4M3), largest / LARGEST
