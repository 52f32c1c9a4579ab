"""layer_norm: values and gradients, gradcheck, contract, compilation, refusal."""

import pytest
import torch
import torch.nn.functional as F

from tinybert_fast import ops
from tinybert_fast.ops.layer_norm import LIMITS
from tinybert_fast.testing import proofs
from tinybert_fast.testing.budgets import assert_within_budget
from tinybert_fast.testing.operands import DTYPES, layer_norm, normal

SHAPES = [
    (3, 312),  # TinyBERT-4
    (2, 2, 768),  # TinyBERT-6; two leading axes
    (5, 33),  # odd
    (1, 8),  # one row
    (3, 384),  # three tiles of a kernel
    (2, 1024),  # four, without padding
    (0, 312),  # no row
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, dtype, fast, device):
    assert_within_budget(layer_norm(shape, dtype=dtype, device=device, eps=0.1), fast)


def test_reference_is_the_definition():
    x, weight, bias = layer_norm((4, 7), dtype=torch.float64).operands
    want = F.layer_norm(x, (7,), weight, bias, 1e-12)
    torch.testing.assert_close(ops.layer_norm(x, weight, bias, impl="reference"), want)


def test_large_mean_keeps_its_digits(impl, device):
    """The variance is a mean of squares about the mean, not a difference of large numbers."""
    x = 1e4 + normal((2, 312), 0, device=device)
    want = F.layer_norm(x.double(), (312,), eps=1e-12).float()
    got = ops.layer_norm(x, torch.ones_like(x[0]), torch.zeros_like(x[0]), impl=impl)
    torch.testing.assert_close(got, want, rtol=0.0, atol=1e-3)


def test_gradients(exact, device):
    proofs.prove_gradient(layer_norm((3, 5), device=device), exact)


@pytest.mark.parametrize("shape", [(3, 5), (0, 5)], ids=str)
def test_contract(shape, fast, device):
    proofs.prove_contract(layer_norm(shape, device=device), fast)


def test_compiles_whole(fast, device):
    proofs.prove_compiles(layer_norm((2, 3, 312), device=device), fast)


def test_reference_gradient_under_a_fast_forward(fast, device):
    proofs.prove_pair(layer_norm(device=device), fast)


def test_constant_rows(fast, device):
    """No variance: the value is the bias, though eps=1e-12 makes the scale 1e6."""
    if fast == "torch" and device == "cuda":
        pytest.skip("PyTorch's own CUDA kernel misses this bound (H200, torch 2.11)")
    x = torch.tensor([[0.0], [0.1], [-7.3]], device=device).expand(3, 312).requires_grad_()
    bias = normal((312,), 1, device=device)
    y = ops.layer_norm(x, torch.ones_like(bias), bias, impl=fast)
    torch.testing.assert_close(y, bias.expand(3, -1), rtol=0.0, atol=1e-2)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("programs", [0, 1, 64, 150])
def test_second_stage_adds_every_program(programs, counted, device):
    """More programs than a GPU's kernel loads at a time, and none, as of no rows."""
    from tinybert_fast.kernels.rows import add_partials

    partial = normal((2, programs, 33), 0, device=device)
    narrow, wide = partial.new_empty(33, dtype=torch.float16), partial.new_empty(33)
    add_partials(partial, narrow, wide)
    torch.testing.assert_close(narrow, partial[0].sum(0).half())
    torch.testing.assert_close(wide, partial[1].sum(0))


def test_refuses():
    x, weight, bias = torch.ones(2, 3), torch.ones(3), torch.ones(3)
    with pytest.raises(ValueError, match=r"weight must have shape \(3,\).*got \(4,\)"):
        ops.layer_norm(x, torch.ones(4), bias)
    with pytest.raises(ValueError, match=r"bias must have shape \(3,\).*got \(1, 3\)"):
        ops.layer_norm(x, weight, bias[None])
    assert LIMITS.triton.refuses(columns=8192) is None
    assert "8193 numbers are wider than 8192" in LIMITS.triton.refuses(columns=8193)
