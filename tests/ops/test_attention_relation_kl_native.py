"""csrc/attention_relation_kl.cpp: each instruction set, tiles of queries, strides, threads."""

import pytest
import torch

from tinybert_fast import ops
from tinybert_fast.ops import dispatch
from tinybert_fast.testing.budgets import assert_within_budget
from tinybert_fast.testing.operands import attention_relation_kl, leaves, normal, with_itself

pytestmark = pytest.mark.skipif(
    dispatch.UNAVAILABLE["native"] is not None, reason=str(dispatch.UNAVAILABLE["native"])
)
DTYPES = [torch.float32, torch.bfloat16]
BEYOND = (33, 0, 300, 1, 31, 129)  # a tile is 32 queries
# Numbers of a relation head, of student and teacher.
WIDTHS = [(1, 16), (7, 1), (16, 26), (26, 64), (35, 33), (78, 64), (64, 128)]
kinds = pytest.mark.parametrize("kind", [lambda case: case, with_itself], ids=["a_b", "itself"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@kinds
def test_widths(kind, widths, dtype, isa):
    """Narrower than a vector, a whole number of them, and not, of numbers or pairs; an odd one,
    whose last pair is half empty.
    """
    width, teacher = widths
    case = attention_relation_kl((33, 150), 2, width, 2, teacher, 2, dtype=dtype)
    assert_within_budget(kind(case), "native")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_lengths_beyond_a_tile(kind, dtype, isa):
    assert_within_budget(kind(attention_relation_kl(BEYOND, dtype=dtype)), "native")


def run(operands, layout, relation_heads=3):
    a, b, *teacher = operands
    a = a.requires_grad_()
    leaves_ = (a,) if a is b else (a, b.requires_grad_())
    loss = ops.attention_relation_kl(
        a, leaves_[-1], *teacher, relation_heads=relation_heads, layout=layout, impl="native"
    )
    return loss, *torch.autograd.grad(loss, leaves_)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_strides(dtype):
    """Queries and keys of one tensor; heads apart; numbers apart; one row for all."""
    length, heads, width = 40, 3, 26
    mixed = normal((length, 2, heads, width), 1, dtype)
    by_head = normal((heads, length, width), 2, dtype).transpose(0, 1)
    apart = normal((length, heads, 2 * width), 3, dtype)[..., ::2]
    same = normal((1, heads, width), 4, dtype).expand(length, heads, width)
    layout = ops.SequenceLayout.from_lengths((9, 31))
    for operands in ((*mixed.unbind(1), by_head, apart), (apart, same, *mixed.unbind(1))):
        got = run([x.detach() for x in operands], layout)
        packed = [x.detach().clone(memory_format=torch.contiguous_format) for x in operands]
        assert all(torch.equal(*two) for two in zip(got, run(packed, layout), strict=True))


@kinds
def test_threads_change_no_bit(kind):
    case = kind(attention_relation_kl(BEYOND, 3, 26, 3, 64, 3))
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
def test_nan_stays_in_its_sequence(dtype):
    """In the gradients; the loss is of all."""
    a, b, c, d = (x.detach() for x in leaves(*((70, 1, 26),) * 4, dtype=dtype))
    b[50, 0, 3] = torch.nan
    layout = ops.SequenceLayout.from_lengths((40, 30))
    loss, *gradients = run((a, b, c, d), layout, relation_heads=1)
    assert loss.isnan()
    for gradient in gradients:
        assert gradient[:40].isfinite().all()
        assert gradient[40:].isnan().any()


def test_equal_relations_have_no_loss_and_no_gradient():
    a, b = (normal((77, 2, 26), n) for n in (1, 2))
    layout = ops.SequenceLayout.from_lengths((77,))
    loss, *gradients = run((a, b, a.clone(), b.clone()), layout, relation_heads=2)
    assert abs(loss.item()) < 1e-6
    assert all(gradient.abs().max() < 1e-7 for gradient in gradients)


def test_a_teacher_in_another_dtype():
    """As under autocast: a student in bf16 under a teacher in fp32."""
    case = attention_relation_kl((40, 3)).narrowed("a_student", "b_student", dtype=torch.bfloat16)
    assert_within_budget(case, "native")
