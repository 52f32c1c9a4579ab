"""linear_cross_entropy: values and gradients, gradcheck, contract, compilation, refusal."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from tinybert_fast import ops
from tinybert_fast.testing import proofs
from tinybert_fast.testing.budgets import assert_within_budget
from tinybert_fast.testing.operands import DTYPES, linear_cross_entropy, normal
from tinybert_fast.tuned import linear_cross_entropy as tuned

SHAPES = [  # tokens, labelled, columns, words
    (9, 4, 312, 101),  # TinyBERT-4
    (5, 5, 768, 53),  # TinyBERT-6
    (3, 8, 33, 7),  # rows repeat: their gradients add up
    (9, 0, 312, 101),  # no labelled row: loss 0
    (0, 0, 312, 101),  # T = 0
]
OPTIONS = [
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"ignored": 2},
    {"ignored": 5},  # no label is left: loss 0
    {"ignored": 2, "label_smoothing": 1.0, "reduction": "none"},
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape, with_bias, dtype, fast, device):
    case = linear_cross_entropy(*shape, with_bias=with_bias, dtype=dtype, device=device)
    assert_within_budget(case, fast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(options, dtype, fast, device, monkeypatch):
    monkeypatch.setattr(tuned, "CHUNK_CELLS", 202)  # two rows
    case = linear_cross_entropy(9, 5, 312, 101, dtype=dtype, device=device, **options)
    assert_within_budget(case, fast)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_are_those_of_pytorch(options, exact):
    case = linear_cross_entropy(9, 5, 312, 101, dtype=torch.float64, **options)
    hidden, weight, bias, rows, labels = case.operands
    logits = F.linear(hidden[rows], weight, bias)
    want = F.cross_entropy(logits, labels, **case.options)
    if options == {"ignored": 5}:
        assert want.isnan()
        want = want.new_zeros(())
    got = ops.linear_cross_entropy(*case.operands, **case.options, impl=exact)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cells", [1, 202], ids=["one_row", "two_rows_and_a_tail"])
def test_chunks(cells, dtype, fast, device, monkeypatch):
    monkeypatch.setattr(tuned, "CHUNK_CELLS", cells)
    case = linear_cross_entropy(9, 5, 312, 101, dtype=dtype, device=device)
    assert_within_budget(case, fast)


@pytest.fixture
def sixteen_rows(monkeypatch):
    """Of 101 words in a kernel's chunk, the least; 21 would fit."""
    from tinybert_fast.kernels import configs

    monkeypatch.setattr(configs, "L2_BYTES", 21 * 112 * 4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_chunks_of_a_kernel(reduction, kernel, device, sixteen_rows):
    """Two of 16 rows and one of what is left."""
    case = linear_cross_entropy(9, 37, 312, 101, reduction=reduction, device=device)
    assert_within_budget(case, kernel)


def test_chunks_are_aligned_alike(kernel, device, sixteen_rows, monkeypatch):
    """Or Triton would compile the kernel again for the labels and losses of the second one."""
    from tinybert_fast.kernels import linear_cross_entropy as kernels

    launched, addresses = kernels._loss_kernel, []

    class Recorded:
        def __getitem__(self, grid):
            def launch(*operands, **constants):
                tensors = [x for x in operands if isinstance(x, torch.Tensor)]
                addresses.append([x.data_ptr() % 16 for x in tensors])
                launched[grid](*operands, **constants)

            return launch

    monkeypatch.setattr(kernels, "_loss_kernel", Recorded())
    linear_cross_entropy(9, 37, 8, 101, reduction="none", device=device).run(kernel)
    assert len(addresses) == 2 * 3  # chunks of the forward, then of the backward
    assert addresses[0] == addresses[1] == addresses[2]
    assert addresses[3] == addresses[4] == addresses[5]


def test_products_are_of_whole_units(kernel, device, monkeypatch):
    """Of 101 words, as of BERT's 30,522, cuBLAS would load one or two numbers at a time."""
    sizes = set()

    def recorded(product, *operands, **options):
        sizes.update(n for x in operands for n in x.shape)
        return product(*operands, **options)

    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, partial(recorded, getattr(torch, name)))
    linear_cross_entropy(9, 5, 32, 101, device=device).run(kernel)
    assert sizes == {5, 32, 112}


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_no_other(number, ignored, counted, device, sixteen_rows):
    """Not even the one that takes its place among the logits of the next chunk."""
    case = linear_cross_entropy(37, 37, 8, 101, reduction="none", device=device)
    hidden, *others = case.operands
    hidden, rows, labels = hidden.detach(), torch.arange(37, device=device), case.operands[4]
    hidden[3] = number
    if ignored:
        labels[3] = -100
    operands = (hidden.requires_grad_(), *others[:2], rows, labels)
    losses = ops.linear_cross_entropy(*operands, **case.options, impl=counted)
    losses.sum().backward()
    fine = rows != 3
    assert losses[fine].isfinite().all()
    assert losses[3].item() == 0.0 if ignored else not losses[3].isfinite()
    assert hidden.grad[fine].isfinite().all()


def test_gradient_of_the_weight_is_summed_in_fp32(kernel, device, sixteen_rows):
    """What a chunk adds for words that label no row may lie below fp16's normal numbers."""
    dtype = {"dtype": torch.float16, "device": device}
    hidden, weight = normal((37, 8), 0, **dtype) * 2.0**-14, normal((101, 8), 1).to(device)
    rows = torch.arange(37, device=device)
    operands = (weight.requires_grad_(), None, rows, rows)
    found = []
    for own, impl in ((hidden, kernel), (hidden.double(), "reference")):
        loss = ops.linear_cross_entropy(own, *operands, reduction="sum", impl=impl)
        (gradient,) = torch.autograd.grad(loss, weight)
        found.append(gradient[37:].double())
    assert (found[0] - found[1]).norm() < 1e-3 * found[1].norm()


def test_holds_one_chunk_of_logits(monkeypatch):
    """200 rows of 1000 logits would take 0.8 MB; the weight's copy and gradient are 32 kB each."""
    monkeypatch.setattr(tuned, "CHUNK_CELLS", 10_000)
    case = linear_cross_entropy(200, 200, 8, 1000)
    with proofs.LiveBytes() as live:
        case.run("torch")
    assert live.peak < 200 * 1000 * 4


def test_reference_is_the_definition():
    hidden, weight, bias, rows, labels = linear_cross_entropy(dtype=torch.float64).operands
    want = F.cross_entropy(F.linear(hidden[rows], weight, bias), labels)
    got = ops.linear_cross_entropy(hidden, weight, bias, rows, labels, impl="reference")
    torch.testing.assert_close(got, want)


def test_no_labelled_row(impl, device):
    found = linear_cross_entropy(9, 0, device=device).run(impl)
    assert all(x.count_nonzero() == 0 for x in found.values())


def test_large_logits(impl, device):
    """Logits of +-1e4: the softmax is shifted by its maximum."""
    hidden = torch.tensor([[1e4]], device=device, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], device=device)
    index = torch.tensor([0], device=device)
    loss = ops.linear_cross_entropy(hidden, weight, None, index, index + 1, impl=impl)
    loss.backward()
    assert loss.item() == 2e4
    assert hidden.grad.item() == 2.0


@pytest.mark.parametrize("with_bias", [True, False])
def test_gradients(with_bias, exact, device):
    case = linear_cross_entropy(4, 5, 3, 7, with_bias=with_bias, device=device)
    proofs.prove_gradient(case, exact)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_gradients_of_options(options, exact, device):
    proofs.prove_gradient(linear_cross_entropy(4, 5, 3, 7, device=device, **options), exact)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("labelled", [3, 0])
def test_contract(labelled, with_bias, fast, device):
    case = linear_cross_entropy(4, labelled, 3, 7, with_bias=with_bias, device=device)
    proofs.prove_contract(case, fast)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_compiles_whole(with_bias, reduction, fast, device):
    options = {"with_bias": with_bias, "reduction": reduction}
    proofs.prove_compiles(linear_cross_entropy(9, 4, 33, 17, device=device, **options), fast)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_reference_gradient_under_a_fast_forward(with_bias, reduction, fast, device):
    options = {"with_bias": with_bias, "reduction": reduction}
    proofs.prove_pair(linear_cross_entropy(device=device, **options), fast)


def test_refuses():
    hidden, weight, bias, rows, labels = linear_cross_entropy(4, 3, 5, 7).operands
    op = ops.linear_cross_entropy
    with pytest.raises(ValueError, match=r"hidden must be \(T, C\).*got \(1, 4, 5\)"):
        op(hidden[None], weight, bias, rows, labels)
    with pytest.raises(ValueError, match=r"weight \(V, C\); got \(4, 5\) and \(5, 7\)"):
        op(hidden, weight.mT, bias, rows, labels)
    with pytest.raises(ValueError, match=r"bias must be \(7,\), one per row of weight; got \(1,\)"):
        op(hidden, weight, bias[:1], rows, labels)
    for wrong in (rows.int(), rows[:2], rows[None]):
        with pytest.raises(ValueError, match=r"rows and labels must both be int64 \(R,\); got"):
            op(hidden, weight, bias, wrong, labels)
    for smoothing in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"label_smoothing=.*; expected 0 to 1"):
            op(hidden, weight, bias, rows, labels, label_smoothing=smoothing)
    with pytest.raises(ValueError, match="reduction='max' is not one of mean, sum, none"):
        op(hidden, weight, bias, rows, labels, reduction="max")


@pytest.mark.parametrize("label", [7, -1, -101])
def test_label_out_of_range(label):
    hidden, weight, row = normal((2, 5), 0), normal((7, 5), 1), torch.tensor([1])
    message = f"label {label} is outside the vocabulary of 7; expected 0 to 6, or ignore_index"
    with pytest.raises(ValueError, match=message):
        ops.linear_cross_entropy(hidden, weight, None, row, torch.tensor([label]), impl="torch")
    ops.linear_cross_entropy(
        hidden, weight, None, row, torch.tensor([label]), ignore_index=label, impl="torch"
    )


@pytest.mark.parametrize("label", [7, -1])
def test_label_that_a_kernel_cannot_refuse(label, kernel, device):
    """Whoever waited for the GPU to look at labels would lose more than the head takes."""
    case = linear_cross_entropy(9, 5, 8, 7, device=device, reduction="none")
    case.operands[4][1] = label
    losses = ops.linear_cross_entropy(*case.operands, **case.options, impl=kernel)
    assert losses.isnan().tolist() == [False, True, False, False, False]


def test_row_out_of_range(on_cpu):
    hidden, index = normal((2, 5), 0), torch.tensor([2])
    with pytest.raises((IndexError, RuntimeError)):
        ops.linear_cross_entropy(hidden, normal((7, 5), 1), None, index, index, impl=on_cpu)
