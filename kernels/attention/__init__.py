"""Scaled dot-product attention within each sequence, a tile of scores at a time.

    S = scale Q K^T,   P = exp(S - lse),   O = (P * M) V
    delta = rowsum(dO * O),   dS = P * ((dO V^T) * M - delta)
    dQ = scale dS K,   dK = scale dS^T Q,   dV = (P * M)^T dO

Shapes: q, k, v, out and their gradients (T, H, D), or padded (B, N, H, D); any strides with
neighbouring D; lse and delta without D, fp32; work int32 (B, 4), of ops/layout.py: where each
sequence is, the longest first, `padded_work` for padded operands; cu_seqlens is not read;
block_mask the seven lists of reference/block_mask.py, or none. M is keep / keep rate of
reference/philox.py, a function of the sequence's number and not of its place in the list. Products
in the operands' dtype with fp32 sums (fp32 operands: IEEE products, on no tensor core); softmax in
fp32 and base 2, so lse and the scale of S carry log2(e). One program writes a tile and nobody adds
to it: two runs give the same bits, whatever the order of the list.
Sources: Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691; Graham 1969, Bounds on
Multiprocessing Timing Anomalies (longest first).
"""

from tinybert_fast.kernels.attention.backward import backward, backward_of_stack
from tinybert_fast.kernels.attention.forward import forward

__all__ = ["backward", "backward_of_stack", "forward"]
