"""encoder_layer: one node computes what its ops compute one by one, gradients included."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

import tinybert_fast as tbf
from tinybert_fast import ops
from tinybert_fast.modules import Capture, encode, encoder, weights
from tinybert_fast.ops import dispatch
from tinybert_fast.ops.attention import attention_of_stack
from tinybert_fast.ops.dispatch import INTERPRETED
from tinybert_fast.ops.encoder_layer import (
    LayerCall,
    LayerWeights,
    _EncoderLayer,
    encoder_layer,
    serves,
)
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.testing.operands import normal

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NO_KERNELS = dispatch.UNAVAILABLE["triton"]
pytestmark = pytest.mark.skipif(NO_KERNELS is not None, reason=str(NO_KERNELS))
LENGTHS = (5, 32, 0, 9)
C, H, D, WIDTH, WIDE = 48, 4, 16, 12, 80  # heads of 12, padded with zeros
READ = torch.tensor([0, 7, 45])
DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.bfloat16, torch.float32]
CALLS = {
    "plain": {},
    "dropout": {"dropout_p": (0.1, 0.2, 0.3)},
    "queries_and_keys": {"give": (0, 1), "dropout_p": (0.1, 0.1, 0.0)},
    "values_causal": {"give": (2,), "direction": "causal"},
}


def operands(dtype):
    """hidden and weights, whose vectors are fp32 where a model under autocast has them so."""
    shapes = {
        "weight": (3 * H * D, C), "bias": (3 * H * D,), "output": (C, H * D), "output_bias": (C,),
        "norm": (C,), "norm_bias": (C,), "inner": (WIDE, C), "inner_bias": (WIDE,),
        "outer": (C, WIDE), "outer_bias": (C,), "last_norm": (C,), "last_norm_bias": (C,),
    }  # fmt: skip
    made = {name: normal(shape, i, device=DEVICE) for i, (name, shape) in enumerate(shapes.items())}
    for name in ("weight", "bias"):
        made[name].view(3, H, D, -1)[:, :, WIDTH:] = 0.0
    made["output"].view(C, H, D)[..., WIDTH:] = 0.0
    for name, x in made.items():
        made[name] = 1.0 + 0.1 * x if name in ("norm", "last_norm") else x * x.shape[-1] ** -0.5
    narrow = ("weight", "bias", "output", "inner", "outer")
    found = LayerWeights(**{n: x.to(dtype) if n in narrow else x for n, x in made.items()})
    return normal((sum(LENGTHS), C), 99, dtype, DEVICE), found


def call_of(**changes):
    common = {
        "heads": H, "width": WIDTH, "scale": WIDTH**-0.5, "direction": "both",
        "dropout_p": (0.0, 0.0, 0.0), "sites": (4, 5, 6), "eps": (1e-12, 1e-6), "give": (),
    }  # fmt: skip
    return LayerCall(**{**common, **changes})


def one_by_one(hidden, w, call, *, layout, seed, read, impl):
    """The same of single ops."""
    stack = F.linear(hidden, w.weight, w.bias).unflatten(1, (3, H, D))
    common = {"layout": layout, "seed": seed, "impl": impl}
    context, *given = attention_of_stack(
        stack, give=call.give, width=WIDTH, scale=call.scale, direction=call.direction,
        dropout_p=call.dropout_p[0], site=call.sites[0], **common,
    )  # fmt: skip
    context = context.flatten(1)
    if read is not None:
        context, hidden = context[read], hidden[read]
        common["layout"] = replace(
            layout, rows=layout.rows[read], sequences=layout.sequences[read],
            positions=layout.positions[read],
        )  # fmt: skip
    rate, site = call.dropout_p, call.sites
    first = ops.dropout_add_layer_norm(
        F.linear(context, w.output), w.output_bias, hidden, w.norm, w.norm_bias,
        eps=call.eps[0], dropout_p=rate[1], site=site[1], **common,
    )  # fmt: skip
    expanded = ops.bias_gelu(F.linear(first, w.inner), w.inner_bias, impl=impl)
    last = ops.dropout_add_layer_norm(
        F.linear(expanded, w.outer), w.outer_bias, first, w.last_norm, w.last_norm_bias,
        eps=call.eps[1], dropout_p=rate[2], site=site[2], **common,
    )  # fmt: skip
    return last, *given


def run(function, hidden, w, call, frozen=(), **how):
    """{name: value or gradient} of the layer's outputs."""
    hidden = hidden.clone().requires_grad_("hidden" not in frozen)
    w = LayerWeights(
        **{n: x.clone().requires_grad_(n not in frozen) for n, x in w._asdict().items()}
    )
    outputs = function(hidden, w, call, **how)
    loss = sum(
        (x.double() * normal(x.shape, 7 + i, torch.float64, DEVICE)).sum()
        for i, x in enumerate(outputs) if x is not None
    )  # fmt: skip
    loss.backward()
    found = {f"output {i}": x.detach() for i, x in enumerate(outputs) if x is not None}
    leaves = {"hidden": hidden, **w._asdict()}
    return found | {f"d{n}": x.grad for n, x in leaves.items() if x.grad is not None}


def errors(found, truth):
    assert found.keys() == truth.keys()
    floor = 1e-3 * max(x.norm() for n, x in truth.items() if n.startswith("d"))
    return {
        n: ((x.double() - truth[n]).norm() / max(truth[n].norm(), floor)).item()
        for n, x in found.items()
    }


@pytest.mark.parametrize("read", [None, READ], ids=["all_rows", "some_rows"])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_in_one_node_is_its_ops_one_by_one(dtype, name, read):
    """No further from fp64 than the ops are; with the same dropped cells."""
    hidden, w = operands(dtype)
    call, read = call_of(**CALLS[name]), None if read is None else read.to(DEVICE)
    seed = torch.tensor([3, 5], device=DEVICE)
    how = {"layout": SequenceLayout.from_lengths(LENGTHS, device=DEVICE), "seed": seed}
    wide = hidden.double(), LayerWeights(*(x.double() for x in w))
    truth = run(one_by_one, *wide, call, read=read, impl="reference", **how)
    theirs = errors(run(one_by_one, hidden, w, call, read=read, impl="triton", **how), truth)
    ours = errors(run(encoder_layer, hidden, w, call, read=read, **how), truth)
    assert ours.keys() == theirs.keys()
    least = 16 * torch.finfo(dtype).eps
    for what, error in ours.items():
        assert error <= max(1.5 * theirs[what], least), (what, error, theirs[what])


@pytest.mark.parametrize(
    "frozen",
    [("hidden",), ("weight", "bias", "outer"), ("inner", "output", "norm", "output_bias")],
    ids="_".join,
)
def test_triton_in_one_node_makes_no_product_for_what_is_frozen(frozen, monkeypatch):
    hidden, w = operands(torch.float32)
    how = {"layout": SequenceLayout.from_lengths(LENGTHS, device=DEVICE), "read": None}
    how["seed"] = None
    whole = run(encoder_layer, hidden, w, call_of(), **how)
    some = run(encoder_layer, hidden, w, call_of(), frozen, **how)
    assert whole.keys() - some.keys() == {f"d{name}" for name in frozen}
    for name, x in some.items():
        torch.testing.assert_close(x, whole[name], rtol=0.0, atol=0.0)


def test_triton_in_one_node_of_what_is_given_alone():
    """Nobody reads the layer's answer: what is behind attention gets no gradient, not one of 0."""
    hidden, w = operands(torch.float32)
    layout = SequenceLayout.from_lengths(LENGTHS, device=DEVICE)
    for x in (hidden, *w):
        x.requires_grad_()
    _, queries, keys, values = encoder_layer(hidden, w, call_of(give=(0, 1)), layout=layout)
    assert values is None
    got, *of_weights = torch.autograd.grad((queries * keys).sum(), [hidden, *w], allow_unused=True)
    assert [x is not None for x in of_weights] == [True] * 2 + [False] * 10
    stack = F.linear(hidden, w.weight, w.bias).unflatten(1, (3, H, D))[..., :WIDTH]
    (want,) = torch.autograd.grad((stack[:, 0] * stack[:, 1]).sum(), hidden)
    torch.testing.assert_close(got, want)


def test_triton_in_one_node_keeps_less_than_its_ops():
    """GELU's answer is computed again."""
    hidden, w = operands(torch.float32)
    layout, kept = SequenceLayout.from_lengths(LENGTHS, device=DEVICE), []
    for function, how in ((encoder_layer, {}), (one_by_one, {"impl": "triton"})):
        found = {}

        def keep(x, found=found):
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        leaf, *leaves = (x.clone().requires_grad_() for x in (hidden, *w))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            outputs = function(
                leaf, LayerWeights(*leaves), call_of(), layout=layout, seed=None, read=None, **how
            )
        theirs = {x.untyped_storage().data_ptr() for x in leaves}  # there anyway
        kept.append(sum(size for place, size in found.items() if place not in theirs))
        del outputs
    assert kept[1] - kept[0] >= sum(LENGTHS) * WIDE * 4


def test_triton_backward_inside_autocast_of_a_forward_outside_it():
    hidden, w = operands(torch.float32)
    how = {"layout": SequenceLayout.from_lengths(LENGTHS, device=DEVICE), "seed": None}
    want = run(encoder_layer, hidden, w, call_of(), read=None, **how)
    leaf = hidden.clone().requires_grad_()
    last, *_ = encoder_layer(leaf, w, call_of(), **how)
    loss = (last.double() * normal(last.shape, 7, torch.float64, DEVICE)).sum()
    with torch.autocast(DEVICE, DTYPES[0] if DEVICE == "cpu" else torch.bfloat16):
        loss.backward()
    torch.testing.assert_close(leaf.grad, want["dhidden"], rtol=0.0, atol=0.0)


def test_triton_in_one_node_refuses_pairs_that_do_not_fit():
    """As attention does: a mask of another length, of another batch, an unknown direction."""
    hidden, w = operands(torch.float32)
    layout = SequenceLayout.from_lengths(LENGTHS, device=DEVICE)
    short = ops.BlockMask.from_dense(torch.ones(4, 4, dtype=torch.bool, device=DEVICE))
    two = ops.BlockMask.from_dense(torch.ones(2, 32, 32, dtype=torch.bool, device=DEVICE))
    for mask in (short, two):
        with pytest.raises(ValueError, match="attention: "):
            encoder_layer(hidden, w, call_of(), layout=layout, block_mask=mask)
    with pytest.raises(ValueError, match="direction='casual'"):
        encoder_layer(hidden, w, call_of(direction="casual"), layout=layout)


def test_triton_serves_what_all_its_ops_serve():
    hidden, w = operands(torch.float32)
    assert not serves(hidden, w._replace(inner=w.inner.half()), call_of(), None, "triton")
    assert serves(hidden, w, call_of(), None, "triton")
    assert not serves(hidden, w, call_of(), None, "reference")
    assert not serves(hidden, w, call_of(), None, "torch")
    assert not serves(hidden, w, call_of(), None, ("triton", "reference"))
    with pytest.raises(ValueError, match="is float64"):
        serves(hidden, w._replace(norm=w.norm.double()), call_of(), None, "triton")
    with pytest.raises(ValueError, match=r"dropout_p=0\.001 cannot be expressed"):
        encoder_layer(
            hidden, w, call_of(dropout_p=(0.0, 0.001, 0.0)), layout=SequenceLayout.from_lengths(
                LENGTHS, device=DEVICE), seed=torch.zeros(2, dtype=torch.int64, device=DEVICE),
        )  # fmt: skip


@pytest.mark.parametrize("mixed", [False] if INTERPRETED else [False, True], ids=str)
def test_triton_layers_of_an_encoder_are_nodes_where_gradients_are_wanted(mixed, monkeypatch):
    """And compute what they compute op by op: the last layer for the rows that are read alone, with
    queries and keys recorded and under gradient checkpointing."""
    nodes, apply = [], _EncoderLayer.apply
    monkeypatch.setattr(_EncoderLayer, "apply", lambda *x: (nodes.append(1), apply(*x))[1])
    for where, name in (
        (encoder, "pays_to_pad"), (weights, "pays_to_prepare_together"), (encoder, "ops_add_bias"),
    ):  # fmt: skip
        monkeypatch.setattr(where, name, lambda hidden: True)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=40, initializer_range=0.2,
    )  # fmt: skip
    bert = tbf.accelerate(BertModel(config, add_pooling_layer=False).to(DEVICE).train())
    layout = SequenceLayout.from_lengths((5, 9, 0, 3), device=DEVICE)
    ids = torch.randint(0, 50, (4, 9), device=DEVICE)
    read = torch.tensor([1, 6, 16], device=DEVICE)
    found = []
    for as_one in (True, False):
        with monkeypatch.context() as patch, torch.autocast(DEVICE, torch.bfloat16, enabled=mixed):
            if not as_one:
                patch.setattr(encoder, "serves", lambda *call: False)
            torch.manual_seed(1)
            capture = Capture(hidden_states=(1,), attention=(2,))
            y = encode(bert, layout, input_ids=ids, capture=capture, read=read, impl="triton")
        loss = y.square().sum() + capture.queries[2].sin().sum() + capture.keys[2].cos().sum()
        loss = loss + capture.hidden[1].square().sum()
        found.append([y, *torch.autograd.grad(loss, list(bert.parameters()), allow_unused=True)])
        assert len(nodes) == 3
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            tolerance = {"rtol": 0.02, "atol": 0.02 * other.abs().max().item()} if mixed else {}
            torch.testing.assert_close(one, other, **tolerance)
    with torch.no_grad():
        encode(bert, layout, input_ids=ids, impl="triton")
    assert len(nodes) == 3, "nobody wanted a gradient"
    bert.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(1)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=mixed):
        y = encode(bert, layout, input_ids=ids, read=read, impl="triton")
    y.sum().backward()
    assert len(nodes) == 3 + 2 * 3
