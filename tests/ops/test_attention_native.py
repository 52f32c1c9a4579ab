"""csrc/attention.cpp: each instruction set, tiles and blocks, strides, threads, its exponential."""

import pytest
import torch

from tinybert_fast import ops
from tinybert_fast.ops import dispatch
from tinybert_fast.ops.attention import DIRECTIONS
from tinybert_fast.testing.budgets import SLACK, assert_within_budget
from tinybert_fast.testing.operands import attention, dropout, leaves, normal

pytestmark = pytest.mark.skipif(
    dispatch.UNAVAILABLE["native"] is not None, reason=str(dispatch.UNAVAILABLE["native"])
)
BEYOND = (33, 0, 300, 1)  # a tile is 32 queries, a block of keys 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [1, 7, 16, 26, 64, 128])
def test_widths(width, dtype, isa):
    """Narrower than a vector, a whole number of them, and not; products of all heights."""
    case = attention((33, 150), 2, width, dtype=dtype, dropout_p=0.1)
    assert_within_budget(case, "native")


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_lengths_beyond_a_block(direction, dropout_p, isa):
    case = attention(BEYOND, 1, direction=direction, dropout_p=dropout_p)
    assert_within_budget(case, "native")


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_scores_that_grow_from_block_to_block(direction, isa):
    """What was summed before is scaled down, in the end by e^-40 and more."""
    case = attention((300,), 1, 16, direction=direction)
    q, k, _ = (x.detach() for x in case.operands)
    q[:, :, 0], k[:, 0, 0] = 4.0, torch.linspace(-40, 40, 300)
    assert_within_budget(case, "native", 2 * SLACK["attention"])


def test_drops_the_cells_of_the_reference(isa):
    """Of every sequence and head, over blocks of keys; with v = 1 probabilities are the output."""
    n, heads = 200, 2
    zero = torch.zeros(2, n, heads, n)
    v = torch.eye(n)[None, :, None].expand(2, n, heads, n)
    options = dropout(0.1)
    got, want = (ops.attention(zero, zero, v, **options, impl=i) for i in ("native", "reference"))
    assert torch.equal(got == 0, want == 0)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_strides(dtype):
    """Queries, keys and values of one tensor; heads apart; numbers apart; one row for all."""
    length, heads, width = 40, 3, 26
    mixed = normal((length, 3, heads, width), 1, dtype)
    by_head = normal((heads, length, width), 2, dtype).transpose(0, 1)
    apart = normal((length, heads, 2 * width), 3, dtype)[..., ::2]
    same = normal((1, heads, width), 4, dtype).expand(length, heads, width)
    layout = ops.SequenceLayout.from_lengths((9, 31))

    def run(operands, upstream):
        operands = [x.requires_grad_() for x in operands]
        out = ops.attention(*operands, layout=layout, **dropout(0.1), impl="native")
        return out, *torch.autograd.grad(out, operands, upstream)

    for operands in (mixed.unbind(1), (by_head, apart, same), (same, by_head, apart)):
        for upstream in (torch.ones((), dtype=dtype).expand(by_head.shape), apart):
            got = run([x.detach() for x in operands], upstream)
            want = run([x.detach().clone(memory_format=torch.contiguous_format) for x in operands],
                       upstream.contiguous())  # fmt: skip
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_threads_change_no_bit():
    case = attention(BEYOND, 3, dropout_p=0.1)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(case.run("native"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0.0, atol=0.0)


def test_nan_stays_in_its_sequence():
    q, k, v = (x.detach() for x in leaves(*((70, 1, 26),) * 3))
    k[50, 0, 3] = torch.nan
    layout = ops.SequenceLayout.from_lengths((40, 30))
    out = ops.attention(q, k, v, layout=layout, impl="native")
    assert out[:40].isfinite().all()
    assert out[40:].isnan().all()


def test_exponential(isa):
    from tinybert_fast import _native

    def exponential(x):
        out = torch.full_like(x, torch.nan)
        _native.exponential_cpu(x.data_ptr(), x.numel(), out.data_ptr())
        return out

    x = torch.cat([torch.linspace(-86, 88, 1_000_001), torch.linspace(-1, 1, 1_000_001)])
    exact = x.double().exp()
    assert ((exponential(x) - exact) / exact).abs().max() < 1.2e-7
    assert exponential(torch.zeros(1)).item() == 1.0
    far = torch.tensor([-torch.inf, -1e30, -200.0, -86.01])
    assert exponential(far).count_nonzero() == 0
    bits = torch.tensor([0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1], dtype=torch.int32)
    assert exponential(bits.view(torch.float32)).isnan().all()


def test_heads_without_numbers():
    x = torch.ones(1, 4, 2, 0)
    assert ops.attention(x, x, x, scale=1.0, impl="native").shape == x.shape
