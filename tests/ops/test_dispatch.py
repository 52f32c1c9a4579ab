"""Which implementation serves a call: names, pairs, the environment, and every refusal."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tinybert_fast.ops import dispatch
from tinybert_fast.ops.dispatch import FLOATS, Limit, Limits, choose
from tinybert_fast.ops.sequence_layout import sequence_extents
from tinybert_fast.testing.operands import FACTORIES

HERE = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
ON_CPU = pytest.mark.skipif(
    dispatch.UNAVAILABLE["triton"] is None, reason="needs a process that cannot run Triton"
)


@pytest.fixture
def limits(monkeypatch):
    """An op with all four implementations; triton takes at most 8 columns."""
    monkeypatch.setattr(dispatch, "OPS", {})
    monkeypatch.setattr(dispatch, "UNAVAILABLE", dict.fromkeys(dispatch.FASTEST_FIRST))
    monkeypatch.setattr(dispatch, "FROM_ENVIRONMENT", {})
    monkeypatch.setattr(dispatch, "AUTOMATIC", dispatch.FASTEST_FIRST)  # as if never interpreted

    def refuses(columns=0, **facts):
        return f"{columns} columns are more than 8" if columns > 8 else None

    return Limits(
        "an_op",
        torch=Limit(FLOATS),
        native=Limit((torch.float32,), ("cpu",)),
        triton=Limit(FLOATS, refuses=refuses),
    )


X = torch.ones(2, 3)


def test_auto_takes_the_fastest_that_can_serve(limits):
    assert choose("auto", limits, X) == ("triton", "triton")
    assert choose("auto", limits, X, columns=9) == ("native", "native")
    assert choose("auto", limits, X.bfloat16(), columns=9) == ("torch", "torch")
    assert choose("auto", limits, X.double(), columns=9) == ("reference", "reference")
    assert choose("auto", limits, X.to("meta"), columns=9) == ("reference", "reference")
    dispatch.UNAVAILABLE["triton"] = "no GPU"
    assert choose("auto", limits, X) == ("native", "native")


def test_automatic_says_what_auto_takes(limits, monkeypatch):
    assert dispatch.automatic(limits, X) == ("triton", None)
    monkeypatch.setitem(dispatch.FROM_ENVIRONMENT, "an_op", "torch")
    assert dispatch.automatic(limits, X) == ("torch", None)
    monkeypatch.setitem(dispatch.UNAVAILABLE, "torch", "it is out")
    chosen, why = dispatch.automatic(limits, X)
    assert chosen is None
    assert "it is out" in why


def test_a_named_implementation_never_falls_back(limits):
    for name in dispatch.FASTEST_FIRST:
        assert choose(name, limits, X) == (name, name)
    dispatch.UNAVAILABLE["native"] = "it was not compiled"
    for impl, x, facts, reason in (
        ("triton", X, {"columns": 9}, "9 columns are more than 8"),
        ("triton", X.double(), {}, "dtype torch.float64 is not one of torch.float16, "),
        ("torch", X.to("meta"), {}, "device meta is not one of cpu, cuda"),
        ("native", X, {}, "it was not compiled"),
    ):
        with pytest.raises(ValueError, match=f"an_op: impl='{impl}' cannot serve.*{reason}"):
            choose(impl, limits, x, **facts)


def test_no_implementation_at_all(limits):
    with pytest.raises(ValueError, match=r"an_op: no implementation.*native: dtype torch.int64"):
        choose("auto", limits, X.long())


def test_pairs(limits):
    assert choose(("triton", "reference"), limits, X) == ("triton", "reference")
    assert choose(("auto", "reference"), limits, X, columns=9) == ("native", "reference")
    assert choose(["torch", "torch"], limits, X) == ("torch", "torch")
    for pair in (("reference", "torch"), ("native", "torch"), ("torch", "triton")):
        with pytest.raises(ValueError, match=f"'{pair[1]}'; the backward must be '{pair[0]}' or"):
            choose(pair, limits, X)
    for wrong in ((), ("torch",), ("torch",) * 3, None, 2):
        with pytest.raises(ValueError, match=r"one name or a \(forward, backward\) pair"):
            choose(wrong, limits, X)


def test_pairs_that_would_draw_two_masks(limits):
    """Implementations that drop the reference's cells may be paired, torch's own may not."""
    assert choose(("triton", "reference"), limits, X, dropout_p=0.1) == ("triton", "reference")
    assert choose(("torch", "torch"), limits, X, dropout_p=0.1) == ("torch", "torch")
    assert choose(("torch", "reference"), limits, X, dropout_p=0.0) == ("torch", "reference")
    with pytest.raises(ValueError, match=r"dropout_p=0.1: the torch forward draws another mask"):
        choose(("torch", "reference"), limits, X, dropout_p=0.1)


def test_unknown_name(limits):
    with pytest.raises(ValueError, match="impl='cuda' is not one of auto, triton, native, torch"):
        choose("cuda", limits, X)


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("", "triton"),
        ("torch", "torch"),
        ("an_op=native", "native"),
        ("torch,an_op=native", "native"),
        (" an_op=auto , torch ", "triton"),  # the op's own entry wins over the bare name
        ("another=torch", "triton"),
        ("auto", "triton"),
    ],
)
def test_environment(setting, expected, limits, monkeypatch):
    monkeypatch.setattr(dispatch, "FROM_ENVIRONMENT", dispatch._parse(setting))
    assert choose("auto", limits, X) == (expected, expected)
    assert choose("reference", limits, X) == ("reference", "reference")  # impl= wins


def test_environment_names_what_cannot_serve(limits, monkeypatch):
    monkeypatch.setattr(dispatch, "FROM_ENVIRONMENT", {"": "triton"})
    with pytest.raises(ValueError, match=r"impl='triton' .*9 columns"):
        choose("auto", limits, X, columns=9)
    assert choose("auto", Limits("plain", torch=Limit(FLOATS)), X) == ("torch", "torch")


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env=HERE | environment,
        capture_output=True,
        text=True,
        check=False,
    )


# Prints which implementation made each result, from the name of its autograd node.
MADE_BY = """
import sys, torch
from tinybert_fast import ops
x, c = torch.ones(2, 3, requires_grad=True), torch.ones(3)
for y in (ops.layer_norm(x, c, c), ops.bias_gelu(x, c)):
    node = type(y.grad_fn.next_functions[0][0]).__name__
    print("torch" if node in ("_LayerNormBackward", "_BiasGeluBackward") else "reference")
assert "triton" not in sys.modules
"""


def test_environment_of_a_process():
    """Read once, at import; and no op imports triton before a kernel runs."""
    result = python(MADE_BY, TINYBERT_FAST_IMPL="reference,bias_gelu=torch")
    assert result.stdout.split() == ["reference", "torch"], result.stderr


def test_environment_that_cannot_be_read():
    with pytest.raises(ValueError, match="'fast' is not one of triton, native, torch, reference,"):
        dispatch._parse("attention=torch,fast")
    result = python("import tinybert_fast.ops", TINYBERT_FAST_IMPL="layernorm=torch")
    assert result.returncode == 1
    message = "names an op 'layernorm', which is not one of attention, "
    assert message in result.stderr.splitlines()[-1]


@ON_CPU
@pytest.mark.parametrize("op", FACTORIES)
def test_every_op_says_why_it_cannot(op):
    case = FACTORIES[op]()
    for name in ("native", "triton"):
        lacks = getattr(dispatch.OPS[op], name) is None
        reason = f"{op} has no {name} implementation" if lacks else dispatch.UNAVAILABLE[name]
        if reason is None:
            continue  # it runs here, as tests/ops/test_<op>.py shows
        with pytest.raises(ValueError, match=f"{op}: impl='{name}' cannot serve this call: ") as e:
            case.run(name)
        assert reason in str(e.value)
    with pytest.raises(ValueError, match=f"{op}: impl=.* the backward must be 'reference' or"):
        case.run(("reference", "torch"))
    with pytest.raises(ValueError, match=f"{op}: impl='fast' is not one of"):
        case.run("fast")


def test_every_op_is_listed():
    without_gradient = {"block_mask", "feed_forward_fp8", "mlm_mask", "sequence_layout"}
    assert set(FACTORIES) == set(dispatch.OPS) - without_gradient  # proven in their own files


def test_what_no_op_has_is_absent(monkeypatch):
    monkeypatch.setitem(dispatch.UNAVAILABLE, "native", None)
    assert dispatch.absent("native") is None
    monkeypatch.setattr(dispatch, "OPS", {"layer_norm": dispatch.OPS["layer_norm"]})
    assert dispatch.absent("native") == "no op has a native implementation"
    monkeypatch.setitem(dispatch.UNAVAILABLE, "native", "nobody compiled it")
    assert dispatch.absent("native") == "nobody compiled it"
    assert dispatch.absent("torch") is dispatch.absent("reference") is None


@ON_CPU
def test_reasons_of_this_process():
    why = dispatch._probe()
    assert why["torch"] is why["reference"] is None
    assert "CUDA" in why["triton"] or "not installed" in why["triton"]


def test_auto_never_takes_the_interpreter():
    assert ("triton" in dispatch.AUTOMATIC) == (not dispatch.INTERPRETED)


def test_whoever_intercepts_sees_the_operator():
    """functorch, jit.trace and TorchFunctionMode, whose tensors may have no memory to read."""
    real = torch.rand(4, 5) > 0.5
    want = sequence_extents(real)
    batch = torch.stack([real, ~real])
    assert torch.equal(torch.func.functionalize(sequence_extents)(real), want)
    assert torch.equal(torch.vmap(sequence_extents)(batch)[0], want)
    traced = torch.jit.trace(sequence_extents, (real,), check_trace=False)
    assert torch.equal(traced(~real), sequence_extents(~real))

    class Names(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    seen = []
    with Names():
        sequence_extents(real)
    assert any("sequence_extents" in name for name in seen), seen


def test_kernels_are_for_nvidias_gpus_from_sm_80_on(limits, monkeypatch):
    """Others take PyTorch's: tiles would not fit, or the tables would be of another maker's GPU."""
    monkeypatch.setitem(dispatch.UNAVAILABLE, "triton", None)
    dispatch._too_old.cache_clear()
    for capability, reason in (
        ((7, 5), "kernels need an sm_80 or newer; this GPU is an sm_75"),
        ((8, 0), None),
        ((12, 0), None),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0), dtype=torch.float16)
        assert limits.refusal("triton", x, {"columns": 8}) == reason
        dispatch._too_old.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "this torch is for AMD's" in dispatch._probe()["triton"]
