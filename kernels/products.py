"""cuBLAS's products of operands in half precision with fp32 sums: what is kept in fp32 is not
rounded on the way.
"""

import torch


def multiply_into(out, a, b):
    """out = a @ b, out fp32."""
    if out.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # where PyTorch has no out_dtype
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def add_product(total, a, b):
    """total += a @ b, total fp32."""
    if total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:  # FLOP counters miss addmm_
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)
