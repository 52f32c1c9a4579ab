"""attention_relation_kl: values and gradients, head counts that differ, contract, refusal."""

from dataclasses import replace

import pytest
import torch

from tinybert_fast import ops
from tinybert_fast.ops import dispatch
from tinybert_fast.ops.attention_relation_kl import LIMITS
from tinybert_fast.testing import proofs
from tinybert_fast.testing.budgets import SLACK, assert_within_budget
from tinybert_fast.testing.operands import (
    DTYPES,
    LENGTHS,
    Case,
    attention_relation_kl,
    leaves,
    normal,
    with_itself,
)
from tinybert_fast.tuned import attention_relation_kl as tuned

# (H, D) of the student, of the teacher, and R.
HEADS = {
    "TinyBERT-4 under BERT-base": ((12, 26), (12, 64), 12),
    "4 heads teach 12": ((12, 26), (4, 64), 4),  # relation heads of 78 and 64
    "as wide as served": ((2, 128), (1, 256), 2),
    "MiniLMv2": ((2, 64), (2, 64), 8),  # relation heads of 16
    "one number": ((1, 3), (3, 1), 3),
}
LONG = {
    "tile": (32,),
    "beyond a tile": (33, 1, 77),  # several blocks, the last of them short
    "longer": (128,),
    "long": (512, 0, 31),
}


def both(*args, **kwargs):
    case = attention_relation_kl(*args, **kwargs)
    return case, with_itself(case)


kinds = pytest.mark.parametrize("kind", [lambda case: case, with_itself], ids=["a_b", "itself"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", LENGTHS)
@kinds
def test_matches_reference(kind, lengths, heads, dtype, fast, device):
    ours, theirs, relation_heads = HEADS[heads]
    case = attention_relation_kl(
        LENGTHS[lengths], *ours, *theirs, relation_heads, dtype=dtype, device=device
    )
    assert_within_budget(kind(case), fast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LONG)
@kinds
def test_long_sequences_match_reference(kind, lengths, dtype, fast, device):
    case = attention_relation_kl(LONG[lengths], 1, 26, 2, 13, 1, dtype=dtype, device=device)
    assert_within_budget(kind(case), fast)


def largest_score(case):
    """Of a student's or a teacher's relation of one head."""
    sides = [x.detach().double().flatten(1) for x in case.operands]
    pairs = zip(sides, sides) if len(sides) == 2 else zip(sides[::2], sides[1::2])
    return max((x @ y.mT).abs().max().item() for x, y in pairs) / sides[0].shape[1] ** 0.5


@pytest.mark.parametrize("length", [9, 70], ids=["a_tile", "tiles"])
@pytest.mark.parametrize("size", [0.3, 5.0], ids=["flat", "peaked"])
@kinds
def test_scores_of_any_size(kind, size, length, fast, device):
    """Softmaxes near uniform, and such that exp would overflow or vanish without a peak."""
    case = attention_relation_kl((length,), 1, 26, 1, 26, 1, device=device)
    operands = tuple((x.detach() * size).requires_grad_(x.requires_grad) for x in case.operands)
    case = kind(Case(case.op, operands, case.options))
    # The error of P, relative to it, is its score's: four roundings of half an eps of the score.
    slack = max(SLACK["attention_relation_kl"], largest_score(case) / 2)
    assert_within_budget(case, fast, slack)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_of_nearly_equal_relations(dtype, fast, device):
    """P - Q is mostly below the normal numbers of fp16, and none of it is lost."""
    shape = (300, 1, 16)
    a, b = (0.3 * x.detach() for x in leaves(shape, shape, dtype=dtype, device=device))
    a, b = a.requires_grad_(), b.requires_grad_()
    c, d = (x.detach() * (1 + 2e-3 * normal(x.shape, 7, dtype, device)) for x in (a, b))
    layout = ops.SequenceLayout.from_lengths((300,), device=device)
    call = {"relation_heads": 1, "layout": layout}
    case = Case(ops.attention_relation_kl, (a, b, c, d), call)
    exact = case.to(torch.float64)
    scale = 2.0**20  # as fp16 is trained
    want = torch.autograd.grad(exact.function("reference")(*exact.leaves()), exact.leaves())
    got = torch.autograd.grad(case.function(fast)(*case.leaves()) * scale, case.leaves())
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.double() / scale - theirs).norm() <= 1e-3 * theirs.norm()


def test_equal_relations_have_no_loss_and_no_gradient(impl, device):
    case = attention_relation_kl((1, 7, 40), 2, 8, 2, 8, 2, device=device)
    a, b = case.operands[:2]
    case = Case(case.op, (a, b, a.detach(), b.detach()), case.options)
    for kind in (case, with_itself(case)):
        found = kind.run(impl)
        assert abs(found.pop("value").item()) < 1e-6
        assert all(gradient.abs().max() < 1e-8 for gradient in found.values())


@pytest.mark.parametrize("scratch", [1, 60], ids=["a_head", "some_heads"])
def test_blocks_of_scores(scratch, fast, device, monkeypatch):
    monkeypatch.setattr(tuned, "SCRATCH", scratch)
    monkeypatch.setattr("tinybert_fast.tuned.attention.SCRATCH", scratch)
    for lengths in LENGTHS.values():
        for case in both(lengths, 3, 26, 3, 64, 3, device=device):
            assert_within_budget(case, fast)


def padded_operands(device="cpu"):
    """(B, N, H, D) of a, b, c, d in fp64, and masks: right, left, holes, one token, empty."""
    ours, theirs = (5, 6, 3, 8), (5, 6, 2, 9)
    a, b, c, d = leaves(ours, ours, theirs, theirs, dtype=torch.float64, device=device)
    rows = ("111111", "111100", "000111", "101001", "000000")
    mask = torch.tensor([[int(c) for c in row] for row in rows], device=device)
    return (a, b, c.detach(), d.detach()), mask


def test_is_the_paper_s_loss(exact):
    """One sequence and one relation head at a time, from padded operands of 3 and 2 heads."""
    operands, mask = padded_operands()
    total, rows = 0.0, 0
    for at, row in enumerate(mask.bool()):
        # 6 relation heads of the 24 and of the 18 numbers of a row, whatever the heads were.
        a, b, c, d = (x[at, row].flatten(1).chunk(6, 1) for x in operands)
        for head in range(6):
            student = torch.softmax(a[head] @ b[head].mT / 4**0.5, -1)
            teacher = torch.softmax(c[head] @ d[head].mT / 3**0.5, -1)
            total = total + (teacher * (teacher / student).log()).sum()
            rows += len(student)
    assert rows == 6 * (6 + 4 + 3 + 3)
    layout = ops.SequenceLayout.from_mask(mask)
    loss = ops.attention_relation_kl(*operands, relation_heads=6, layout=layout, impl=exact)
    torch.testing.assert_close(loss, total / rows, rtol=1e-12, atol=0.0)
    want, got = (torch.autograd.grad(x, operands[:2]) for x in (total / rows, loss))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_a_relation_with_itself_is_that_of_two_equal_operands(impl, device):
    """The same values in two tensors; their gradients add up."""
    case = attention_relation_kl((7, 40), 2, 13, 2, 64, 2, device=device)
    a, _, c, _ = case.operands
    pair = Case(case.op, (a, a.detach().clone().requires_grad_(), c, c.clone()), case.options)
    want, got = pair.run(impl), with_itself(case).run(impl)
    torch.testing.assert_close(got["value"], want["value"])
    torch.testing.assert_close(got["da_student"], want["da_student"] + want["db_student"])


def test_padding_does_not_matter(impl, device):
    """Whatever stands in padding rows, NaN too, the real tokens decide."""
    operands, mask = padded_operands(device)
    operands = [x.detach().float() for x in operands]
    layout = ops.SequenceLayout.from_mask(mask)
    call = {"relation_heads": 6, "layout": layout, "impl": impl}
    want = ops.attention_relation_kl(*operands, **call)
    poisoned = [x.masked_fill(mask[..., None, None] == 0, torch.nan) for x in operands]
    assert torch.equal(ops.attention_relation_kl(*poisoned, **call), want)
    packed = [layout.pack(x) for x in operands]
    assert torch.equal(ops.attention_relation_kl(*packed, **call), want)
    full = [x[:1] for x in operands]
    alone = ops.attention_relation_kl(*full, relation_heads=6, impl=impl)
    first = ops.SequenceLayout.from_lengths((6,), device=device)
    same = ops.attention_relation_kl(*full, relation_heads=6, layout=first, impl=impl)
    assert torch.equal(alone, same)


@kinds
def test_gradients(kind, exact, device):
    case = attention_relation_kl((1, 3, 0, 2), 2, 3, 1, 4, 2, device=device)
    proofs.prove_gradient(kind(case), exact)


@pytest.mark.parametrize("lengths", ["ragged", "nothing"])
@kinds
def test_contract(kind, lengths, fast, device):
    proofs.prove_contract(kind(attention_relation_kl(LENGTHS[lengths], device=device)), fast)


@kinds
def test_compiles_whole(kind, fast, device):
    proofs.prove_compiles(kind(attention_relation_kl(device=device)), fast)


@kinds
def test_reference_gradient_under_a_fast_forward(kind, fast, device):
    proofs.prove_pair(kind(attention_relation_kl(device=device)), fast)


def test_memory_is_linear_in_the_length(device):
    """Beside the block of scores: twice the length at most doubles what is alive."""
    peaks = []
    for length in (256, 512, 1024):
        case = attention_relation_kl((length,) * 2, 8, 16, 8, 16, 8, device=device)
        with pytest.MonkeyPatch.context() as patch, proofs.LiveBytes() as live:
            patch.setattr(tuned, "SCRATCH", 1)
            patch.setattr("tinybert_fast.tuned.attention.SCRATCH", 1)
            case.run("torch")
        scores = 4 * length * length  # bytes of one head's
        peaks.append(live.peak - 6 * scores)
    assert 0 < peaks[1] < 2.1 * peaks[0]
    assert 0 < peaks[2] < 2.1 * peaks[1]


def test_wide_relation_heads_are_not_for_triton(monkeypatch):
    """Whether or not there is a GPU here, the width decides."""
    monkeypatch.setitem(dispatch.UNAVAILABLE, "triton", None)
    limits = replace(LIMITS, triton=replace(LIMITS.triton, devices=("cpu",)))
    monkeypatch.setitem(ops.attention_relation_kl.__globals__, "LIMITS", limits)
    case = attention_relation_kl((3,), 1, 129, 1, 64, 1)
    with pytest.raises(ValueError, match="relation heads of 129 numbers are wider than 128"):
        case.run("triton")
    assert case.run()["value"] > 0


def test_refuses():
    a, b, c, d = attention_relation_kl((2, 3)).operands
    layout = ops.SequenceLayout.from_lengths((2, 3))
    padded = [x[None] for x in (a, b, c, d)]

    def refuses(match, *operands, heads=2, **options):
        with pytest.raises(ValueError, match=match):
            ops.attention_relation_kl(*operands, relation_heads=heads, **options)

    refuses(r"operands of either model must agree.*b_student \(4, 4, 13\)", a, b[:4], c, d)
    refuses("operands of either model must agree", a, b, c, d[:4], layout=layout)
    refuses("operands of either model must agree", *padded[:2], c, d, layout=layout)
    refuses("operands of either model must agree", a[0], b[0], c[0], d[0], layout=layout)
    refuses("must see the same tokens", a, b, c[:4], d[:4], layout=layout)
    refuses("need layout=", a, b, c, d)
    refuses(r"leading sizes \(5,\)", *(x[:4] for x in (a, b, c, d)), layout=layout)
    refuses(r"leading sizes \(2, 3\)", *padded, layout=layout)
    complaint = r"relation_heads=4 must divide .* width 52 and the teacher's 66; .* divisor of 2"
    narrow = normal((5, 2, 33), 0)
    refuses(complaint, a, b, narrow, narrow, heads=4, layout=layout)
    for heads in (0, 2.0, None):
        wanted = f"relation_heads={heads}; expected an integer from 1 to 128"
        refuses(wanted, a, b, c, d, heads=heads, layout=layout)


def test_heads_do_not_matter_but_their_order(impl, device):
    """4 heads of 26 are 104 numbers, of which each relation head takes the next ones."""
    case = attention_relation_kl((5, 3), 4, 26, 4, 64, 2, device=device)
    flat = tuple(x.flatten(1)[:, None] for x in case.operands)
    want = case.op(*case.operands, **case.options, impl=impl)
    assert torch.equal(case.op(*flat, **case.options, impl=impl), want)
