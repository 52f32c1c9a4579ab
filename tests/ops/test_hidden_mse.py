"""hidden_mse: values and gradients, gradcheck, contract, compilation, refusal."""

import pytest
import torch
import torch.nn.functional as F

from tinybert_fast import ops
from tinybert_fast.testing import proofs
from tinybert_fast.testing.budgets import assert_within_budget
from tinybert_fast.testing.operands import DTYPES, hidden_mse

SHAPES = [
    ((7,), 312, 768),  # TinyBERT-4 under BERT-base, packed
    ((2, 3), 312, 768),  # the same, padded
    ((5,), 33, 17),  # odd
    ((1,), 1, 1),
    ((0,), 312, 768),  # no token: loss 0
]
PROJECTIONS = ["none", "weight", "bias"]


def case_of(shape, projection, **like):
    rows, columns, teacher_columns = shape
    width = columns if projection == "none" else teacher_columns
    return hidden_mse(rows, columns, width, projection=projection, **like)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, projection, dtype, fast, device):
    assert_within_budget(case_of(shape, projection, dtype=dtype, device=device), fast)


def test_reference_is_the_definition():
    student, teacher, weight, bias = hidden_mse((2, 3), 5, 7, dtype=torch.float64).operands
    want = F.mse_loss(F.linear(student, weight, bias), teacher)
    got = ops.hidden_mse(student, teacher, weight, bias, impl="reference")
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_gradients(projection, exact, device):
    proofs.prove_gradient(case_of(((2, 3), 5, 4), projection, device=device), exact)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("rows", [3, 0])
def test_contract(rows, projection, fast, device):
    proofs.prove_contract(case_of(((rows,), 5, 4), projection, device=device), fast)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_chunks(projection, counted, device, monkeypatch):
    """Two rows at a time and one that is left."""
    from tinybert_fast.kernels import configs

    monkeypatch.setattr(configs, "L2_BYTES", 2 * 17 * 4)
    assert_within_budget(case_of(((5,), 33, 17), projection, device=device), counted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_are_not_rounded(dtype, counted, device, monkeypatch):
    """Errors of 33 and students of 65: fp16 and bf16 hold both, and not their product, 2145."""
    from tinybert_fast.kernels import configs

    rows, columns = 4, 16
    monkeypatch.setattr(configs, "L2_BYTES", 2 * columns * 2)  # chunks of two rows
    student = torch.full((rows, columns), 65.0, dtype=dtype, device=device)
    teacher = torch.full_like(student, -33.0)
    weight = torch.zeros(columns, columns, device=device, requires_grad=True)
    ops.hidden_mse(student, teacher, weight, impl=counted).backward()
    want = torch.full_like(weight, 2.0 / teacher.numel() * rows * 33.0 * 65.0)
    torch.testing.assert_close(weight.grad, want, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_compiles_whole(projection, fast, device):
    proofs.prove_compiles(case_of(((2, 3), 33, 17), projection, device=device), fast)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_reference_gradient_under_a_fast_forward(projection, fast, device):
    proofs.prove_pair(case_of(SHAPES[0], projection, device=device), fast)


def test_refuses():
    student, teacher, weight, bias = hidden_mse((2,), 3, 4).operands
    with pytest.raises(ValueError, match=r"does not give the teacher's \(2, 4\)"):
        ops.hidden_mse(student, teacher)
    with pytest.raises(ValueError, match=r"student \(1, 3\) projected by \(4, 3\)"):
        ops.hidden_mse(student[:1], teacher, weight)
    with pytest.raises(ValueError, match=r"weight must be \(teacher width, student width\)"):
        ops.hidden_mse(student, teacher, weight.mT)
    with pytest.raises(ValueError, match="got a bias alone"):
        ops.hidden_mse(student, student, bias=bias)
    with pytest.raises(ValueError, match=r"bias must be \(4,\), the teacher's width; got \(1,\)"):
        ops.hidden_mse(student, teacher, weight, bias[:1])
