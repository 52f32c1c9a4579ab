"""soft_cross_entropy: values and gradients, gradcheck, contract, compilation, refusal."""

import pytest
import torch
import torch.nn.functional as F

from tinybert_fast import ops
from tinybert_fast.testing import proofs
from tinybert_fast.testing.budgets import assert_within_budget
from tinybert_fast.testing.operands import DTYPES, soft_cross_entropy

SHAPES = [
    (4, 3),  # MNLI
    (1, 1),  # one class: loss 0, gradient 0
    (5, 101),
    (0, 3),  # no example: loss 0
]
OPTIONS = [
    {},
    {"temperature": 2.0, "reduction": "official"},
    {"temperature": 3.0, "form": "kl"},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, options, dtype, fast, device):
    assert_within_budget(soft_cross_entropy(*shape, dtype=dtype, device=device, **options), fast)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_reference_is_the_definition(temperature):
    """The paper's is PyTorch's cross-entropy of soft labels; the released code's is 1/K of it."""
    case = soft_cross_entropy(dtype=torch.float64, temperature=temperature)
    student, teacher = case.operands
    want = F.cross_entropy(student / temperature, (teacher / temperature).softmax(-1))
    torch.testing.assert_close(case.function("reference")(student), want)
    official = case.with_options(reduction="official").function("reference")(student)
    log_probabilities = F.log_softmax(student / temperature, -1)
    likelihood = -F.softmax(teacher / temperature, -1) * log_probabilities
    torch.testing.assert_close(official, likelihood.mean())
    divergence = F.kl_div(
        log_probabilities, F.softmax(teacher / temperature, -1), reduction="batchmean"
    )
    kl = case.with_options(form="kl").function("reference")(student)
    torch.testing.assert_close(kl, temperature**2 * divergence)


@pytest.mark.parametrize("form", ["cross_entropy", "kl"])
def test_large_logits(form, impl):
    """No overflow, no inf - inf: the softmax is shifted by its maximum."""
    student = torch.tensor([[1e4, -1e4], [0.0, 3e38]], requires_grad=True)
    loss = ops.soft_cross_entropy(student, student.detach().clone(), form=form, impl=impl)
    loss.backward()
    assert loss.item() == 0.0
    assert student.grad.count_nonzero() == 0


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients(options, impl, device):
    proofs.prove_gradient(soft_cross_entropy(device=device, **options), impl)


@pytest.mark.parametrize("batch", [4, 0])
def test_contract(batch, fast, device):
    proofs.prove_contract(soft_cross_entropy(batch, device=device), fast)


def test_compiles_whole(fast, device):
    proofs.prove_compiles(soft_cross_entropy(device=device, temperature=2.0), fast)


def test_reference_gradient_under_a_fast_forward(fast, device):
    proofs.prove_pair(soft_cross_entropy(device=device), fast)


def test_refuses():
    logits = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"student \(2, 3\) and teacher \(3, 2\)"):
        ops.soft_cross_entropy(logits, logits.mT)
    with pytest.raises(ValueError, match=r"must be \(batch, classes\)"):
        ops.soft_cross_entropy(logits[0], logits[0])
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive"):
            ops.soft_cross_entropy(logits, logits, temperature=temperature)
    with pytest.raises(ValueError, match="reduction='sum' is not one of batch, official"):
        ops.soft_cross_entropy(logits, logits, reduction="sum")
    with pytest.raises(ValueError, match="form='js' is not one of cross_entropy, kl"):
        ops.soft_cross_entropy(logits, logits, form="js")
