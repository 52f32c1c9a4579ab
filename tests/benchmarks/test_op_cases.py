"""Cases of single ops: providers agree, a wrong one is refused, work is what a hand counts."""

import itertools
import re
import sys
from functools import partial
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from tinybert_fast.benchmarks import checking, measuring
from tinybert_fast.benchmarks.baselines.attention import padded_heads, sdpa
from tinybert_fast.benchmarks.breakdown import breakdown
from tinybert_fast.benchmarks.case import Case, Check, Disagreement, Setup, Work
from tinybert_fast.benchmarks.cases import (
    attention,
    attention_relation_kl,
    attention_score_mse,
    bias_gelu,
    dropout_add_layer_norm,
    embedding_layer_norm,
    feed_forward_fp8,
    hidden_mse,
    layer_norm,
    linear_cross_entropy,
)
from tinybert_fast.benchmarks.cases.op_case import compiled
from tinybert_fast.benchmarks.clocks import Clock
from tinybert_fast.benchmarks.op_call import Fastest, OpCall

CPU = torch.device("cpu")
CLOCK = Clock(CPU)
SMOKE = Setup(CPU, smoke=True)


def first(cases, setup=SMOKE):
    """Its forward."""
    return next(cases(setup))


def case_of(*providers, optional=()):
    others = tuple(provider.name for provider in providers[1:])
    return Case(
        "made up", 1, 4, 4, 0.1, "none", list(providers), (Check("x", "a", others),),
        optional=optional,
    )  # fmt: skip


def refuses(x, **options):
    raise RuntimeError("no kernel for this")


def refuses_dropout(x, *, dropout_p):
    return refuses(x) if dropout_p else x * 2


def doubles(x, *, dropout_p=0.0):
    return x + x


# ---- providers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("op", "wrong"),
    [
        (attention, lambda q, k, v, **_: q + k + v),
        (layer_norm, lambda x, weight, bias, **_: x * weight + bias),
        (dropout_add_layer_norm, lambda x, b, r, weight, bias, **_: (x + b + r) * weight + bias),
        (
            embedding_layer_norm,
            lambda i, t, p, w, *rest, **_: w[i] * rest[2] + rest[3] + rest[0][0],
        ),
        (bias_gelu, lambda x, bias, **_: torch.tanh(x + bias)),
        (hidden_mse, lambda s, t, w, b, **_: (s @ w.T + b - t).abs().mean()),
        (linear_cross_entropy, lambda h, w, b, *_, **how: (h @ w.T + b).square().mean()),
    ],
    ids=lambda x: getattr(x, "__name__", "").rpartition(".")[2],
)
def test_a_wrong_op_is_refused(op, wrong, dtype, monkeypatch):
    name = op.__name__.rpartition(".")[2]
    assert "ours" in checking.check(first(next(iter(op.CASES.values()))), dtype)
    monkeypatch.setattr(op.ops, name, wrong)
    with pytest.raises((Disagreement, RuntimeError), match=r"does not compute|unused"):
        checking.check(first(next(iter(op.CASES.values()))), dtype)


def test_a_feed_forward_block_is_held_to_bf16_but_for_its_rounding(monkeypatch):
    """PyTorch's own parts in e4m3 and ours, by its reference; a GPU times them, in bf16 alone."""
    build = feed_forward_fp8.CASES["feed_forward_fp8_d768"]
    case = first(build)
    assert case.dtypes == ("bf16",)
    operands = case.providers[0].operands
    scaled = feed_forward_fp8.ScaledProducts(operands[1:])
    case.providers.append(OpCall("scaled_mm", "scaled_mm", scaled, operands, 0))
    (check,) = case.checks
    case.checks = (Check(check.what, check.reference, (*check.others, "scaled_mm"), 0.05),)
    found = checking.check(case, "bf16")
    assert found.keys() == {"ours bf16", "ours", "reference", "scaled_mm"}
    assert found["ours bf16"][0] < 0.01 < found["ours"][0] < 0.05
    assert found["scaled_mm"][0] == pytest.approx(found["ours"][0], rel=0.2)
    wrong = lambda x, weights, **_: 1.1 * x  # noqa: E731
    monkeypatch.setattr(feed_forward_fp8.ops, "feed_forward_fp8", wrong)
    with pytest.raises(Disagreement, match="'ours' does not compute what 'eager' computes"):
        checking.check(first(build), "bf16")


@pytest.mark.parametrize(
    ("op", "name", "adds"),
    [(bias_gelu, "bias_gelu_d1200", 0), (dropout_add_layer_norm, "dropout_add_layer_norm_d312", 1)],
)
def test_as_it_comes_the_bias_is_added_by_the_layer(op, name, adds):
    """The forward adds the residual alone, the backward sums the bias's gradient."""

    forward, _, both = op.CASES[name](SMOKE)
    for case, sums in ((forward, 0), (both, 1)):
        run = partial(case.providers[0].run, "fp32")
        calls = {one["name"]: one["calls"] for one in breakdown(run, CPU)["operators"]}
        assert (calls.get("aten::add", 0), calls.get("aten::sum", 0)) == (adds, sums)
    assert max(checking.check(forward, "fp32")["ours"]) < 1e-5


def test_the_reference_is_timed_beside_ours(monkeypatch):
    """On operands of its own, which ours has not just read."""
    case = first(dropout_add_layer_norm.CASES["dropout_add_layer_norm_d312"])
    op, by = dropout_add_layer_norm.ops.dropout_add_layer_norm, []

    def noted(*operands, impl="auto", **options):
        by.append(impl)
        return op(*operands, impl=impl, **options)

    monkeypatch.setattr(dropout_add_layer_norm.ops, "dropout_add_layer_norm", noted)
    ours, reference = measuring.measure(case, ("fp32",), 1, 1, CLOCK, {})[-2:]
    assert (ours["provider"], reference["provider"]) == ("ours", "reference")
    assert set(by) == {"auto", "reference"}
    assert reference["role"] == "reference"
    assert reference["speedup_a"] > 0
    mine, its = (one._sets("fp32")[0] for one in case.providers[-2:])
    assert all(torch.equal(*two) for two in zip(mine, its))
    assert mine[0].data_ptr() != its[0].data_ptr()


def test_every_setting_of_attention_agrees():
    """Ragged heads of 26, which go through padding, packing and a mask."""
    case = first(attention.MORE_CASES["attention_d26_ragged"])
    reference, careful = case.providers[0], case.providers[1]
    assert list(careful.calls) == ["sdpa", "flash", "math"]
    exact = reference.outcome("", "fp32")
    for call, setting in [(c, s) for c in careful.calls.values() for s in c.ops]:
        call._chosen["fp32"] = setting
        if call.name != "flash":  # takes no mask
            errors, _ = checking.errors_between(exact, call.outcome("", "fp32"))
            assert max(errors) < 1e-5
    with pytest.raises(RuntimeError):
        careful.calls["flash"].tune("fp32", lambda call: call())


def test_the_row_of_sdpa_names_its_backend():
    with_dropout = first(attention.CASES["attention_d26"]).providers[0]
    assert with_dropout.setting("fp32") == "math"  # no other of a CPU's has dropout
    without = first(attention.MORE_CASES["attention_d26_no_dropout"]).providers[0]
    assert without.setting("fp32") == "flash_attention"


@pytest.fixture
def xformers(monkeypatch):
    """A double of the package, called as version 0.0.35 is, with SDPA of each sequence inside. Its
    calls: shape of the queries, lengths and device of the mask, p, scale."""
    calls = []

    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            mask = cls()
            mask.lengths, mask.device = q_seqlen, device
            return mask

    def memory_efficient_attention(
        query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None
    ):
        calls.append((tuple(query.shape), tuple(attn_bias.lengths), attn_bias.device, p, scale))
        if query.shape[-1] % 8:
            raise NotImplementedError("No operator found for `memory_efficient_attention_forward`")
        apart = (x.transpose(1, 2).split(attn_bias.lengths, 2) for x in (query, key, value))
        attend = partial(F.scaled_dot_product_attention, dropout_p=p, scale=scale)
        return torch.cat([attend(*sequence) for sequence in zip(*apart)], 2).transpose(1, 2)

    package, operators, fmha = map(ModuleType, ("xformers", "xformers.ops", "xformers.ops.fmha"))
    operators.memory_efficient_attention = memory_efficient_attention
    fmha.BlockDiagonalMask = BlockDiagonalMask
    for module in (package, operators, fmha):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(attention, "has_kernels", lambda setup, name: name == "xformers")
    return calls


@pytest.mark.parametrize("width", [26, 64])
def test_xformers_is_given_packed_rows_and_their_lengths(width, xformers):
    case = first(attention.MORE_CASES[f"attention_d{width}_ragged"])
    names = [provider.name for provider in case.providers]
    assert names == ["sdpa", "careful", "xformers", "ours", "reference"]
    assert "xformers" in case.optional
    assert "xformers" not in case.providers[1].calls  # careful is what PyTorch has
    lengths = case.providers[-2].ops[""].args[0].lengths
    rows = {row["provider"]: row for row in measuring.measure(case, ("fp32",), 1, 1, CLOCK, {})}
    assert rows["xformers"]["setting"] == ("heads of 32" if width == 26 else "")
    assert rows["xformers"]["gradient_error"] < 1e-5
    served, scale = (32, 26**-0.5) if width == 26 else (64, None)
    shape = 1, sum(lengths), 2, served
    assert {call for call in xformers if call[0][-1] == served} == {
        (shape, lengths, CPU, p, scale)
        for p in (0.1, 0.0)  # timed, and checked
    }


def test_attention_goes_on_without_an_xformers_that_does_not_load(xformers, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    case = first(attention.CASES["attention_d64"])
    rows = measuring.measure(case, ("fp32",), 1, 1, CLOCK, {})
    assert [row["provider"] for row in rows] == ["sdpa", "careful", "ours", "reference"]
    assert "no xformers in fp32: import of xformers.ops halted" in capsys.readouterr().err


def test_padded_heads_change_nothing():
    q, k, v = torch.randn(3, 2, 3, 5, 26).unbind()

    def attend(q, k, v, *, scale, dropout_p):
        assert q.shape[-1] == 32
        return torch.softmax(q @ k.mT * scale, -1) @ v

    found = padded_heads(attend, q, k, v, dropout_p=0.0)
    torch.testing.assert_close(found, sdpa(None, q, k, v, dropout_p=0.0))


def test_the_fastest_of_several_calls():
    x = torch.randn(4, 3)
    calls = {
        "refuses": OpCall("refuses", "r", refuses, (x,), 1, 0.1),
        "adds": OpCall("adds", "r", {"once": doubles, "again": doubles}, (x,), 1, 0.1),
        "multiplies": OpCall("multiplies", "r", lambda x, dropout_p: 2 * x, (x,), 1, 0.1),
    }
    # Settings of "adds", then itself, then "multiplies", then the chosen one's settings anew.
    took = itertools.cycle([3.0, 1.0, 2.0, 4.0, 3.0, 1.0])

    def seconds(call):
        call()
        return next(took)

    for phase in ("forward", "backward", "both"):
        provider = Fastest("careful", "b", calls).of(phase)
        provider.tune("fp32", seconds)
        assert provider.setting("fp32") == "adds, again"
        provider.run("fp32")
        assert torch.equal(provider.outcome("", "fp32").loss, 2 * x)
    with pytest.raises(RuntimeError, match="no kernel"):
        Fastest("none", "b", {"refuses": calls["refuses"]}).tune("fp32", seconds)


@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        (refuses, "no kernel for this"),
        (refuses_dropout, "no kernel for this"),
        (lambda x, *, dropout_p: 3 * x, "does not compute"),
    ],
    ids=["refuses", "refuses dropout", "is wrong"],
)
def test_an_optional_provider_is_left_out(theirs, says, capsys):
    x = torch.randn(4, 3)
    providers = [
        OpCall(name, name, op, (x,), 1, 0.1)
        for name, op in (("a", doubles), ("theirs", theirs), ("ours", doubles))
    ]
    case = case_of(*providers, optional=("theirs",))
    rows = measuring.measure(case, ("fp32",), 2, 1, CLOCK, {})
    assert re.search(f"no theirs in fp32: .*{says}", capsys.readouterr().err)
    assert [row["provider"] for row in rows] == ["a", "ours"]
    with pytest.raises(RuntimeError, match=says):  # one that is asked for is an error
        measuring.measure(case_of(*providers), ("fp32",), 2, 1, CLOCK, {})


def test_the_backward_of_attention_is_no_graph_of_its_own():
    """PyTorch's fused forwards leave their random state on the host unless captured with it."""
    for cases in {**attention.CASES, **attention.MORE_CASES}.values():
        found = {case.phase: case.captured for case in cases(SMOKE)}
        assert found == {"forward": True, "backward": False, "both": True}
    rows = {case.phase: case.captured for case in layer_norm.CASES["layer_norm_d312"](SMOKE)}
    assert rows == {"forward": True, "backward": True, "both": True}


def test_compiled_runs_its_backward_again(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda f, **o: original(f, backend="aot_eager", **o))
    provider = OpCall("c", "b", compiled(doubles), (torch.randn(4, 3),), 1, 0.1).of("backward")
    for _ in range(2):
        provider.run("fp32")


original = torch.compile


# ---- work ----------------------------------------------------------------------------------------


def test_work_of_attention():
    """Lengths 2 and 3, 5 heads of 7, fp16-sized numbers."""
    forward = attention.work_of((2, 3), 5, 7, "forward", 2)
    assert forward == Work(4 * (2 * 2 + 3 * 3) * 5 * 7, 4 * (5 * 5 * 7 * 2) + 5 * 5 * 4)
    backward = attention.work_of((2, 3), 5, 7, "backward", 2)
    assert backward == Work(2.5 * forward.flops, 8 * (5 * 5 * 7 * 2) + 5 * 5 * 4)
    both = attention.work_of((2, 3), 5, 7, "both", 2)
    assert both == Work(3.5 * forward.flops, forward.bytes + backward.bytes)


def test_work_of_ragged_rows_leaves_padding_out():
    case = first(attention.MORE_CASES["attention_d26_ragged"])
    assert 0.5 < case.valid_fraction < 0.7
    lengths = case.providers[-1].operands[0].shape[0]
    assert case.work("fp32").bytes == lengths * 2 * (4 * 26 * 4 + 4)
    assert case.work("bf16").bytes == lengths * 2 * (4 * 26 * 2 + 4)


@pytest.mark.parametrize("length", [8, 512])
def test_work_of_the_attention_loss(length):
    """The form with fewer operations: direct at N=8, Gram at N=512."""
    d, t, rows = 26, 64, 3 * length * 2
    direct = 2 * rows * length * (d + t + 2 * d)  # two products of scores, two of gradients
    gram = 2 * rows * (2 * (d * d + d * t + t * t) + 2 * (d * d + d * t))  # six, four
    work = attention_score_mse.work_of(3, length, 2, d, t, "both", 4)
    assert work == Work(direct if length == 8 else gram, 4 * rows * (2 * (d + t) + 2 * d))
    forward = attention_score_mse.work_of(3, length, 2, d, t, "forward", 4)
    assert forward.bytes == 4 * rows * 2 * (d + t)


def test_work_of_rows():
    assert layer_norm.work_of(10, 4, "forward", 2) == Work(0, 10 * (2 * 8 + 8) + 2 * 8)
    assert bias_gelu.work_of(10, 4, "both", 2) == Work(0, 5 * 10 * 8 + 3 * 8)
    work = hidden_mse.work_of(10, 4, "both", 2)
    assert work.flops == 3 * 2 * 10 * 4 * 768
    assert work.bytes == 2 * (2 * (10 * 4 + 4 * 768 + 768) + 10 * 768)
    assert attention_relation_kl.work_of(1, 8, 2, "vv", "both", 4).bytes == 4 * 16 * (2 * 26 + 64)
    assert linear_cross_entropy.work_of(10, 2, 5, 4, "forward", 2).flops == 2 * 2 * 5 * 4
