"""attention_score_mse: values and gradients, both forms, official semantics, memory, refusal."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tinybert_fast import ops
from tinybert_fast.ops import dispatch
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
LOSSES = ["full", "student"]
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


def random_pairs(size, *batch):
    """Allowed pairs, of which query 1 and key 2 have none."""
    allowed = normal((*batch, size, size), 8) > 0
    allowed[..., 1, :] = allowed[..., :, 2] = False
    return allowed


def patchwork(side, *batch):
    """Blocks that are full, partial and empty, and keys and queries without a partner. A kernel's
    tile may be a part of a block, and no part looks like another.
    """
    size = side * 3 // 2
    allowed = random_pairs(size, *batch)
    allowed[..., :side, :side] = True
    allowed[..., side:, side:] = False
    allowed[..., side // 2 : side // 2 + 32, side:] = False
    allowed[..., 40, :] = False
    return ops.BlockMask.from_dense(allowed, side)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(), (4,)], ids=["one_mask", "mask_per_sequence"])
@pytest.mark.parametrize("side", [64, 128])
def test_blocks_of_a_mask(side, batch, dtype, loss, fast, device):
    """Lengths that end in a full, a partial and an empty block of the mask."""
    mask = patchwork(side, *batch).to(device)
    lengths = (side + 6, 31, 0, side * 3 // 2)
    for widths in ((26, 64), (64, 64)):
        case = attention_score_mse(lengths, 1, *widths, dtype=dtype, device=device)
        assert_within_budget(case.with_options(block_mask=mask, loss=loss), fast)


def test_mean_over_allowed_pairs(exact):
    """Of lists and of a dense mask, against masked scores one sequence at a time."""
    lengths, allowed = (70, 3, 0, 96), random_pairs(100, 4)
    case = attention_score_mse(lengths, 2, 3, 5, dtype=torch.float64)
    for mask in (ops.BlockMask.from_dense(allowed), allowed):
        total, pairs, stop = 0.0, 0, 0
        for b, n in enumerate(lengths):
            stop += n
            q, k, p, r = (x[stop - n : stop].transpose(0, 1) for x in case.operands)
            error = (q @ k.mT / 3**0.5 - p @ r.mT / 5**0.5)[:, allowed[b, :n, :n]]
            total, pairs = total + error.square().sum(), pairs + error.numel()
        compare(case.with_options(block_mask=mask).function(exact)(*case.leaves()),
                total / pairs, case.operands)  # fmt: skip


def test_gradients_under_a_mask(exact, device):
    mask = ops.BlockMask.from_dense(random_pairs(6).to(device))
    case = attention_score_mse((5, 0, 6), 2, 3, 2, device=device, block_mask=mask)
    proofs.prove_gradient(case, exact)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["one_mask", "mask_per_sequence"])
def test_contract_compilation_and_pair_under_a_mask(batch, fast, device):
    mask = ops.BlockMask.from_dense(random_pairs(7, *batch).to(device))
    case = attention_score_mse(device=device, block_mask=mask)
    for prove in (proofs.prove_contract, proofs.prove_compiles, proofs.prove_pair):
        prove(case, fast)


def test_a_mask_that_allows_nothing(impl, device):
    mask = ops.BlockMask.from_dense(torch.zeros(7, 7, dtype=torch.bool, device=device))
    for value in attention_score_mse(device=device, block_mask=mask).run(impl).values():
        assert not value.any()


def flops(length, widths, form, loss="full", block_mask=()):
    operands = (normal((length, 1, width), 0) for width in sorted(widths * 2))
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    with FlopCounterMode(display=False) as counter:
        tuned.forward(*operands, cu_seqlens, length, form, loss, list(block_mask), [True, True])
    return counter.get_total_flops()


def test_only_listed_blocks_are_computed():
    """A window of 64 to either side: at most 3 of 16 blocks of a row."""
    lists = ops.BlockMask.from_pattern(ops.BlockPattern(window=64), 1024).lists
    share = len(lists[1]) / 16**2
    assert share < 0.2
    every, listed = (flops(1024, (8, 8), "direct", block_mask=mask) for mask in ((), lists))
    assert listed == pytest.approx(share * every, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_student_is_full_without_a_constant(lengths, form, impl, device):
    """Gradients are those of the full loss bit for bit."""
    case = attention_score_mse(LENGTHS[lengths], 2, 3, 5, form=form, device=device)
    full, student = (case.with_options(loss=loss).run(impl) for loss in LOSSES)
    constant = teacher_constant(case)
    torch.testing.assert_close(student.pop("value") + constant, full.pop("value"))
    torch.testing.assert_close(student, full, rtol=0.0, atol=0.0)


def teacher_constant(case):
    """The mean of the teacher's squared scores over all pairs."""
    p, r = case.operands[2:]
    zeros = torch.zeros_like(p)
    return ops.attention_score_mse(zeros, zeros, p, r, layout=case.options["layout"])


def test_student_takes_fewer_products():
    """Gram of heads of 26 under 64: without P^T P and R^T R."""
    full, student = (flops(512, (26, 64), "gram", loss) for loss in LOSSES)
    assert full - student == 2 * 2 * 512 * 64**2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS[:2], ids=str)
@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("length", [1, 77, 128, 512])
def test_lengths_of_texts(length, form, widths, dtype, fast, device):
    """One tile and several, the last of them full or not; auto changes its form between them."""
    case = attention_score_mse((length,), 1, *widths, form=form, dtype=dtype, device=device)
    assert_within_budget(case, fast)


# rho = |S - T|^2 / (|S|^2 + |T|^2) -> largest relative error of (the loss, the gradients).
PROMISED = {
    "gram": {0.3: (1e-3, 1e-3), 1e-3: (1e-3, 1e-3), 3e-5: (0.1, 1e-3)},
    "direct": {0.3: (1e-5, 1e-5), 1e-3: (1e-5, 1e-5), 3e-5: (1e-5, 1e-4)},
}


def nearly_equal(rho, length, width, scale, dtype, device):
    """Packed q, k, p, r of two sequences: the student is the teacher and some noise."""
    noise = (1 + 2 * rho / (1 - rho)) ** 0.5 - 1  # its square, in q and in k
    layout = ops.SequenceLayout.from_lengths((length, 20), device=device)
    *student, p, r = (normal((layout.total, 1, width), i, device=device) for i in range(4))
    q, k = (t + noise**0.5 * n for t, n in zip((p, r), student))
    return [(scale * x).to(dtype) for x in (q, k, p, r)], layout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("length", "width", "scale"),
    [(128, 64, 1.0), (77, 26, 0.03), (512, 64, 10.0)],
    ids=["tiles", "small_numbers_of_fp16", "long"],
)
def test_precision_of_nearly_equal_scores(form, length, width, dtype, scale, fast, device):
    """As the docstring promises, against fp64 on the same numbers, before any loss scale."""
    for rho, (of_loss, of_gradients) in PROMISED[form].items():
        operands, layout = nearly_equal(rho, length, width, scale, dtype, device)
        call, both = (layout.cu_seqlens, layout.max_length), [True, True]
        actual = torch.ops.tinybert_fast.attention_score_mse_fwd(
            *operands, *call, form, "full", [], both, fast
        )
        exact = [x.double() for x in operands]
        want = torch.ops.tinybert_fast.attention_score_mse_fwd(
            *exact, *call, "direct", "full", [], both, "torch"
        )
        squares = ops.attention_score_mse(*exact[:2], *(0 * x for x in exact[2:]), layout=layout)
        assert (want[0] / (2 * squares)).item() == pytest.approx(rho, rel=0.5)
        loss, *gradients = (((x - y).norm() / y.norm()).item() for x, y in zip(actual, want))
        if form == "gram" and dtype != torch.float32:  # tensor cores cut off what they add up
            of_loss = max(of_loss, 2e-3)
        if actual[1].dtype == torch.bfloat16:  # as autograd hands them on
            of_gradients += torch.finfo(torch.bfloat16).eps / 2
        assert loss <= of_loss
        assert max(gradients) <= of_gradients


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_what_stands_behind_a_head_does_not_count(form, dtype, fast, device):
    """Heads of 26 in rows of 32, as the encoder pads them: loads may be wider than a head."""
    case = attention_score_mse((70, 3), 2, 26, 26, form=form, dtype=dtype, device=device)
    stored = [torch.full((*x.shape[:2], 32), torch.nan).to(x) for x in case.operands]
    for x, within in zip(case.operands, stored):
        within[..., :26] = x
    layout = case.options["layout"]
    call = (layout.cu_seqlens, layout.max_length, form, "full", [], [True, True], fast)
    with torch.no_grad():
        got, want = (
            torch.ops.tinybert_fast.attention_score_mse_fwd(*operands, *call)
            for operands in ([x[..., :26] for x in stored], case.operands)
        )
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)


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
def test_gram_of_nearly_equal_scores(seed, fast, device):
    """What is left of three large numbers is not negative, and its gradients are small."""
    q, k = leaves((50, 2, 8), (50, 2, 8), seed=seed, device=device)
    teacher = (x.detach() * (1 + 1e-5 * normal(x.shape, 7, device=device)) for x in (q, k))
    layout = ops.SequenceLayout.from_lengths((50,), device=device)
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
def test_mean_over_real_pairs(form, exact):
    """Equation 7 of the paper, one sequence at a time, from padded operands."""
    operands, mask = padded_operands()
    total, pairs = 0.0, 0
    for b, row in enumerate(mask.bool()):
        q, k, p, r = (x[b, row].transpose(0, 1) for x in operands)  # (H, n, D)
        error = q @ k.transpose(1, 2) / 5**0.5 - p @ r.transpose(1, 2) / 7**0.5
        total, pairs = total + (error**2).sum(), pairs + error.numel()
    assert pairs == 3 * (36 + 16 + 9 + 9)
    layout = ops.SequenceLayout.from_mask(mask)
    loss = ops.attention_score_mse(*operands, layout=layout, form=form, impl=exact)
    compare(loss, total / pairs, operands)


@pytest.mark.parametrize("form", FORMS)
def test_count_padded_queries_is_the_official_loss(form, exact):
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
        *operands, layout=layout, form=form, count_padded_queries=True, impl=exact
    )
    compare(loss, official, operands)


def test_padding_does_not_matter(exact):
    """Whatever stands in padding rows, NaN too, the real pairs decide."""
    operands, mask = padded_operands()
    layout = ops.SequenceLayout.from_mask(mask)
    want = ops.attention_score_mse(*operands, layout=layout, impl=exact)
    poisoned = [x.detach().masked_fill(mask[..., None, None] == 0, torch.nan) for x in operands]
    assert torch.equal(ops.attention_score_mse(*poisoned, layout=layout, impl=exact), want)
    packed = [layout.pack(x) for x in operands]
    assert torch.equal(ops.attention_score_mse(*packed, layout=layout, impl=exact), want)


def test_count_padded_queries_without_padding(exact):
    operands, _ = padded_operands()
    want = ops.attention_score_mse(*operands, impl=exact)
    for layout in (None, ops.SequenceLayout.full(5, 6)):
        got = ops.attention_score_mse(
            *operands, layout=layout, count_padded_queries=True, impl=exact
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form, exact, device):
    case = attention_score_mse((1, 3, 0, 2), 2, 3, 2, form=form, device=device)
    proofs.prove_gradient(case, exact)


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

    refuses(
        r"operands of either model must agree.*k_student \(4, 2, 26\)",
        q,
        k[:4],
        p,
        r,
        layout=layout,
    )
    refuses("operands of either model must agree", q, k, p, r[:4], layout=layout)
    refuses("operands of either model must agree", *padded[:2], p, r, layout=layout)
    refuses("operands of either model must agree", q[0], k[0], p[0], r[0], layout=layout)
    three = normal((5, 3, 64), 0)
    refuses(r"2 heads and the teacher 3;.*num_attention_heads=3", q, k, three, three, layout=layout)
    refuses("must see the same tokens", q, k, p[:4], r[:4], layout=layout)
    refuses("need layout=", q, k, p, r)
    refuses(r"leading sizes \(5,\)", *(x[:4] for x in (q, k, p, r)), layout=layout)
    refuses(r"leading sizes \(2, 3\)", *padded, layout=layout)
    refuses("form='fast' is not one of", q, k, p, r, layout=layout, form="fast")
    refuses("loss='all' is not one of", q, k, p, r, layout=layout, loss="all")
    refuses("needs padded", q, k, p, r, layout=layout, count_padded_queries=True)
    mask = ops.BlockMask.from_dense(torch.ones(3, 3, dtype=torch.bool))
    masked = {"layout": layout, "block_mask": mask}
    refuses(r"form='gram' .* use form='direct'", q, k, p, r, **masked, form="gram")
    small = {**masked, "block_mask": ops.BlockMask.from_dense(mask.dense[0, :2, :2])}
    refuses("_mse: block_mask must hold 1 or 2 masks of size N >= 3", q, k, p, r, **small)
    dense = {**masked, "block_mask": torch.ones(3, 3)}
    refuses(r"_mse: block_mask must be bool \(N, N\)", q, k, p, r, **dense)
    refuses("released code's loss, which has no block_mask", *padded, block_mask=mask,
            count_padded_queries=True)  # fmt: skip


def test_triton_refuses():
    """Wide heads, and a dense mask; whether or not this process can run Triton."""
    limits = dispatch.OPS["attention_score_mse"].triton
    assert "heads of 65 numbers" in limits.refuses(width=65)
    assert "BlockMask.from_dense(mask)" in limits.refuses(width=64, dense_mask=True)
    assert limits.refuses(width=64) is None
