"""bias_gelu: values and gradients, gradcheck, contract, compilation, refusal."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tinybert_fast import ops
from tinybert_fast.testing import proofs
from tinybert_fast.testing.budgets import assert_within_budget
from tinybert_fast.testing.operands import DTYPES, bias_gelu

SHAPES = [
    (3, 1200),  # TinyBERT-4
    (2, 2, 3072),  # TinyBERT-6; two leading axes
    (5, 33),  # odd: the tail of a vectorised loop
    (2500, 70),  # a kernel's programs walk several blocks of rows
    (0, 312),  # no row
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, fast, device):
    assert_within_budget(bias_gelu(shape, dtype=dtype, device=device), fast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
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


def test_refuses():
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\).*got \(1,\)"):
        ops.bias_gelu(torch.ones(2, 3), torch.ones(1))
