"""attention_score_mse: values and gradients, both forms, official semantics, memory, refusal."""

import pytest
import torch

from tinybert_fast import ops
from tinybert_fast.testing import proofs
from tinybert_fast.testing.budgets import assert_within_budget
from tinybert_fast.testing.operands import (
    DTYPES,
    LENGTHS,
    attention_score_mse,
    leaves,
    normal,
)
from tinybert_fast.tuned import attention_score_mse as tuned

FORMS = ["direct", "gram"]
WIDTHS = [(26, 64), (64, 64), (3, 1)]  # TinyBERT-4 and -6 under BERT-base; tiny


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_matches_reference(lengths, widths, dtype, fast, device):
    case = attention_score_mse(LENGTHS[lengths], 2, *widths, dtype=dtype, device=device)
    assert_within_budget(case, fast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_gram_matches_reference(lengths, dtype, fast, device):
    case = attention_score_mse(LENGTHS[lengths], form="gram", dtype=dtype, device=device)
    assert_within_budget(case, fast)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scratch", [1, 60], ids=["a_head", "some_heads"])
def test_blocks_of_scores(scratch, form, fast, device, monkeypatch):
    monkeypatch.setattr("tinybert_fast.tuned.attention.SCRATCH", scratch)
    for lengths in LENGTHS.values():
        case = attention_score_mse(lengths, heads=3, form=form, device=device)
        assert_within_budget(case, fast)


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_gram_equals_direct(lengths, widths, exact, device):
    case = attention_score_mse(LENGTHS[lengths], 2, *widths, dtype=torch.float64, device=device)
    gram, direct = (case.with_options(form=form).run(exact) for form in FORMS)
    torch.testing.assert_close(gram, direct, rtol=1e-12, atol=1e-13)


def test_auto_takes_the_cheaper_form(monkeypatch):
    """Heads of 2 under 2: the forms cost the same at 5 tokens."""
    assert tuned.crossover(2, 2) == 5
    taken = []
    for form in FORMS:
        function = getattr(tuned, f"_{form}")

        def spy(q, *rest, form=form, function=function):
            taken.append((form, q.shape[2]))
            return function(q, *rest)

        monkeypatch.setattr(tuned, f"_{form}", spy)
    attention_score_mse((5, 6), 2, 2, 2).run("torch")
    assert taken == [("direct", 5), ("gram", 6)]


@pytest.mark.parametrize("seed", range(6))
def test_gram_of_nearly_equal_scores(seed, fast):
    """What is left of three large numbers is not negative, and its gradients are small."""
    q, k = leaves((50, 2, 8), (50, 2, 8), seed=seed)
    teacher = (x.detach() * (1 + 1e-5 * normal(x.shape, 7)) for x in (q, k))
    layout = ops.SequenceLayout.from_lengths((50,))
    loss = ops.attention_score_mse(q, k, *teacher, layout=layout, form="gram", impl=fast)
    dq, dk = torch.autograd.grad(loss, (q, k))
    assert 0.0 <= loss.item() < 1e-5
    assert max(dq.abs().max(), dk.abs().max()) < 1e-6


def padded_operands(widths=(5, 7)):
    """(B, N, H, D) of q, k, p, r in fp64, and masks: right, left, holes, one token, empty."""
    q, k, p, r = leaves(*((5, 6, 3, w) for w in (*widths[:1] * 2, *widths[1:] * 2)),
                        dtype=torch.float64)  # fmt: skip
    rows = ("111111", "111100", "000111", "101001", "000000")
    mask = torch.tensor([[int(c) for c in row] for row in rows])
    return (q, k, p.detach(), r.detach()), mask


def compare(ours, theirs, operands):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0.0)
    for a, b in zip(*(torch.autograd.grad(loss, operands[:2]) for loss in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_mean_over_real_pairs(form, impl):
    """Equation 7 of the paper, one sequence at a time, from padded operands."""
    operands, mask = padded_operands()
    total, pairs = 0.0, 0
    for b, row in enumerate(mask.bool()):
        q, k, p, r = (x[b, row].transpose(0, 1) for x in operands)  # (H, n, D)
        error = q @ k.transpose(1, 2) / 5**0.5 - p @ r.transpose(1, 2) / 7**0.5
        total, pairs = total + (error**2).sum(), pairs + error.numel()
    assert pairs == 3 * (36 + 16 + 9 + 9)
    layout = ops.SequenceLayout.from_mask(mask)
    loss = ops.attention_score_mse(*operands, layout=layout, form=form, impl=impl)
    compare(loss, total / pairs, operands)


@pytest.mark.parametrize("form", FORMS)
def test_count_padded_queries_is_the_official_loss(form, impl):
    """The released code: -10000 added to masked keys, scores at most -100 set to 0, plain MSE."""
    operands, mask = padded_operands()
    additive = (1.0 - mask.double())[:, None, None, :] * -10000.0
    scores = [
        x.transpose(1, 2) @ y.transpose(1, 2).transpose(2, 3) / x.shape[-1] ** 0.5 + additive
        for x, y in (operands[:2], operands[2:])
    ]
    student, teacher = (torch.where(s <= -1e2, torch.zeros_like(s), s) for s in scores)
    official = torch.nn.functional.mse_loss(student, teacher)
    layout = ops.SequenceLayout.from_mask(mask)
    loss = ops.attention_score_mse(
        *operands, layout=layout, form=form, count_padded_queries=True, impl=impl
    )
    compare(loss, official, operands)


def test_padding_does_not_matter(impl):
    """Whatever stands in padding rows, NaN too, the real pairs decide."""
    operands, mask = padded_operands()
    layout = ops.SequenceLayout.from_mask(mask)
    want = ops.attention_score_mse(*operands, layout=layout, impl=impl)
    poisoned = [x.detach().masked_fill(mask[..., None, None] == 0, torch.nan) for x in operands]
    assert torch.equal(ops.attention_score_mse(*poisoned, layout=layout, impl=impl), want)
    packed = [layout.pack(x) for x in operands]
    assert torch.equal(ops.attention_score_mse(*packed, layout=layout, impl=impl), want)


def test_count_padded_queries_without_padding(impl):
    operands, _ = padded_operands()
    want = ops.attention_score_mse(*operands, impl=impl)
    for layout in (None, ops.SequenceLayout.full(5, 6)):
        got = ops.attention_score_mse(
            *operands, layout=layout, count_padded_queries=True, impl=impl
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form, impl, device):
    case = attention_score_mse((1, 3, 0, 2), 2, 3, 2, form=form, device=device)
    proofs.prove_gradient(case, impl)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", ["ragged", "nothing"])
def test_contract(lengths, form, fast, device):
    proofs.prove_contract(attention_score_mse(LENGTHS[lengths], form=form, device=device), fast)


@pytest.mark.parametrize("form", FORMS)
def test_compiles_whole(form, fast, device):
    proofs.prove_compiles(attention_score_mse(form=form, device=device), fast)


@pytest.mark.parametrize("form", FORMS)
def test_reference_gradient_under_a_fast_forward(form, fast, device):
    proofs.prove_pair(attention_score_mse(form=form, device=device), fast)


def test_memory_is_linear_in_the_length():
    """Doubling the length of long sequences at most doubles what is alive, and a little."""
    peaks = []
    for length in (128, 256, 512):
        case = attention_score_mse((length,) * 2, 2, 4, 4)
        with proofs.LiveBytes() as live:
            case.run("torch")
        peaks.append(live.peak)
    assert peaks[1] < 2.1 * peaks[0]
    assert peaks[2] < 2.1 * peaks[1]


def test_refuses():
    q, k, p, r = attention_score_mse((2, 3)).operands
    layout = ops.SequenceLayout.from_lengths((2, 3))
    padded = [x[None] for x in (q, k, p, r)]

    def refuses(match, *operands, **options):
        with pytest.raises(ValueError, match=match):
            ops.attention_score_mse(*operands, **options)

    refuses(r"queries and keys must agree.*k_student \(4, 2, 26\)", q, k[:4], p, r, layout=layout)
    refuses("queries and keys must agree", q, k, p, r[:4], layout=layout)
    refuses("queries and keys must agree", *padded[:2], p, r, layout=layout)
    refuses("queries and keys must agree", q[0], k[0], p[0], r[0], layout=layout)
    three = normal((5, 3, 64), 0)
    refuses(r"2 heads and the teacher 3;.*num_attention_heads=3", q, k, three, three, layout=layout)
    refuses("must see the same tokens", q, k, p[:4], r[:4], layout=layout)
    refuses("need layout=", q, k, p, r)
    refuses(r"leading sizes \(5,\)", *(x[:4] for x in (q, k, p, r)), layout=layout)
    refuses(r"leading sizes \(2, 3\)", *padded, layout=layout)
    refuses("form='fast' is not one of", q, k, p, r, layout=layout, form="fast")
    refuses("needs padded", q, k, p, r, layout=layout, count_padded_queries=True)
