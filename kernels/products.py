"""cuBLAS's products of operands in half precision with fp32 sums: what is kept in fp32 is not
rounded on the way, nor gone over again for a factor.
"""

import torch


def multiply_into(out, a, b, factor=1.0):
    """out = factor a @ b, out fp32."""
    _add(out, a, b, 0.0, factor)


def add_product(total, a, b, factor=1.0):
    """total += factor a @ b, total fp32."""
    _add(total, a, b, 1.0, factor)


def _add(out, a, b, beta, alpha):
    """out = beta out + alpha a @ b; of beta 0 what ``out`` held does not matter."""
    if out.is_cuda:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out_dtype=out.dtype, out=out)
    else:  # where PyTorch has no out_dtype; FLOP counters miss addmm_
        a, b = a.to(out.dtype), b.to(out.dtype)
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
