"""bias_gelu: values and gradients, gradcheck, contract, compilation, refusal."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.library import opcheck

from tinybert_fast import ops
from tinybert_fast.ops import dispatch
from tinybert_fast.testing import proofs
from tinybert_fast.testing.budgets import assert_within_budget
from tinybert_fast.testing.operands import DTYPES, bias_gelu, frozen_bias_gelu

SHAPES = [
    (3, 1200),  # TinyBERT-4
    (2, 2, 3072),  # TinyBERT-6; two leading axes
    (5, 33),  # odd: the tail of a vectorised loop
    (2500, 70),  # a kernel's programs walk several blocks of rows
    (0, 312),  # no row
]
PRODUCTS = [  # shape of the answer, and columns of x
    ((200, 1200), 312),  # TinyBERT-4; no multiple of a tile on any side
    ((2, 2, 3072), 768),  # TinyBERT-6; two leading axes
    ((256, 256), 128),  # multiples of tiles: of the interpreter's, of a GPU's
    ((1, 8), 8),  # the least that TMA loads
    ((5, 33), 31),  # rows that it doesn't
    ((0, 1200), 312),  # no row
]
HALF = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, fast, device):
    assert_within_budget(bias_gelu(shape, dtype=dtype, device=device), fast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "inputs"), PRODUCTS, ids=str)
@pytest.mark.parametrize("factory", [bias_gelu, frozen_bias_gelu])
def test_a_product_matches_reference(factory, shape, inputs, dtype, impl, device):
    assert_within_budget(factory(shape, inputs, dtype=dtype, device=device), impl)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_wide_bias_as_under_autocast(dtype, fast, device):
    """No worse than twice F.linear's way, which rounds the bias; its gradient stays fp32."""
    x, bias, grad = (torch.randn(s, device=device) for s in ((64, 312), (312,), (64, 312)))
    x, grad = x.to(dtype), grad.to(dtype)

    def run(function, *operands):
        leaves = [t.clone().requires_grad_() for t in operands]
        y = function(*leaves)
        return (y, *torch.autograd.grad(y, leaves, grad.to(y.dtype)))

    exact = run(lambda x, b: F.gelu(x + b), x.double(), bias.double())
    usual = run(lambda x, b: F.gelu(x + b.to(dtype)), x, bias)
    ours = run(lambda x, b: ops.bias_gelu(x, b, impl=fast), x, bias)
    assert [t.dtype for t in ours] == [dtype, dtype, torch.float32]
    for a, b, c in zip(ours, usual, exact, strict=True):
        assert (a - c).norm() <= 2 * (b - c).norm()


def test_reference_is_the_definition():
    x, bias = bias_gelu((4, 7), dtype=torch.float64).operands
    torch.testing.assert_close(ops.bias_gelu(x, bias, impl="reference"), F.gelu(x + bias))


def test_tails(impl, device):
    """Far from 0 the value is 0 or x, and the gradient 0 or 1; no inf * 0."""
    x = torch.tensor([[-1e4, -20.0, 20.0, 1e4]], device=device, requires_grad=True)
    y = ops.bias_gelu(x, torch.zeros(4, device=device), impl=impl)
    y.sum().backward()
    assert y.tolist() == [[0.0, 0.0, 20.0, 1e4]]
    assert x.grad.tolist() == [[0.0, 0.0, 1.0, 1.0]]


def test_infinity_and_nan(counted, device):
    """Of a product that overflowed: PyTorch makes NaN of the infinite too."""
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0]], dtype=torch.float16, device=device)
    y = ops.bias_gelu(x, torch.zeros(4, device=device), impl=counted)
    torch.testing.assert_close(y[0, :3], x[0, :3].clamp(min=0.0), equal_nan=True)


def test_gradients(exact, device):
    proofs.prove_gradient(bias_gelu((3, 5), device=device), exact)


@pytest.mark.parametrize("shape", [(3, 5), (0, 5)], ids=str)
def test_contract(shape, fast, device):
    proofs.prove_contract(bias_gelu(shape, device=device), fast)


def test_strides_are_what_the_fake_says(fast, device):
    case = bias_gelu((5, 8), device=device)
    x = case.operands[0].detach().t().contiguous().t().requires_grad_()
    proofs.prove_contract(replace(case, operands=(x, case.operands[1])), fast)


def test_compiles_whole(fast, device):
    proofs.prove_compiles(bias_gelu((2, 3, 312), device=device), fast)


def test_reference_gradient_under_a_fast_forward(fast, device):
    proofs.prove_pair(bias_gelu(device=device), fast)


@pytest.fixture
def settings(monkeypatch):
    """What linear_gelu was launched with, or None where it left a call to cuBLAS and bias_gelu."""
    from tinybert_fast.kernels import configs

    found, chosen = [], configs.linear_gelu

    def noted(*call):
        found.append(chosen(*call))
        return found[-1]

    monkeypatch.setattr(configs, "linear_gelu", noted)
    return found


def has_tma():
    return dispatch.INTERPRETED or 9 <= torch.cuda.get_device_capability()[0] < 12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_kernel_where_nobody_wants_a_gradient(counted, dtype, settings, device):
    case = bias_gelu((4, 64), 32, dtype=dtype, device=device)
    for name in case.names:
        case.freeze(*{*case.names} - {name}).run(counted)
    assert not settings, "a gradient needs the product"
    with torch.no_grad():
        case.function(counted)(*case.leaves())
    frozen_bias_gelu((4, 64), 32, dtype=dtype, device=device).run((counted, "reference"))
    assert [x is not None for x in settings] == [dtype in HALF and has_tma()] * 2
    settings.clear()
    for shape, inputs in (((4, 60), 32), ((4, 64), 36), ((0, 64), 32)):
        frozen_bias_gelu(shape, inputs, dtype=dtype, device=device).run(counted)
    assert settings == [None] * 3
    settings.clear()
    for impl in ("torch", "reference"):
        frozen_bias_gelu((4, 64), 32, dtype=dtype, device=device).run(impl)
    assert not settings


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_operands_that_tma_cannot_load_are_copied(counted, dtype, settings, device):
    """Other strides, and addresses between multiples of 16 bytes; with an fp32 bias."""
    x, bias, weight = frozen_bias_gelu((5, 64), 32, dtype=dtype, device=device).operands
    want = ops.bias_gelu(x, bias.float(), weight, impl=counted)

    def shifted(t):
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    for change in (shifted, lambda t: t.mT.contiguous().mT):
        got = ops.bias_gelu(change(x), bias.float(), change(weight), impl=counted)
        torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)
    assert [x is not None for x in settings] == [has_tma()] * 3


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_product_under_autocast(counted, dtype, settings, device):
    """fp32 operands are rounded, as F.linear does; the bias isn't."""
    x, bias, weight = frozen_bias_gelu((5, 64), 32, device=device).operands
    with torch.autocast(device, dtype):
        got = ops.bias_gelu(x, bias, weight, impl=counted)
    want = ops.bias_gelu(x.to(dtype), bias, weight.to(dtype), impl=counted)
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)
    assert [x is not None for x in settings] == [has_tma()] * 2


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_the_product_is_an_operator(counted, dtype, device):
    """Of whoever records or compiles, whole."""
    case, seen = frozen_bias_gelu((4, 64), 32, dtype=dtype, device=device), []
    proofs.prove_contract(case, counted)
    proofs.prove_compiles(case, counted)

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    proofs.prove_compiles(case, counted, backend=backend)
    assert torch.ops.tinybert_fast.linear_gelu_fwd.default in seen


def test_a_tangent_is_not_lost(impl, device):
    """In forward mode, where no operand requires a gradient."""
    x, bias, weight = frozen_bias_gelu((2, 16), 8, dtype=torch.float16, device=device).operands
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        if impl == "reference":
            y = ops.bias_gelu(dual, bias, weight, impl=impl)
            assert forward_ad.unpack_dual(y).tangent is not None
        else:
            with pytest.raises(NotImplementedError, match="jvp"):
                ops.bias_gelu(dual, bias, weight, impl=impl)


@pytest.mark.parametrize("shape", [(3, 1200), (2500, 70), (0, 312)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_in_place_of_its_gradient(shape, dtype, counted, device):
    """The same gradients, bit for bit; and the forward's answer where the gradient was."""
    operators = torch.ops.tinybert_fast
    x, bias = (t.detach() for t in bias_gelu(shape, dtype=dtype, device=device).operands)
    grad = torch.randn(shape, device=device).to(dtype)
    want = operators.bias_gelu_bwd(grad, x, bias, counted)
    got = operators.bias_gelu_bwd_in_place(grad, x, bias, counted)
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))
    assert torch.equal(grad, ops.bias_gelu(x, bias, impl=counted))
    opcheck(operators.bias_gelu_bwd_in_place.default, (grad, x, bias, counted))


def test_refuses():
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\).*got \(1,\)"):
        ops.bias_gelu(torch.ones(2, 3), torch.ones(1))
    x, bias, weight = torch.ones(2, 3), torch.ones(4), torch.ones(4, 3)
    for wrong, message in (
        ((x, bias, weight.mT), r"weight must be \(C, 3\) in torch.float32.*got \(3, 4\)"),
        ((x, bias, weight.double()), r"weight must be .*got \(4, 3\) in torch.float64"),
        ((x, torch.ones(3), weight), r"bias must have shape \(4,\).*got \(3,\)"),
        ((x, bias, weight.to("meta")), "weight is on meta"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.bias_gelu(*wrong)
