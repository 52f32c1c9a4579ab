"""Rows of a fixed number: losses and layouts leave dummies out, whatever stands there."""

import pytest
import torch

from tinybert_fast import ops
from tinybert_fast.ops import SequenceLayout
from tinybert_fast.testing.proofs import implementations, serves

LENGTHS, WIDTH, SPARE = (5, 0, 7, 1), 7, 8
FILLINGS = [(7, 1), (0, 0), (2, 6)]  # of dummies: full and short, none, as many as may be
HEADS, D, DT, C, CT = 2, 6, 4, 12, 9
TOLERANCE = {"atol": 1e-6, "rtol": 1e-5}


def capacity_of(filling, device="cpu", spare=SPARE):
    lengths = torch.tensor([*LENGTHS, *filling], device=device)
    total = sum(LENGTHS) + sum(filling)
    return SequenceLayout.of_capacity(lengths, WIDTH, total, dummies=len(filling), spare=spare)


def relation_kl(a, b, c, d, layout, impl):
    return ops.attention_relation_kl(a, b, c, d, relation_heads=2, layout=layout, impl=impl)


def self_relation_kl(a, b, c, d, layout, impl):
    return relation_kl(a, a, c, c, layout, impl)


def score_mse(form):
    def loss(q, k, p, r, layout, impl):
        return ops.attention_score_mse(q, k, p, r, layout=layout, form=form, impl=impl)

    return loss


def hidden_mse(student, teacher, weight, bias, layout, impl):
    return ops.hidden_mse(student, teacher, weight, bias, layout=layout, impl=impl)


def hidden_mse_alone(student, teacher, layout, impl):
    return ops.hidden_mse(student, teacher, layout=layout, impl=impl)


STUDENT, TEACHER = (HEADS, D), (HEADS, DT)
# The loss, its op, trailing sizes of its operands, whole shapes of its weights.
LOSSES = {
    "relation": (relation_kl, "attention_relation_kl", [STUDENT] * 2, [TEACHER] * 2, []),
    "itself": (self_relation_kl, "attention_relation_kl", [STUDENT] * 2, [TEACHER] * 2, []),
    "direct": (score_mse("direct"), "attention_score_mse", [STUDENT] * 2, [TEACHER] * 2, []),
    "gram": (score_mse("gram"), "attention_score_mse", [STUDENT] * 2, [TEACHER] * 2, []),
    "auto": (score_mse("auto"), "attention_score_mse", [STUDENT] * 2, [TEACHER] * 2, []),
    "hidden": (hidden_mse, "hidden_mse", [(C,)], [(CT,)], [(CT, C), (CT,)]),
    "alone": (hidden_mse_alone, "hidden_mse", [(C,)], [(C,)], []),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CALLS = [
    (name, impl)
    for name, (_, op, *_) in LOSSES.items()
    for one in (*implementations(op), "reference")
    if serves(op, one, torch.float32, DEVICE)
    for impl in ((one,) if one == "reference" else (one, (one, "reference")))
]


@pytest.mark.parametrize("filling", [*FILLINGS, None], ids=str)
@pytest.mark.parametrize(("name", "impl"), CALLS, ids=lambda x: str(x).replace("'", ""))
def test_losses_leave_dummies_out(name, impl, filling, device):
    loss, _, students, teachers, weights = LOSSES[name]
    spare = SPARE
    if filling is None:  # a batch so small that any row may be a dummy's
        filling, spare = (3, 0), sum(LENGTHS) + 3
    draw = torch.Generator().manual_seed(0)
    real, more = sum(LENGTHS), sum(filling)

    def normal(*shape):
        return torch.randn(shape, generator=draw).to(device)

    ours, theirs = ([normal(real, *tail) for tail in tails] for tails in (students, teachers))
    affine = [normal(*shape) for shape in weights]
    found = []
    for layout, behind in (
        (SequenceLayout.from_lengths(LENGTHS, WIDTH, device), None),
        (capacity_of(filling, device, spare), 1.0),
        (capacity_of(filling, device, spare), 1e4),
    ):

        def longer(x, behind=behind):
            if behind is None:
                return x
            return torch.cat((x, torch.full((more, *x.shape[1:]), behind, device=device)))

        leaves = [x.clone().requires_grad_() for x in (*map(longer, ours), *affine)]
        operands = [*leaves[: len(ours)], *map(longer, theirs), *leaves[len(ours) :]]
        value = loss(*operands, layout, impl)
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        found.append((value.detach(), *(g for g in gradients if g is not None)))
    want, got, again = found
    for one, other in zip(got, again, strict=True):  # not a bit depends on what stands there
        assert torch.equal(one, other)
    for whole, expected in zip(got, want, strict=True):
        if whole.shape != expected.shape:
            assert not whole[real:].any()
            whole = whole[:real]
        torch.testing.assert_close(whole, expected, **TOLERANCE)


@pytest.mark.parametrize("filling", FILLINGS, ids=str)
def test_the_layout_is_that_of_all_sequences(filling, device):
    layout = capacity_of(filling, device)
    want = SequenceLayout.from_lengths((*LENGTHS, *filling), WIDTH, device)
    for name in ("cu_seqlens", "rows", "sequences", "positions", "columns"):
        assert torch.equal(getattr(layout, name), getattr(want, name))
        assert getattr(layout, name).dtype == getattr(want, name).dtype
    for ours, theirs in ((layout.work, want.work), (layout.padded_work, want.padded_work)):
        assert sorted(ours.tolist()) == sorted(theirs.tolist())
    assert (layout.total, layout.max_length, layout.is_full) == (want.total, WIDTH, False)
    counted = layout.counted
    real = SequenceLayout.from_lengths(LENGTHS, WIDTH, device)
    for name in ("cu_seqlens", "work", "padded_work"):
        assert torch.equal(getattr(counted, name), getattr(real, name))
    assert counted.counted is counted
    assert counted.work.data_ptr() % 16 == 0
    dead = [row >= real.total for row in range(layout.total)][-SPARE:]
    assert counted.dead.tolist() == dead


def test_dummies_are_packed_and_never_padded(device):
    layout = capacity_of((7, 1), device)
    ids = torch.arange(6 * WIDTH, device=device).view(6, WIDTH)
    packed = layout.pack(ids)
    assert len(packed) == layout.total
    padded = layout.pad(packed, fill=-1)
    live = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    assert torch.equal(padded.cpu(), ids[:4].cpu().masked_fill(~live, -1))


def test_no_one_reads_lengths_that_the_device_knows(device):
    layout = capacity_of((7, 1), device)
    for read in (list, len, lambda lengths: 0 in lengths, lambda lengths: lengths == (1,)):
        with pytest.raises(ValueError, match="on the device alone"):
            read(layout.lengths)


def test_the_layout_of_hidden_states_is_checked():
    with pytest.raises(ValueError, match=r"leading sizes \(21,\); got \(3, 4\)"):
        ops.hidden_mse(torch.ones(3, 4), torch.ones(3, 4), layout=capacity_of((7, 1)))
