"""loss = logsumexp(l) - (1 - s) l[label] - s mean(l),   l = h W^T + bias, of labelled rows; and

    z = softmax(l) - (1 - s) onehot(label) - s / V,
    dh = u z W,   dW = (u z)^T h,   dbias = u z     with a row's upstream gradient u, s smoothing.

Shapes: h (R, C), W (V, C), bias (V,), l and u z (R, V), loss and u (R,) fp32. The products are
cuBLAS's, on chunks of rows whose logits stay in the L2 cache; between them one kernel, one program
a row, reads the logits twice and leaves u z in their place. Sums are fp32; u z is rounded once, to
the operands' dtype. A label outside the vocabulary makes its loss NaN.

Inside, V is a multiple of ALIGN. BERT's 30,522 words are no multiple of 8 numbers, and for such
products cuBLAS took, on an H100 too, kernels of sm_80 that load two numbers at a time.
"""

import torch
import triton
import triton.language as tl

from tinybert_fast.kernels import configs
from tinybert_fast.kernels.products import add_product, multiply_into

# Words are added up to a multiple of so many: wide loads, aligned products. Their weights are 0 and
# their bias is -inf.
ALIGN = 16
# A chunk's rows are a multiple too: its labels and losses then begin at a multiple of 16 bytes, as
# those of the first chunk do, and the kernel is compiled once.
CHUNK = 16
LOWEST = tl.constexpr(-3.0e38)  # a running maximum's start: -inf would subtract from itself


@triton.jit
def _numbers(logits_ptr, bias_ptr, offs_n, width):
    """Logits in fp32, -inf beyond the vocabulary, where the bias is so: (BLOCK_N,)."""
    x = tl.load(logits_ptr + offs_n, mask=offs_n < width, other=0.0).to(tl.float32)
    return x + tl.load(bias_ptr + offs_n, mask=offs_n < width, other=float("-inf"))


@triton.jit(do_not_specialize=["ignore_index"])
def _loss_kernel(
    logits_ptr, bias_ptr, labels_ptr, upstream_ptr, losses_ptr, words, width, ignore_index,
    smoothing, GRADIENTS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * width
    lanes = tl.arange(0, BLOCK_N)
    highest = tl.full((BLOCK_N,), LOWEST, tl.float32)
    total, plain = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, width, BLOCK_N):
        x = _numbers(logits_ptr, bias_ptr, first + lanes, width)
        higher = tl.maximum(highest, x)
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        plain += tl.where(first + lanes < words, x, 0.0)
        highest = higher
    peak = tl.max(highest, axis=0)
    logsumexp = peak + tl.log(tl.sum(total * tl.exp(highest - peak), axis=0))

    known = (label >= 0) & (label < words)
    chosen = tl.load(logits_ptr + label, mask=known, other=float("nan")).to(tl.float32)
    chosen += tl.load(bias_ptr + label, mask=known, other=0.0)
    mean = tl.sum(plain, axis=0) / words
    loss = logsumexp - (1.0 - smoothing) * chosen - smoothing * mean
    live = label != ignore_index
    tl.store(losses_ptr + row, tl.where(live, loss, 0.0))
    if GRADIENTS:
        scale = tl.where(live, 1.0, 0.0)
        if upstream_ptr is not None:
            scale *= tl.load(upstream_ptr + row)
        tl.debug_barrier()  # every warp has read the label's logit before one writes over it
        for first in range(0, width, BLOCK_N):
            offs_n = first + lanes
            z = tl.exp(_numbers(logits_ptr, bias_ptr, offs_n, width) - logsumexp)
            z -= smoothing / words + tl.where(offs_n == label, 1.0 - smoothing, 0.0)
            # Zero beyond the vocabulary, even of a row that is NaN.
            # A mask by ``words``, which need be no multiple of ALIGN, would store one at a time.
            z = tl.where(offs_n < words, z * scale, 0.0).to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + offs_n, z, mask=offs_n < width)


def forward(
    hidden, weight, bias, rows, labels, ignore_index, label_smoothing, upstream, wanted
):  # fmt: skip
    """-> losses (R,); gradients of sum(upstream * losses), upstream 1 if None, with respect to
    hidden (T, C), weight (V, C) and bias (V,) in fp32, empty unless wanted.
    """
    with_hidden, with_weight, with_bias = wanted
    words, count = weight.shape[0], len(labels)
    width = configs.cdiv(words, ALIGN) * ALIGN
    selected, projection = hidden.index_select(0, rows), _padded(weight, width, hidden.dtype, 0.0)
    losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
    dselected = losses.new_empty(selected.shape if with_hidden else (0,))
    dweight = losses.new_zeros(projection.shape if with_weight else (0,))
    dbias = losses.new_zeros(width if with_bias else 0)
    labels = labels.contiguous()
    if upstream is not None:
        upstream = upstream.float().contiguous()
    bias = losses.new_zeros(words) if bias is None else bias
    bias = _padded(bias, width, torch.float32, -torch.inf)
    fitting = configs.L2_BYTES // (width * hidden.element_size())
    size = max(1, min(count, max(CHUNK, fitting // CHUNK * CHUNK)))
    logits = hidden.new_empty(size, width)
    for first in range(0, count, size):
        chunk = slice(first, min(first + size, count))
        some = selected[chunk]
        z = logits[: len(some)]
        torch.mm(some, projection.mT, out=z)
        _loss_kernel[(len(some),)](
            z, bias, labels[chunk], None if upstream is None else upstream[chunk],
            losses[chunk], words, width, ignore_index, label_smoothing,
            GRADIENTS=any(wanted), **configs.vocabulary(),
        )  # fmt: skip
        if with_hidden:
            multiply_into(dselected[chunk], z, projection)
        if with_weight:
            add_product(dweight, z.mT, some)
        if with_bias:
            dbias += z.sum(0, dtype=torch.float32)
    if with_hidden:
        dselected = losses.new_zeros(hidden.shape).index_add_(0, rows, dselected)
    return losses, dselected, dweight[:words], dbias[:words]


def _padded(x, rows, dtype, value):
    """x in ``dtype``, followed by rows of ``value`` if it has fewer than ``rows``."""
    if len(x) == rows:
        return x.to(dtype).contiguous()
    y = x.new_empty((rows, *x.shape[1:]), dtype=dtype)
    y[: len(x)].copy_(x)
    y[len(x) :].fill_(value)
    return y
