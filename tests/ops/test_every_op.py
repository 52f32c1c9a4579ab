"""What holds of every op alike: mixed precision, autocast, strides, partial, repeated backward."""

import contextlib
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from tinybert_fast import ops
from tinybert_fast.ops import dispatch
from tinybert_fast.ops.dispatch import INTERPRETED
from tinybert_fast.testing import operands, proofs
from tinybert_fast.testing.budgets import assert_within_budget
from tinybert_fast.testing.operands import FACTORIES, is_float
from tinybert_fast.testing.proofs import implementations

HALF = torch.float16 if INTERPRETED else torch.bfloat16  # Triton's interpreter has no bf16

# What autocast gives each op: these operands from a linear layer, the rest fp32 parameters,
# residuals and fp32 teachers.
FROM_LINEAR = {
    "attention": ("q", "k", "v"),
    "attention_relation_kl": ("a_student", "b_student"),
    "attention_score_mse": ("q_student", "k_student"),
    "bias_gelu": ("x",),
    "dropout_add_layer_norm": ("x",),
    "embedding_layer_norm": (),
    "hidden_mse": ("student",),
    "layer_norm": ("x",),
    "linear_cross_entropy": ("hidden",),
    "soft_cross_entropy": ("student_logits",),
}
VALUE = {"attention": HALF, "bias_gelu": HALF, "layer_norm": HALF}
MULTIPLY_BY_A_PARAMETER = ("hidden_mse", "linear_cross_entropy")
PACKED = (
    "attention", "attention_relation_kl", "attention_score_mse", "dropout_add_layer_norm",
    "embedding_layer_norm", "hidden_mse",
)  # fmt: skip
DROPPING = ("attention", "dropout_add_layer_norm", "embedding_layer_norm")

each_op = pytest.mark.parametrize("op", FACTORIES)


@pytest.fixture(params=["triton", "native", "torch", "pair", "reference"])
def impl(request):
    return ("torch", "reference") if request.param == "pair" else request.param


def mixed(op, device):
    return FACTORIES[op](device=device).narrowed(*FROM_LINEAR[op], dtype=HALF)


@each_op
def test_mixed_precision(op, impl, device):
    """Products in the dtype of the first operand, all else fp32, each gradient in its operand's."""
    case = mixed(op, device)
    assert_within_budget(case, impl)
    found = case.run(impl)
    assert found.pop("value").dtype == VALUE.get(op, torch.float32)
    assert [g.dtype for g in found.values()] == [x.dtype for x in case.leaves()]


@each_op
def test_autocast_does_not_reach_inside(op, impl, device):
    case = mixed(op, device)
    want = case.run(impl)
    torch.testing.assert_close(autocast_run(case, impl), want, rtol=0.0, atol=0.0)


def autocast_run(case, impl, **options):
    """Autocast around the forward, as it is in training."""

    def wrap(function):
        def call(*leaves):
            with torch.autocast(leaves[0].device.type, HALF):
                return function(*leaves)

        return call

    return case.run(impl, wrap, **options)


@pytest.mark.parametrize("op", MULTIPLY_BY_A_PARAMETER)
def test_autocast_decides_for_a_product_with_a_parameter(op, impl, device):
    """As in ``F.linear``: fp32 operands are multiplied in autocast's dtype."""
    case = FACTORIES[op](device=device)
    want = mixed(op, device).run(impl)
    got = autocast_run(case, impl, upstream_dtype=HALF)
    student = next(name for name in want if name != "value")
    want[student] = want[student].float()
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float64], ids=str)
@pytest.mark.parametrize("op", MULTIPLY_BY_A_PARAMETER)
def test_autocast_leaves_fp64_alone(op, impl, dtype, device):
    double = FACTORIES[op](device=device).to(dtype)
    want = double.run(impl)
    torch.testing.assert_close(autocast_run(double, impl), want, rtol=0.0, atol=0.0)


@each_op
def test_compiles_under_autocast(op, device):
    with torch.autocast(device, HALF):
        proofs.prove_compiles(mixed(op, device), "torch")


LARGE = {  # gradients of a mean over many entries
    "attention_relation_kl": partial(operands.attention_relation_kl, (60,) * 8),
    "attention_score_mse": partial(operands.attention_score_mse, (60,) * 8),
    "hidden_mse": partial(operands.hidden_mse, (300,)),
    "linear_cross_entropy": partial(operands.linear_cross_entropy, 2000, 2000, 8, 50),
    "soft_cross_entropy": partial(operands.soft_cross_entropy, 4000, 30),
}


@pytest.mark.parametrize("op", LARGE)
def test_loss_scale_of_fp16(op, device):
    """Gradients that fp16 holds only when scaled, under a scale that fp16 does not hold."""
    case = LARGE[op](device=device).to(torch.float16)
    exact, scale = case.to(torch.float64), 2.0**16
    want = torch.autograd.grad(exact.function("reference")(*exact.leaves()), exact.leaves())
    got = torch.autograd.grad(case.function("torch")(*case.leaves()) * scale, case.leaves())
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.double() / scale - theirs).norm() <= 1e-3 * theirs.norm()


@each_op
def test_any_strides(op, impl, device):
    """Operands and upstream gradient may be transposed, strided or expanded views."""
    prove_any_strides(FACTORIES[op](device=device), impl)


SMALL = {
    "bias_gelu": [
        partial(operands.bias_gelu, (2, 3, 24)),
        partial(operands.bias_gelu, (2, 3, 24), 16),
    ],
    "dropout_add_layer_norm": [partial(operands.dropout_add_layer_norm, (1, 16, 12))],
    "hidden_mse": [
        partial(operands.hidden_mse, (5,), 12, 24),
        partial(operands.hidden_mse, (5,), 12, 12, projection="none"),
    ],
    "layer_norm": [partial(operands.layer_norm, (2, 3, 12))],
    "linear_cross_entropy": [partial(operands.linear_cross_entropy, 5, 3, 12, 24)],
    "soft_cross_entropy": [operands.soft_cross_entropy],
}


@pytest.mark.parametrize("fast", ["triton", "torch"])
@pytest.mark.parametrize("op", SMALL)
def test_any_strides_compiled(op, fast, device):
    """inductor holds outputs to the strides that the fakes announced."""
    for factory in SMALL[op]:
        torch._dynamo.reset()
        case = factory(device=device)
        prove_any_strides(case, fast, partial(torch.compile, fullgraph=True))
        proofs.prove_contract(case.strided(), fast)


def prove_any_strides(case, impl, wrap=lambda f: f):
    def backward(case, wrap):
        leaves = case.leaves()
        value = wrap(case.function(impl))(*leaves)
        return value, torch.autograd.grad(value.sum(), leaves)  # an expanded upstream gradient

    got, want = backward(case.strided(), wrap), backward(case, lambda f: f)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("op", [*PACKED[:3], "dropout_add_layer_norm", "embedding_layer_norm"])
def test_no_layout_is_made(op, impl, device, monkeypatch):
    """Of a batch without padding, or where nothing is dropped, no places of tokens are made."""
    case = FACTORIES[op](device=device)
    options = {name: x for name, x in case.options.items() if name != "layout"}
    if op in PACKED[:3]:
        case = replace(case, operands=tuple(x[None] for x in case.operands))
    monkeypatch.setattr(ops.SequenceLayout, "full", None)
    monkeypatch.setattr(torch, "div", None)
    case.op(*case.operands, **options, impl=impl)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lengths", [(0, 0), ()], ids=str)
@pytest.mark.parametrize("op", PACKED[:3])
def test_nothing_of_any_strides(op, lengths, padded, impl, device):
    """No token, no sequence: a zero with a graph, of operands whose strides say nothing."""
    case = FACTORIES[op](lengths, device=device)
    options = case.options
    sizes = (len(lengths), 0) if padded else (0,)
    if padded:
        options = {name: x for name, x in options.items() if name != "layout"}
    given = tuple(
        x.new_empty(*sizes, x.shape[-1], x.shape[-2]).mT.requires_grad_(x.requires_grad)
        for x in case.operands
    )
    leaves = [x for x in given if x.requires_grad]
    value = case.op(*given, **options, impl=impl)
    assert not value.any()
    for x, gradient in zip(leaves, torch.autograd.grad(value.sum(), leaves), strict=True):
        assert gradient.shape == x.shape


@each_op
def test_a_gradient_alone(op, impl, device):
    """Frozen operands get none and change nothing for the others."""
    case = FACTORIES[op](device=device)
    want = case.run(impl)
    for name in case.trained():
        alone = case.freeze(*(other for other in case.trained() if other != name)).run(impl)
        assert alone.keys() == {"value", f"d{name}"}
        torch.testing.assert_close(alone[f"d{name}"], want[f"d{name}"])


@each_op
def test_no_gradient_at_all(op, impl, device):
    case = FACTORIES[op](device=device)
    with torch.no_grad():
        value = case.op(*case.operands, **case.options, impl=impl)
    assert not value.requires_grad
    torch.testing.assert_close(value, case.run(impl)["value"], rtol=0.0, atol=0.0)


class Outputs(TorchDispatchMode):
    """What this package's registered operators give; outer modes see what runs inside them."""

    def __init__(self):
        super().__init__()
        self.given = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != dispatch.NAMESPACE:
            return func(*args, **(kwargs or {}))
        with self:  # a mode is off while it handles a call
            found = func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)
        self.given[func._opname] = found
        return found


@pytest.mark.parametrize("op", [*LARGE, "embedding_layer_norm"])
def test_only_wanted_gradients(op, impl, device):
    """What a frozen operand, no_grad or a reference's backward does not read is not handed out."""
    case = FACTORIES[op](device=device)
    name, values = (f"{op}_fwd", 1) if op in LARGE else (f"{op}_bwd", 0)
    for trained in (*([one] for one in case.trained()), case.trained()):
        with Outputs() as seen:
            case.freeze(*(other for other in case.trained() if other not in trained)).run(impl)
        if name in seen.given:  # a reference is no operator
            gradients = [x for x in seen.given[name][values:] if x.numel()]
            assert len(gradients) == (0 if isinstance(impl, tuple) else len(trained))
    with torch.no_grad(), Outputs() as seen:
        case.op(*case.operands, **case.options, impl=impl)
    if name in seen.given:
        assert not any(x.numel() for x in seen.given[name][values:])


FROZEN = {  # op -> what makes it cheaper to freeze
    "attention_relation_kl": (),
    "attention_score_mse": (),
    "hidden_mse": ("weight",),
    "linear_cross_entropy": ("weight",),
}
CUBLAS = ("hidden_mse", "linear_cross_entropy")  # whose products triton leaves to PyTorch
# PyTorch's own formula does not know the form that names a dtype.
COUNTED = {torch.ops.aten.addmm: lambda _, a, b, *dtype, **named: 2 * a[0] * a[1] * b[1]}


@pytest.mark.parametrize(
    ("op", "impl"), [*((op, "torch") for op in FROZEN), *((op, "triton") for op in CUBLAS)]
)
def test_only_wanted_products(op, impl, device):
    case = FACTORIES[op](device=device)
    flops = []
    for some in {(), FROZEN[op], tuple(case.trained())}:
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter, Outputs():
            one = case.freeze(*some)
            one.op(*one.operands, **one.options, impl=impl)
        flops.append((len(some), counter.get_total_flops()))
    counts = [count for _, count in sorted(flops)]
    assert counts == sorted(set(counts), reverse=True), counts


def products(case, impl, *inside):
    """FLOPs of both passes, as PyTorch's counter has them."""
    dispatch.count_flops()
    with contextlib.ExitStack() as modes:
        counter = FlopCounterMode(display=False, custom_mapping=COUNTED)
        for mode in (counter, *inside):
            modes.enter_context(mode)
        case.function(impl)(*case.leaves()).sum().backward()
    return counter.get_total_flops()


LOSSES = [
    {"form": f, "loss": loss} for f in ("direct", "gram", "auto") for loss in ("full", "student")
]


@pytest.mark.parametrize(
    ("op", "options"),
    [
        ("attention", {"dropout_p": 0.25}),  # in products that a counter sees
        ("attention_relation_kl", {}),
        *(("attention_score_mse", options) for options in LOSSES),
        ("hidden_mse", {}),
        ("linear_cross_entropy", {}),
    ],
    ids=str,
)
def test_counters_know_the_products(op, options, device):
    """An operator's formula gives what is counted inside of it, whatever is frozen."""
    whole = FACTORIES[op](device=device, **options).freeze("bias")  # whose sum is a product to some
    for frozen in ((), *((name,) for name in whole.trained()[1:])):
        case = whole.freeze(*frozen)
        found = products(case, "torch")
        assert found == products(case, "torch", Outputs()) > 0


@pytest.mark.parametrize("impl", implementations("attention"))
def test_attention_counts_pairs_of_tokens(impl, device):
    """Of a head (n, D): two products in the forward, five in the backward."""
    case = FACTORIES["attention"](device=device)
    pairs = sum(n * n for n in case.options["layout"].lengths)
    assert products(case, impl) == 7 * 2 * pairs * case.operands[0][0].numel()


@pytest.mark.parametrize(
    ("name", "shapes", "options", "flops"),
    [
        ("linear_gelu_fwd", [(5, 8), (16, 8), (16,)], (), 2 * 5 * 8 * 16),
        (
            "feed_forward_fp8_fwd",
            [(5, 8), (9, 8), (9,), (9,), (3, 9), (3,), (3,), (2,)],
            (),
            2 * 5 * 9 * (8 + 3),
        ),
        # Lengths that nobody can read are the longest there can be.
        (
            "attention_fwd",
            [(12, 2, 4), (12, 2, 4), (12, 2, 4), (4,)],
            (None, 7, 1.0, "both", 0.0, None, 0, []),
            2 * 2 * 3 * 7 * 7 * 2 * 4,
        ),
        (
            "attention_stack_bwd",
            [
                (9, 2, 4),
                (9, 3, 2, 4),
                (9, 2, 4),
                (9, 2, 4),
                (9, 2, 4),
                (9, 2, 4),
                (9, 2),
                (2,),
                (2,),
            ],
            (None, 9, 1.0, "both", 0.0, None, 0, []),
            2 * 5 * 9 * 9 * 2 * 4,
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_counters_know_the_products_of_kernels(name, shapes, options, flops):
    dispatch.count_flops()
    tensors = [torch.empty(shape, device="meta") for shape in shapes]
    with FlopCounterMode(display=False) as counter:
        getattr(torch.ops.tinybert_fast, name)(*tensors, *options, "triton")
    assert counter.get_total_flops() == flops


@each_op
def test_backward_twice(op, impl, device):
    twice(FACTORIES[op](device=device), impl)


@pytest.mark.same_mask
@pytest.mark.parametrize("op", DROPPING)
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_backward_twice_replays_dropout(op, impl, device):
    twice(FACTORIES[op](device=device, dropout_p=0.25), impl)


def twice(case, impl):
    """Kept graphs give the same gradients again; two uses of an operand add up."""
    leaves = case.leaves()
    value = case.function(impl)(*leaves).sum()
    first = torch.autograd.grad(value, leaves, retain_graph=True)
    again = torch.autograd.grad(value, leaves)
    torch.testing.assert_close(again, first, rtol=0.0, atol=0.0)
    both = case.function(impl)(*leaves).sum() + case.function(impl)(*leaves).sum()
    torch.testing.assert_close(torch.autograd.grad(both, leaves), tuple(2 * g for g in first))


@each_op
def test_nobody_is_recorded_without_a_gradient(op, impl, device, monkeypatch):
    """The same value without autograd's part."""
    case = FACTORIES[op](device=device)
    want = case.function(impl)(*case.leaves()).detach()
    monkeypatch.setattr(torch.autograd.Function, "apply", None)
    with torch.no_grad():
        torch.testing.assert_close(case.function(impl)(*case.leaves()), want, rtol=0.0, atol=0.0)
    frozen = case.freeze(*case.trained())
    torch.testing.assert_close(
        frozen.op(*frozen.operands, **frozen.options, impl=impl), want, rtol=0.0, atol=0.0
    )


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack((x, x))),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}


@each_op
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_torch_func_transforms_the_reference_alone(op, transform, impl, device):
    whole = FACTORIES[op](device=device)
    case = whole.freeze(*whole.trained()[1:])
    (leaf,) = case.leaves()
    call = partial(TRANSFORMS[transform], case.function(impl), leaf.detach())
    if impl == "reference":
        call()
    else:
        with pytest.raises(ValueError, match='impl="reference"'):
            call()


@each_op
@pytest.mark.parametrize("impl", ["triton", "native", "torch"])  # a reference is plain PyTorch
def test_refuses_forward_mode(op, impl, device):
    """A tangent would be lost between addresses."""
    case = FACTORIES[op](device=device)
    leaves = [x.detach() for x in case.leaves()]
    with torch.no_grad(), forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, torch.ones_like(x)) for x in leaves]
        with pytest.raises(RuntimeError, match=r"jvp|forward AD"):
            case.function(impl)(*duals)


@each_op
def test_gradients_accumulate(op, impl, device):
    """Leaves keep the gradients of a backward, and add to them in place: no two are one memory."""
    proofs.prove_accumulates(FACTORIES[op](device=device), impl)


@each_op
def test_no_second_derivative(op, device):
    """The tuned backwards are not differentiable, and say so instead of giving zeros."""
    case = FACTORIES[op](device=device)
    leaves = case.leaves()
    value = case.function("torch")(*leaves).square().sum()
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in gradients).backward()


@each_op
def test_deterministic(op, impl, device):
    first, second = (FACTORIES[op](device=device).run(impl) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0.0, atol=0.0)


@each_op
def test_operands_are_left_alone(op, impl, device):
    case = FACTORIES[op](device=device)
    before = [x.detach().clone() if is_float(x) else None for x in case.operands]
    value = case.function(impl)(*case.leaves())
    value.sum().backward()
    for x, copy in zip(case.operands, before, strict=True):
        if copy is not None:
            torch.testing.assert_close(x.detach(), copy, rtol=0.0, atol=0.0)


NEGATED = {
    "conj": lambda x: torch.complex(-x, -x).conj().imag,
    "contiguous": lambda x: torch._neg_view(-x),
}


@each_op
@pytest.mark.parametrize("view", NEGATED)
def test_negative_views(op, view, impl, device):
    """Whose memory holds the negative of their values, which whoever reads it as it lies gets."""
    case = FACTORIES[op](device=device)
    given = tuple(
        NEGATED[view](x.detach()).requires_grad_(x.requires_grad) if is_float(x) else x
        for x in case.operands
    )
    assert all(x.is_neg() for x in given if is_float(x))

    def run(operands):
        leaves = [x for x in operands if is_float(x) and x.requires_grad]
        value = case.op(*operands, **case.options, impl=impl)
        return value, torch.autograd.grad(value.square().sum(), leaves)

    torch.testing.assert_close(run(given), run(case.operands))


@each_op
def test_operands_on_two_devices(op, impl, device):
    case = FACTORIES[op](device=device)
    for i, x in enumerate(case.operands):
        if isinstance(x, torch.Tensor):
            given = (*case.operands[:i], x.to("meta"), *case.operands[i + 1 :])
            with pytest.raises(ValueError, match="meta"):
                case.op(*given, **case.options, impl=impl)


@pytest.mark.parametrize("op", PACKED)
def test_layout_of_something_else(op, impl, device):
    case = FACTORIES[op](device=device)
    tokens = len(case.operands[0])
    elsewhere = ops.SequenceLayout.from_lengths((tokens,), device="meta")
    more = ops.SequenceLayout.from_lengths((tokens + 1,), device=device)
    for layout, complaint in (
        (torch.ones(1, tokens, device=device), "layout is Tensor; expected a SequenceLayout"),
        (elsewhere, "layout is on meta"),
        (more, rf"leading sizes \({tokens + 1},\); got \({tokens}, "),
    ):
        with pytest.raises(ValueError, match=f"{op}: .*{complaint}"):
            case.op(*case.operands, **{**case.options, "layout": layout}, impl=impl)


@pytest.mark.parametrize("op", DROPPING)
def test_seed_and_site(op, impl, device):
    case = FACTORIES[op](device=device, dropout_p=0.1)
    impl = impl if isinstance(impl, str) else "torch"  # that pair drops nothing
    column = torch.ones(2, 3, dtype=torch.int64, device=device)[:, 1]
    for wrong, complaint in (
        ({"seed": column}, r"needs seed, a contiguous int64 .* got torch.int64 \(2,\) of strides"),
        ({"site": -1}, "site=-1; expected an integer from 0 to 4294967295"),
        ({"site": 2**32}, "site=4294967296; expected an integer"),
        ({"site": 1.5}, "site=1.5; expected an integer"),
    ):
        with pytest.raises(ValueError, match=f"{op}: .*{complaint}"):
            case.with_options(**wrong).run(impl)
    case.with_options(site=2**32 - 1).run(impl)


TEACHERS = {  # op -> the operands that are the teacher's
    "attention_relation_kl": (2, 3),
    "attention_score_mse": (2, 3),
    "hidden_mse": (1,),
    "soft_cross_entropy": (1,),
}


@pytest.mark.parametrize("op", TEACHERS)
def test_teacher_gets_no_gradient_and_may_be_inference_only(op, impl, device):
    case = FACTORIES[op](device=device)
    want = case.run(impl)
    for made_in in (contextlib.nullcontext, torch.inference_mode):
        given = list(case.operands)
        for i in TEACHERS[op]:
            with made_in():
                teacher = given[i].clone()
            given[i] = teacher if teacher.is_inference() else teacher.requires_grad_()
        value = case.op(*given, **case.options, impl=impl)
        teachers = [x for x in (given[i] for i in TEACHERS[op]) if x.requires_grad]
        assert torch.equal(value, want["value"])
        found = torch.autograd.grad(value, [*case.leaves(), *teachers], allow_unused=True)
        assert all(g is None for g in found[len(case.leaves()) :])
        assert all(g is not None for g in found[: len(case.leaves())])
