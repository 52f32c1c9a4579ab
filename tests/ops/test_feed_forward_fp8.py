"""feed_forward_fp8: its definition, what rounding costs, kernels against it, contract, refusal."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from tinybert_fast import ops
from tinybert_fast.ops import dispatch
from tinybert_fast.ops.feed_forward_fp8 import why_not
from tinybert_fast.reference.feed_forward_fp8 import E4M3, LARGEST, rounded
from tinybert_fast.testing.operands import DTYPES, normal

OP = "feed_forward_fp8"
SHAPES = [  # leading axes, K, F
    ((200,), 768, 3072),  # BERT-base; rows that fill no tile
    ((2, 5), 320, 1200),  # two leading axes; columns that fill no tile
    ((1,), 16, 16),  # the least that TMA loads
    ((0,), 768, 3072),  # no row
]
ROUNDED = 0.05  # of y, for normal operands: what e4m3 changes at most
FLIPPED = 0.01  # of y: what lies between two numbers of e4m3, rounded to either; and to bf16


def linears(width, hidden, dtype=torch.float32, device="cpu"):
    """W1, b1, W2, b2 of a block that keeps the width."""
    shapes = ((hidden, width), (hidden,), (width, hidden), (width,))
    first, *biases_and_second = (
        normal(shape, seed, dtype, device) for seed, shape in enumerate(shapes, start=1)
    )
    bias, second, last = biases_and_second
    return first * width**-0.5, bias, second * hidden**-0.5, last


def operands(lead, width, hidden, dtype=torch.float32, device="cpu"):
    weights = ops.Fp8Weights.of(*linears(width, hidden, torch.float32, device))
    return normal((*lead, width), 0, dtype, device), weights


def exact(x, width, hidden):
    first, bias, second, last = linears(width, hidden, torch.float64, x.device)
    return F.linear(F.gelu(F.linear(x.double(), first, bias)), second, last)


def apart(y, truth):
    return ((y.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.parametrize(("lead", "width", "hidden"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rounding_costs_a_few_percent(lead, width, hidden, dtype):
    x, weights = operands(lead, width, hidden, dtype)
    y = ops.feed_forward_fp8(x, weights, impl="reference")
    assert (y.shape, y.dtype) == ((*lead, width), dtype)
    if x.numel() > width:
        assert 0.01 < apart(y, exact(x, width, hidden)) < ROUNDED


def test_rounding_is_its_definition():
    """Each row's largest number is 448; none is further off than half a step of e4m3."""
    x = normal((64, 100), 0, torch.float64)
    x[3], x[5, 7] = 0.0, 1e6
    rows, scale = rounded(x)
    q = rows.double()
    assert q.abs().amax(1).tolist() == [LARGEST if i != 3 else 0.0 for i in range(64)]
    step = torch.maximum(x.abs() * 2.0**-4, (scale * 2.0**-10)[:, None])
    assert ((q * scale[:, None] - x).abs() <= step * (1 + 1e-12)).all()


def test_the_definition_step_by_step():
    x, weights = operands((7,), 32, 48, torch.float64)
    first = weights.inner.double() * weights.inner_scale.double()[:, None]
    second = weights.outer.double() * weights.outer_scale.double()[:, None]
    assert weights.reach[0].item() == pytest.approx(first.norm(dim=1).max().item(), rel=1e-6)
    assert weights.reach[1] == weights.inner_bias.abs().max()
    rows, scale = rounded(x)
    u = (rows.double() * scale[:, None]) @ first.mT + weights.inner_bias
    bound = 1.07 * x.norm(dim=1) * weights.reach[0] + weights.reach[1]
    assert (u.abs() <= bound[:, None]).all()
    g = (F.gelu(u) * (448 / bound)[:, None]).to(E4M3).double() * (bound / 448)[:, None]
    want = g @ second.mT + weights.outer_bias
    got = ops.feed_forward_fp8(x, weights, impl="reference")
    assert apart(got, want) < 1e-6


def longest_row(width, hidden, dtype, device="cpu"):
    """x along the longest row of W1, with the largest bias there: |u| comes as near to its bound as
    it can."""
    first, bias, second, last = linears(width, hidden, torch.float32, device)
    row = first.norm(dim=1).argmax()
    bias[row] = 3 * bias.abs().max()
    x = (first[row] * 40.0).to(dtype).expand(4, width)
    return x, (first, bias, second, last)


def test_nothing_passes_the_bound():
    x, block = longest_row(64, 128, torch.float32)
    y = ops.feed_forward_fp8(x, ops.Fp8Weights.of(*block), impl="reference")
    first, bias, second, last = block
    assert apart(y, F.linear(F.gelu(F.linear(x, first, bias)), second, last)) < ROUNDED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_each_other(impl, dtype, device):
    x, weights = operands((7,), 64, 128, dtype, device)
    spoilt = x.clone()
    spoilt[3] *= 1e3
    spoilt[4] = 0.0
    spoilt[5, 0], spoilt[6, 1] = torch.nan, torch.inf
    want, got = (ops.feed_forward_fp8(rows, weights, impl=impl) for rows in (x, spoilt))
    assert torch.equal(got[:3], want[:3])
    assert got[3:5].isfinite().all()
    assert got[5:].isnan().all()
    bias = ops.feed_forward_fp8(torch.zeros_like(x), weights, impl=impl)
    assert torch.equal(got[4], bias[4])


@pytest.fixture
def kernels(monkeypatch):
    """The module of the kernels, in an interpreter that rounds to e4m3 as PyTorch does: its own
    conversion loses a carry."""
    import triton.language as tl
    from triton.runtime import interpreter

    from tinybert_fast.kernels import feed_forward_fp8

    kinds = {tl.float8e4nv: E4M3, tl.float16: torch.float16, tl.float32: torch.float32}
    own = interpreter._convert_float

    def convert(numbers, given, wanted, rounding_mode):
        if tl.float8e4nv not in (given, wanted):
            return own(numbers, given, wanted, rounding_mode)
        found = torch.from_numpy(np.ascontiguousarray(numbers)).view(kinds[given])
        found = found.to(kinds[wanted])
        kind = {1: np.uint8, 2: np.uint16, 4: np.uint32}[found.itemsize]
        return np.frombuffer(found.view(torch.uint8).numpy().tobytes(), kind).reshape(numbers.shape)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    return feed_forward_fp8


interpreted = pytest.mark.skipif(not dispatch.INTERPRETED, reason="runs in Triton's interpreter")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("lead", "width", "hidden"), [((70,), 320, 80), *SHAPES[2:]], ids=str)
def test_interpreted_triton_matches_the_reference(lead, width, hidden, dtype, kernels):
    x, weights = operands(lead, width, hidden, dtype)
    got = kernels.forward(x, *weights)
    want = ops.feed_forward_fp8(x, weights, impl="reference")
    assert (got.shape, got.dtype) == (want.shape, dtype)
    if x.numel():
        assert apart(got, want) < FLIPPED


@interpreted
def test_interpreted_triton_rounds_as_the_reference(kernels):
    x, weights = operands((70,), 768, 16)
    x[3], x[5, 7], x[6, 0] = 0.0, 1e6, torch.nan
    rows, scale, _ = kernels.rounded(x, weights.reach)
    want, wanted_scale = rounded(x)
    same = [i for i in range(70) if i != 6]
    assert torch.equal(rows[same].view(torch.uint8), want[same].view(torch.uint8))
    torch.testing.assert_close(scale[same], wanted_scale[same])
    assert rows[6, 0].isnan()


@interpreted
def test_interpreted_triton_passes_no_bound(kernels):
    x, block = longest_row(64, 128, torch.float32)
    weights = ops.Fp8Weights.of(*block)
    got = kernels.forward(x, *weights)
    assert apart(got, ops.feed_forward_fp8(x, weights, impl="reference")) < FLIPPED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("lead", "width", "hidden"), SHAPES, ids=str)
def test_matches_the_reference(lead, width, hidden, counted, dtype, device):
    x, weights = operands(lead, width, hidden, dtype, device)
    got = ops.feed_forward_fp8(x, weights, impl=counted)
    want = ops.feed_forward_fp8(x, weights, impl="reference")
    assert (got.shape, got.dtype) == (want.shape, dtype)
    if x.numel():
        assert apart(got, want) < FLIPPED


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contract(counted, dtype, device):
    x, weights = operands((5,), 64, 128, dtype, device)
    operator = torch.ops.tinybert_fast.feed_forward_fp8_fwd.default
    proofs = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(operator, (x, *weights, counted), test_utils=proofs)
    # That no operand is written, by bytes: opcheck's proof multiplies, which no GPU does in e4m3.
    before = [operand.view(torch.uint8).clone() for operand in (x, *weights)]
    y = operator(x, *weights, counted)
    for operand, bytes_before in zip((x, *weights), before, strict=True):
        assert torch.equal(operand.view(torch.uint8), bytes_before)
        assert y.untyped_storage().data_ptr() != operand.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_compiles_whole(counted, dtype, device):
    x, weights = operands((5,), 64, 128, dtype, device)
    call = torch.compile(ops.feed_forward_fp8, fullgraph=True, dynamic=False)
    want = ops.feed_forward_fp8(x, weights, impl=counted)
    torch.testing.assert_close(call(x, weights, impl=counted), want, rtol=0.0, atol=0.0)


def test_under_autocast(device):
    x, weights = operands((5,), 64, 128, torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        got = ops.feed_forward_fp8(x, weights, impl="reference")
    want = ops.feed_forward_fp8(x.bfloat16(), weights, impl="reference")
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("capability", "message"),
    [((9, 0), None), ((10, 0), None), ((8, 9), "this GPU is sm_89"), ((12, 0), "sm_120")],
)
def test_which_gpus_multiply_e4m3(capability, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = why_not(torch.device("cuda"))
    assert reason is None if message is None else message in reason
    assert "on GPUs, not on cpu" in why_not(torch.device("cpu"))


def test_refuses():
    x, weights = operands((5,), 32, 48)
    for change, message in (
        ({"inner": weights.inner.float()}, r"inner must be \(48, 32\) in torch.float8_e4m3fn .*"),
        ({"outer": weights.outer[:, :16]}, r"outer must be \(32, 48\) .*got \(32, 16\)"),
        ({"inner_bias": weights.inner_bias[1:]}, r"inner_bias must be \(48,\) .*got \(47,\)"),
        ({"reach": weights.reach[:1]}, r"reach must be \(2,\)"),
        ({"outer_scale": weights.outer_scale.to("meta")}, "outer_scale is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.feed_forward_fp8(x, weights._replace(**change))
    with pytest.raises(ValueError, match="has no gradient, and an operand requires one"):
        ops.feed_forward_fp8(x.clone().requires_grad_(), weights)
    with pytest.raises(ValueError, match="feed_forward_fp8 has no torch implementation"):
        ops.feed_forward_fp8(x, weights, impl="torch")
    limit = dispatch.OPS[OP].triton
    assert "not all multiples of 16" in limit.refuses(widths=(32, 40, 32))
    assert limit.refuses(widths=(32, 48, 32)) is None
