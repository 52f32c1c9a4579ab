"""csrc/attention_score_mse.cpp: each instruction set, tiles and blocks, strides, threads."""

import pytest
import torch

from tinybert_fast import ops
from tinybert_fast.ops import dispatch
from tinybert_fast.testing.budgets import assert_within_budget
from tinybert_fast.testing.operands import attention_score_mse, leaves, normal
from tinybert_fast.tuned import attention_score_mse as tuned

pytestmark = pytest.mark.skipif(
    dispatch.UNAVAILABLE["native"] is not None, reason=str(dispatch.UNAVAILABLE["native"])
)
FORMS = ["direct", "gram"]
BEYOND = (33, 0, 300, 1, 31, 129)  # a tile is 32 queries; a block of keys, and a chunk, 128


DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [(1, 16), (7, 1), (16, 26), (26, 64), (35, 33), (64, 64), (64, 128)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_widths(form, widths, dtype, isa):
    """Narrower than a vector, a whole number of them, and not, of numbers or pairs; an odd one,
    whose last pair is half empty; products of all heights.
    """
    case = attention_score_mse((33, 150), 2, *widths, form=form, dtype=dtype)
    assert_within_budget(case, "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loss", ["full", "student"])
@pytest.mark.parametrize("form", [*FORMS, "auto"])
def test_lengths_beyond_a_block(form, loss, dtype, isa):
    """Odd ones too: of the Gram form's pairs of tokens the last is half empty."""
    assert_within_budget(attention_score_mse(BEYOND, form=form, loss=loss, dtype=dtype), "native")


@pytest.mark.parametrize("widths", [(26, 64), (64, 64), (35, 33)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_but_the_result_is_rounded_to_bf16(form, widths, isa):
    """Hardly a gradient is off by a unit in the last place, as every fourth would be if the error
    were rounded; and the loss is fp32's.
    """
    layout = ops.SequenceLayout.from_lengths(BEYOND)
    operands = [normal((layout.total, 2, widths[n // 2]), n, torch.bfloat16) for n in range(4)]
    call, both = (layout.cu_seqlens, layout.max_length), [True, True]
    forward = torch.ops.tinybert_fast.attention_score_mse_fwd
    loss, *gradients = forward(*operands, *call, form, "full", [], both, "native")
    exact = forward(*(x.double() for x in operands), *call, "direct", "full", [], both, "torch")
    assert loss.item() == pytest.approx(exact[0].item(), rel=1e-5)
    for got, want in zip(gradients, exact[1:], strict=True):
        assert got.dtype == torch.bfloat16
        assert (got != want.bfloat16()).double().mean() < 0.002


def test_auto_takes_the_cheaper_form():
    """Heads of 2 under 2: sequences of 5 tokens take the direct form, longer ones Gram."""
    assert tuned.crossover(2, 2) == 5

    def run(lengths, form):
        return attention_score_mse(lengths, 2, 2, 2, form=form).run("native")

    for length, same, other in ((5, "direct", "gram"), (6, "gram", "direct")):
        auto, want, differs = (run((length,), form) for form in ("auto", same, other))
        torch.testing.assert_close(auto, want, rtol=0.0, atol=0.0)
        assert any(not torch.equal(auto[name], differs[name]) for name in auto)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_strides(form, dtype):
    """Queries and keys of one tensor; heads apart; numbers apart; one row for all."""
    length, heads, width = 40, 3, 26
    mixed = normal((length, 2, heads, width), 1, dtype)
    by_head = normal((heads, length, width), 2, dtype).transpose(0, 1)
    apart = normal((length, heads, 2 * width), 3, dtype)[..., ::2]
    same = normal((1, heads, width), 4, dtype).expand(length, heads, width)
    layout = ops.SequenceLayout.from_lengths((9, 31))

    def run(q, k, p, r):
        q, k = q.requires_grad_(), k.requires_grad_()
        loss = ops.attention_score_mse(q, k, p, r, layout=layout, form=form, impl="native")
        return loss, *torch.autograd.grad(loss, (q, k))

    for operands in ((*mixed.unbind(1), by_head, apart), (apart, same, *mixed.unbind(1))):
        got = run(*(x.detach() for x in operands))
        want = run(*(x.detach().clone(memory_format=torch.contiguous_format) for x in operands))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("form", [*FORMS, "auto"])
def test_threads_change_no_bit(form):
    case = attention_score_mse(BEYOND, 3, form=form)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(case.run("native"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_nan_stays_in_its_sequence(form, dtype):
    """In the gradients; the loss is of all."""
    q, k, p, r = leaves(*((70, 1, 26),) * 4, dtype=dtype)
    k.detach()[50, 0, 3] = torch.nan
    layout = ops.SequenceLayout.from_lengths((40, 30))
    loss = ops.attention_score_mse(
        q, k, p.detach(), r.detach(), layout=layout, form=form, impl="native"
    )
    assert loss.isnan()
    for gradient in torch.autograd.grad(loss, (q, k)):
        assert gradient[:40].isfinite().all()
        assert gradient[40:].isnan().any()


def test_a_teacher_in_another_dtype():
    """As under autocast: a student in bf16 under a teacher in fp32."""
    case = attention_score_mse((40, 3)).narrowed("q_student", "k_student", dtype=torch.bfloat16)
    assert_within_budget(case, "native")
