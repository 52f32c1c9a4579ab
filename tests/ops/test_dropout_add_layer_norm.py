"""dropout_add_layer_norm: values and gradients, contract, compilation, dropout, refusal."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tinybert_fast import ops
from tinybert_fast.ops.dropout_add_layer_norm import LIMITS
from tinybert_fast.reference.philox import hidden_keep
from tinybert_fast.testing import proofs
from tinybert_fast.testing.budgets import assert_within_budget
from tinybert_fast.testing.operands import DTYPES, dropout, dropout_add_layer_norm, normal

SHAPES = [
    (3, 312),  # TinyBERT-4
    (2, 2, 768),  # TinyBERT-6; two leading axes
    (5, 33),  # odd
    (1, 8),  # one row
    (3, 1024),  # four tiles of a kernel, without padding
    (0, 312),  # no row
]
VARIANTS = [{}, {"with_bias": False}, {"dropout_p": 0.25}, {"with_bias": False, "dropout_p": 0.25}]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, with_bias, dtype, fast, device):
    case = dropout_add_layer_norm(shape, with_bias=with_bias, dtype=dtype, device=device)
    assert_within_budget(case.with_options(eps=0.1), fast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference_dropping(shape, with_bias, dtype, counted, device):
    """One mask on both sides: in the value, and drawn again in each gradient."""
    case = dropout_add_layer_norm(
        shape, with_bias=with_bias, dropout_p=0.1, dtype=dtype, device=device, eps=0.1
    )
    assert_within_budget(case, counted)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(6, 8), (2, 3, 8)], ids=str)
def test_branch_and_residual_accumulate_apart(shape, with_bias, impl, device):
    """Without dropout they have one gradient, which both may want to keep."""
    case = dropout_add_layer_norm(shape, with_bias=with_bias, device=device)
    proofs.prove_accumulates(case, impl)
    if not with_bias:
        torch._dynamo.reset()
        proofs.prove_accumulates(case, impl, partial(torch.compile, fullgraph=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_branch_in_half_precision_beside_a_wider_residual(dropout_p, counted, device):
    case = dropout_add_layer_norm((5, 312), dropout_p=dropout_p, device=device)
    case = case.narrowed("x", dtype=torch.float16)
    assert_within_budget(case, counted)
    assert case.run(counted)["dx"].dtype == torch.float16


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_deterministic_over_many_rows(dropout_p, counted, device):
    """Each program adds several blocks of rows, and the second stage several programs."""
    case = dropout_add_layer_norm((70, 33), dropout_p=dropout_p, device=device)
    first, second = case.run(counted), case.run(counted)
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


def test_reference_is_the_definition():
    case = dropout_add_layer_norm((4, 7), dtype=torch.float64)
    x, bias, residual, weight, ln_bias = case.operands
    want = F.layer_norm(residual + x + bias, (7,), weight, ln_bias, 1e-12)
    torch.testing.assert_close(case.run("reference")["value"], want)


@pytest.mark.same_mask
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_gradients(variant, exact, device):
    proofs.prove_gradient(dropout_add_layer_norm((3, 5), **variant, device=device), exact)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (0, 5)], ids=str)
def test_contract(shape, variant, fast, device):
    proofs.prove_contract(dropout_add_layer_norm(shape, **variant, device=device), fast)


@pytest.mark.same_mask
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_compiles_whole(variant, fast, device):
    proofs.prove_compiles(dropout_add_layer_norm((2, 3, 33), **variant, device=device), fast)


@pytest.mark.parametrize("with_bias", [True, False])
def test_reference_gradient_under_a_fast_forward(with_bias, fast, device):
    proofs.prove_pair(dropout_add_layer_norm(with_bias=with_bias, device=device), fast)


def dropped(impl, device, dropout_p=0.1, **options):
    """dropout(1) of 40 rows, read off a layer norm whose eps makes it linear."""
    rows, columns = 40, 312
    x, zero = torch.ones(rows, columns, device=device), torch.zeros(rows, columns, device=device)
    options = {**dropout(dropout_p, device=device), **options}
    # The variance is lost beside eps: y = (dropout(x) - its row's mean) / 1e3.
    y = ops.dropout_add_layer_norm(x, None, zero, x[0], zero[0], eps=1e6, impl=impl, **options)
    return 1e3 * (y - y.min(-1, keepdim=True).values)


def test_cells_are_dropped_or_scaled(impl, device):
    cells = dropped(impl, device)
    scale = 256 / (256 - 26)  # the exact rate of 0.1 in 8 bits
    assert ((cells.abs() < 1e-3) | ((cells - scale).abs() < 1e-3)).all()
    rate, expected = (cells < 0.5).double().mean(), 26 / 256
    assert abs(rate - expected) < 5 * (expected * (1 - expected) / cells.numel()) ** 0.5


@pytest.mark.same_mask
def test_dropout_is_a_function_of_seed_and_site(impl, device):
    cells = dropped(impl, device)
    assert torch.equal(cells, dropped(impl, device))
    assert not torch.equal(cells, dropped(impl, device, site=4))
    for word in (0, 1):  # both words of the seed count, to their last bits
        for bit in (0, 62):
            seed = dropout(0.1, device=device)["seed"].clone()
            seed[word] ^= 1 << bit
            assert not torch.equal(cells, dropped(impl, device, seed=seed))


@pytest.mark.parametrize("columns", [33, 312])
@pytest.mark.parametrize("dropout_p", [0.1, 0.75])
def test_drops_the_cells_of_the_reference(dropout_p, columns, counted, device):
    """Cell for cell, in the value and in dx, through a layout with an empty sequence."""
    layout = ops.SequenceLayout.from_lengths((5, 2, 0, 7), width=9, device=device)
    options = {**dropout(dropout_p, device=device), "layout": layout}
    keep = hidden_keep(
        options["seed"], options["site"], layout.sequences, layout.positions, columns, dropout_p
    )
    # x towers over the residual: what is kept is far from the mean of what is dropped.
    x = torch.full((layout.total, columns), 100.0, device=device, requires_grad=True)
    residual, ones = normal(x.shape, 1, device=device), torch.ones(columns, device=device)
    y = ops.dropout_add_layer_norm(x, None, residual, ones, 0 * ones, impl=counted, **options)
    assert torch.equal(y > y.mean(-1, keepdim=True), keep)
    (dx,) = torch.autograd.grad(y, x, normal(y.shape, 2, device=device))
    assert torch.equal(dx != 0, keep)


def test_reference_drops_the_same_cells_packed_and_padded():
    """Bit for bit: a cell's fate depends on sequence, rank and column, not on the layout."""
    layout = ops.SequenceLayout.from_lengths((5, 2, 0, 7), width=9)
    x, residual = (normal((4, 9, 312), seed) for seed in (0, 1))
    vectors = (normal((312,), 2), normal((312,), 3))
    options = {**dropout(0.3), "impl": "reference"}
    padded = ops.dropout_add_layer_norm(x, None, residual, *vectors, **options)
    packed = ops.dropout_add_layer_norm(
        layout.pack(x), None, layout.pack(residual), *vectors, layout=layout, **options
    )
    assert torch.equal(layout.pack(padded), packed)


def test_refuses():
    x, c = torch.ones(2, 3), torch.ones(3)
    seed = torch.zeros(2, dtype=torch.int64)
    op = ops.dropout_add_layer_norm
    with pytest.raises(ValueError, match=r"x \(2, 3\) and residual \(3, 2\) must have one shape"):
        op(x, c, x.mT, c, c)
    for bad in ({"bias": x}, {"weight": x}, {"ln_bias": x}):
        (name,) = bad
        with pytest.raises(ValueError, match=rf"{name} must have shape \(3,\).*got \(2, 3\)"):
            op(x, residual=x, **{"bias": c, "weight": c, "ln_bias": c, **bad})
    for rate in (0.001, 0.999, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="above 1/512 and below 1 - 1/512"):
            op(x, c, x, c, c, dropout_p=rate, seed=seed)
    for wrong in (None, seed.int(), seed[:1]):
        with pytest.raises(ValueError, match=r"a contiguous int64 tensor of shape \(2,\); got"):
            op(x, c, x, c, c, dropout_p=0.1, seed=wrong)
    layout = ops.SequenceLayout.from_lengths((1, 2))
    with pytest.raises(ValueError, match=r"layout describes leading sizes \(3,\); got \(2, 3\)"):
        op(x, c, x, c, c, layout=layout)
    with pytest.raises(ValueError, match="another mask than the reference's gradient"):
        op(x, c, x, c, c, dropout_p=0.1, seed=seed, impl=("torch", "reference"))


def test_refuses_mixed_devices_and_fp64_beside_fp32():
    x, _, residual, weight, ln_bias = dropout_add_layer_norm().operands

    def refuses(match, *operands, **options):
        with pytest.raises(ValueError, match=match):
            ops.dropout_add_layer_norm(*operands, **options)

    refuses("residual is on meta", x, None, residual.to("meta"), weight, ln_bias)
    refuses("weight is on meta", x, None, residual, weight.to("meta"), ln_bias)
    there = ops.SequenceLayout.from_lengths((len(x),), device="meta")
    refuses("layout is on meta", x, None, residual, weight, ln_bias, layout=there)
    assert "an operand is float64" in LIMITS.triton.refuses(double=True)
