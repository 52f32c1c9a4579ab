"""embedding_layer_norm: values and gradients, contract, compilation, dropout, refusal."""

import pytest
import torch
import torch.nn.functional as F

from tinybert_fast import ops
from tinybert_fast.testing import proofs
from tinybert_fast.testing.budgets import assert_within_budget
from tinybert_fast.testing.operands import DTYPES, Case, dropout, embedding_layer_norm, normal

SHAPES = [
    (9, 312),  # TinyBERT-4; words repeat
    (5, 768),  # TinyBERT-6
    (1, 33),  # one token, odd width
    (7, 8),  # one narrow tile of a kernel
    (0, 312),  # no token
]
VARIANTS = [{}, {"padding_idx": None}, {"dropout_p": 0.25}]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("padding_idx", [0, None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, padding_idx, dtype, fast, device):
    case = embedding_layer_norm(*shape, dtype=dtype, device=device, padding_idx=padding_idx)
    assert_within_budget(case.with_options(eps=0.1), fast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference_dropping(shape, dtype, counted, device):
    """One mask on both sides: in the value, and drawn again in each gradient."""
    case = embedding_layer_norm(*shape, dropout_p=0.1, dtype=dtype, device=device, eps=0.1)
    assert_within_budget(case, counted)


@pytest.mark.parametrize("types", [1, 3])
def test_token_types(types, impl, device):
    """One type gets every row's gradient. The kernels sum up to two, and refuse more."""
    operands = list(embedding_layer_norm(device=device).operands)
    operands[1] = torch.arange(len(operands[0]), device=device) % types
    operands[5] = normal((types, 312), 7, device=device).requires_grad_()
    case = Case(ops.embedding_layer_norm, tuple(operands))
    if impl == "triton" and types > 2:
        with pytest.raises(ValueError, match="a token-type table of 3 rows has more than 2"):
            case.run(impl)
    elif impl != "reference":
        assert_within_budget(case, impl)


def test_reference_is_the_definition():
    operands = embedding_layer_norm(columns=7, dtype=torch.float64).operands
    ids, types, positions, word, position, token_type, weight, bias = operands
    total = word[ids] + position[positions] + token_type[types]
    want = F.layer_norm(total, (7,), weight, bias, 1e-12)
    torch.testing.assert_close(ops.embedding_layer_norm(*operands, impl="reference"), want)


@pytest.mark.same_mask
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_gradients(dropout_p, exact, device):
    case = embedding_layer_norm(5, 4, dropout_p=dropout_p, device=device, padding_idx=None)
    proofs.prove_gradient(case, exact)


def test_padding_word_gets_no_gradient(impl, device):
    """Row 0 occurs in the batch: zero with padding_idx=0, not without; the other rows agree."""
    case = embedding_layer_norm(device=device)
    without = case.with_options(padding_idx=None).run(impl)["dword"]
    dword = case.run(impl)["dword"]
    assert dword[0].count_nonzero() == 0 < without[0].count_nonzero()
    assert torch.equal(dword[1:], without[1:])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("tokens", [5, 0])
def test_contract(tokens, variant, fast, device):
    proofs.prove_contract(embedding_layer_norm(tokens, 4, device=device, **variant), fast)


@pytest.mark.same_mask
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_compiles_whole(variant, fast, device):
    proofs.prove_compiles(embedding_layer_norm(5, 33, device=device, **variant), fast)


def test_reference_gradient_under_a_fast_forward(fast, device):
    proofs.prove_pair(embedding_layer_norm(device=device), fast)


def test_cells_are_dropped_or_scaled(impl, device):
    case = embedding_layer_norm(40, device=device)
    plain = case.run(impl)["value"]
    value = case.with_options(**dropout(0.1, device=device)).run(impl)["value"]
    gone, scale = value == 0, 256 / (256 - 26)
    torch.testing.assert_close(value[~gone], (plain * scale)[~gone])
    rate, expected = gone.double().mean(), 26 / 256
    assert abs(rate - expected) < 5 * (expected * (1 - expected) / gone.numel()) ** 0.5


@pytest.mark.same_mask
def test_dropout_is_a_function_of_seed_and_site(impl, device):
    case = embedding_layer_norm(device=device, dropout_p=0.25)
    other = {"site": 4}, {"seed": case.options["seed"] + 1}
    want = case.run(impl)["value"]
    assert torch.equal(case.run(impl)["value"], want)
    assert all(not torch.equal(case.with_options(**o).run(impl)["value"], want) for o in other)


def test_drops_the_cells_of_the_reference(counted, device):
    case = embedding_layer_norm(dropout_p=0.1, device=device)
    value, want = (case.run(impl)["value"] for impl in (counted, "reference"))
    assert torch.equal(value != 0, want != 0)


def test_reference_drops_by_sequence_and_rank():
    """Without a layout the T tokens are one sequence; in two, the first keeps its mask."""
    case = embedding_layer_norm(dropout_p=0.25)
    one, two = (
        case.with_options(layout=ops.SequenceLayout.from_lengths(lengths)).run("reference")["value"]
        for lengths in ((9,), (4, 5))
    )
    assert torch.equal(one, case.run("reference")["value"])
    assert torch.equal(one[:4], two[:4])
    assert not torch.equal(one[4:], two[4:])


def test_refuses():
    operands = embedding_layer_norm(columns=6).operands
    op = ops.embedding_layer_norm

    def changed(index, value):
        return (*operands[:index], value, *operands[index + 1 :])

    with pytest.raises(ValueError, match=r"one shape \(T,\); got \(9,\), \(8,\), \(9,\)"):
        op(*changed(2, operands[2][:8]))
    with pytest.raises(ValueError, match=r"one shape \(T,\); got \(1, 9\)"):
        op(operands[0][None], *operands[1:])
    with pytest.raises(ValueError, match=r"share their width; got \(11, 6\), \(9, 5\), \(2, 6\)"):
        op(*changed(4, operands[4][:, :5]))
    with pytest.raises(ValueError, match=r"bias must have shape \(6,\).*got \(5,\)"):
        op(*changed(7, operands[7][:5]))
    with pytest.raises(ValueError, match=r"layout describes leading sizes \(3,\); got \(9, 1\)"):
        op(*operands, layout=ops.SequenceLayout.from_lengths((3,)))
    with pytest.raises(ValueError, match="dropout_p=2 cannot be expressed"):
        op(*operands, dropout_p=2, seed=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="padding_idx=11 is not a row of word"):
        op(*operands, padding_idx=11)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_id_outside_its_table(index, on_cpu):
    operands = list(embedding_layer_norm(columns=6).operands)
    operands[index] = operands[index].clone()
    operands[index][3] = 1000
    with pytest.raises(IndexError):
        ops.embedding_layer_norm(*operands, impl=on_cpu)
