"""encode(): the encoder alone, on a stand-in for Transformers' BertModel."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.flop_counter import FlopCounterMode

import tinybert_fast as tbf
from tinybert_fast.modules import Capture, encode, encoder, weights
from tinybert_fast.modules.encoder import is_erf_gelu
from tinybert_fast.modules.heads import first_tokens, vocabulary_loss
from tinybert_fast.modules.weights import is_plain

CHANNELS, HEADS = 12, 3


def stand_in(layers=2, dropout=0.0):
    """The submodules that encode() reads, made of torch alone."""
    torch.manual_seed(0)

    def module(**parts):
        made = nn.Module()
        for name, part in parts.items():
            setattr(made, name, part)
        return made

    def norm():
        return nn.LayerNorm(CHANNELS, eps=1e-12)

    def output(width):
        return module(
            dense=nn.Linear(width, CHANNELS), LayerNorm=norm(), dropout=nn.Dropout(dropout)
        )

    def layer():
        heads = module(
            **{name: nn.Linear(CHANNELS, CHANNELS) for name in ("query", "key", "value")},
            dropout=nn.Dropout(dropout),
            num_attention_heads=HEADS,
            attention_head_size=CHANNELS // HEADS,
            scaling=(CHANNELS // HEADS) ** -0.5,
        )
        intermediate = module(dense=nn.Linear(CHANNELS, 20), intermediate_act_fn=nn.GELU())
        attention = module(self=heads, output=output(CHANNELS))
        return module(attention=attention, intermediate=intermediate, output=output(20))

    embeddings = module(
        word_embeddings=nn.Embedding(17, CHANNELS, padding_idx=0),
        position_embeddings=nn.Embedding(8, CHANNELS),
        token_type_embeddings=nn.Embedding(2, CHANNELS),
        LayerNorm=norm(),
        dropout=nn.Dropout(dropout),
    )
    return module(
        embeddings=embeddings, encoder=module(layer=nn.ModuleList(layer() for _ in range(layers)))
    )


def textbook(bert, ids, columns):
    """One sequence: (n,) ids at their columns -> (n, C), in plain PyTorch."""
    e = bert.embeddings
    types = e.token_type_embeddings.weight[0]
    h = e.LayerNorm(e.word_embeddings(ids) + e.position_embeddings(columns) + types)
    for layer in bert.encoder.layer:
        heads, out = layer.attention.self, layer.attention.output
        q, k, v = (
            p(h).view(-1, HEADS, CHANNELS // HEADS).transpose(0, 1)
            for p in (heads.query, heads.key, heads.value)
        )
        weights = torch.softmax(q @ k.mT * heads.scaling, -1)
        context = (weights @ v).transpose(0, 1).flatten(1)
        h = out.LayerNorm(h + out.dense(context))
        inner = torch.nn.functional.gelu(layer.intermediate.dense(h))
        h = layer.output.LayerNorm(h + layer.output.dense(inner))
    return h


@pytest.mark.parametrize(
    ("padded", "together"),
    [(False, False), (True, False), (True, True), (False, True)],
    ids=["heads_of_4", "padded_to_8", "padded_together", "together"],
)
def test_equals_the_textbook_in_fp64(padded, together, monkeypatch):
    monkeypatch.setattr(encoder, "pays_to_pad", lambda hidden: padded)
    monkeypatch.setattr(weights, "pays_to_prepare_together", lambda hidden: together)
    monkeypatch.setattr(encoder, "ops_add_bias", lambda hidden: together)  # both on a GPU
    bert = stand_in().double()
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    ids = torch.randint(1, 17, mask.shape)
    layout = tbf.SequenceLayout.from_mask(mask)
    got = encode(bert, layout, input_ids=ids)
    rows = [textbook(bert, ids[b][m], m.nonzero().squeeze(1)) for b, m in enumerate(mask.bool())]
    want = torch.cat(rows)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    trained = list(bert.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(got.sin().sum(), trained),
        torch.autograd.grad(want.sin().sum(), trained),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("name", ["reference", "torch", ("torch", "reference")], ids=str)
def test_implementations_agree(name):
    bert = stand_in()
    layout = tbf.SequenceLayout.from_lengths([5, 2, 0, 5], 6)
    ids = torch.randint(1, 17, (4, 6))
    want = encode(bert, layout, input_ids=ids)
    torch.testing.assert_close(encode(bert, layout, input_ids=ids, impl=name), want)


@pytest.mark.parametrize("padded", [False, True], ids=["heads_of_4", "padded_to_8"])
def test_matrices_rounded_together_are_those_of_autocast(padded, monkeypatch):
    layout = tbf.SequenceLayout.from_lengths([5, 2, 0, 5], 6)
    ids = torch.randint(1, 17, (4, 6))
    monkeypatch.setattr(encoder, "pays_to_pad", lambda hidden: padded)
    found = []
    for together in (False, True):
        monkeypatch.setattr(
            weights, "pays_to_prepare_together", lambda hidden, together=together: together
        )
        bert = stand_in()
        for layer in bert.encoder.layer:  # with one frozen of three, products are autocast's
            layer.attention.self.key.requires_grad_(False)
        called = bert.encoder.layer[1].intermediate.dense
        called.register_forward_hook(lambda *call: None)  # not plain: autocast rounds it
        with torch.autocast("cpu", torch.bfloat16):
            hidden = encode(bert, layout, input_ids=ids)
        hidden.sin().sum().backward()
        found.append([hidden, *(p.grad for p in bert.parameters())])
    assert all(grad is None or grad.dtype == torch.float32 for grad in found[1])
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("padded", [False, True], ids=["heads_of_4", "padded_to_8"])
def test_one_product_for_queries_keys_and_values(padded, monkeypatch):
    """That of autocast but for roundings; where nothing is rounded or padded, there are three."""
    layout = tbf.SequenceLayout.from_lengths([5, 2, 0, 5], 6)
    ids = torch.randint(1, 17, (4, 6))
    monkeypatch.setattr(encoder, "pays_to_pad", lambda hidden: padded)
    monkeypatch.setattr(weights, "pays_to_prepare_together", lambda hidden: True)
    stacks, prepared = [], weights.prepare

    def noted(*call):
        stacks.append((found := prepared(*call)).stack is not None)
        return found

    monkeypatch.setattr(encoder, "prepare", noted)
    found = []
    for mixed in (False, True):
        bert, stacks[:] = stand_in(), []
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            hidden = encode(bert, layout, input_ids=ids)
        assert stacks == [mixed or padded] * 2
        hidden.sin().sum().backward()
        found.append(
            [hidden, *(p.grad for name, p in bert.named_parameters() if "key.b" not in name)]
        )
    for exact, rounded in zip(*found, strict=True):
        assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize("padded", [False, True], ids=["heads_of_4", "padded_to_8"])
def test_no_product_for_a_frozen_matrix(padded, monkeypatch):
    """Rounded and padded together with trained ones, which want gradients."""
    monkeypatch.setattr(encoder, "pays_to_pad", lambda hidden: padded)
    monkeypatch.setattr(weights, "pays_to_prepare_together", lambda hidden: True)
    layout, work = tbf.SequenceLayout.from_lengths([5, 2]), []
    ids = torch.randint(1, 17, (2, 5))
    for frozen in (False, True):
        bert = stand_in(layers=1)
        attention = bert.encoder.layer[0].attention
        attention.self.key.weight.requires_grad_(not frozen)
        attention.output.dense.weight.requires_grad_(not frozen)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = encode(bert, layout, input_ids=ids)
        with FlopCounterMode(display=False) as counter:
            hidden.sum().backward()
        work.append(counter.get_total_flops())
    width = HEADS * (8 if padded else CHANNELS // HEADS)
    assert work[0] - work[1] == 2 * 2 * layout.total * CHANNELS * width


@pytest.mark.parametrize("stacked", [False, True], ids=["three", "a_stack"])
@torch.no_grad()
def test_heads_that_nobody_records_make_room_behind_attention(stacked, monkeypatch):
    monkeypatch.setattr(weights, "pays_to_prepare_together", lambda hidden: stacked)
    where, name = (encoder, "attention_of_stack") if stacked else (encoder.ops, "attention")
    attention, output, heads, gone = getattr(where, name), encoder._output, [], []

    def noted(x, *others, **options):
        heads.append(StorageWeakRef(x.untyped_storage()))
        return attention(x, *others, **options)

    def behind(*call, **options):
        gone.append(heads[-1].expired())
        return output(*call, **options)

    monkeypatch.setattr(where, name, noted)
    monkeypatch.setattr(encoder, "_output", behind)
    layout, ids = tbf.SequenceLayout.from_lengths([5, 2]), torch.randint(1, 17, (2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        encode(stand_in(), layout, input_ids=ids)
    assert gone == [True] * 4  # two places in each of two layers


def test_frozen_weights_side_by_side_are_one_without_a_copy(monkeypatch):
    monkeypatch.setattr(weights, "pays_to_prepare_together", lambda hidden: True)
    bert, layout = stand_in().requires_grad_(False), tbf.SequenceLayout.from_lengths([5, 2])
    ids = torch.randint(1, 17, (2, 5))
    want = encode(bert, layout, input_ids=ids)
    for layer in bert.encoder.layer:
        heads = layer.attention.self
        weights.lay_side_by_side((heads.query, heads.key, heads.value))
    monkeypatch.setattr(weights, "_Prepare", None)  # would copy
    assert torch.equal(encode(bert, layout, input_ids=ids), want)
    with torch.no_grad():
        bert.encoder.layer[1].attention.self.value.bias += 1.0
    assert not torch.equal(encode(bert, layout, input_ids=ids), want)


def test_padded_heads_leave_no_trace(monkeypatch):
    """Captured queries and keys have the model's width; layers that must be called are not read."""
    bert, layout = stand_in(), tbf.SequenceLayout.from_lengths([5, 2])
    ids = torch.randint(1, 17, (2, 5))
    bert.encoder.layer[1].attention.self.value.register_forward_hook(lambda *call: None)
    found = []
    for padded in (False, True):
        monkeypatch.setattr(encoder, "pays_to_pad", lambda hidden, padded=padded: padded)
        capture = Capture(attention=(1, 2))
        hidden = encode(bert, layout, input_ids=ids, capture=capture)
        found.append([hidden, *capture.queries.values(), *capture.keys.values()])
    torch.testing.assert_close(found[1], found[0])


def test_dropout_does_not_depend_on_padding():
    """The reference drops by sequence, rank and column: wider padding changes nothing."""
    bert = stand_in(dropout=0.3)
    ids = torch.randint(1, 17, (3, 4))
    wide = torch.nn.functional.pad(ids, (0, 3))
    outputs = []
    for padded in (ids, wide):
        layout = tbf.SequenceLayout.from_lengths([4, 2, 3], padded.shape[1])
        torch.manual_seed(7)
        outputs.append(encode(bert, layout, input_ids=padded, impl="reference"))
    assert torch.equal(*outputs)
    assert not torch.allclose(outputs[0], encode(bert.eval(), layout, input_ids=wide))


@pytest.mark.parametrize(
    ("hidden", "attention", "projections", "ffns"),
    [
        ((0, 2), (2,), 3 + 3, 2),  # all of layers 1 and 2, nothing of 3
        ((1,), (3,), 3 + 3 + 2, 2),  # of layer 3 its queries and keys
        ((0,), (1,), 2, 0),
        ((0,), (), 0, 0),
        ((3,), (), 9, 3),
    ],
    ids=["until_2", "scores_of_3", "scores_of_1", "embeddings", "everything"],
)
def test_only_what_is_recorded_is_computed(hidden, attention, projections, ffns):
    """By the work of its matrix products; what is recorded has the bits of a whole forward."""
    bert, layout = stand_in(layers=3), tbf.SequenceLayout.from_lengths([5, 2, 0, 5], 6)
    ids = torch.randint(1, 17, (4, 6))
    whole, alone = Capture(range(4), (1, 2, 3)), Capture(hidden, attention)
    encode(bert, layout, input_ids=ids, capture=whole)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        rows = encode(bert, layout, input_ids=ids, capture=alone, record_only=True)
    assert rows.shape == (0, CHANNELS)
    for kind, numbers in (("hidden", hidden), ("queries", attention), ("keys", attention)):
        assert sorted(getattr(alone, kind)) == sorted(numbers)
        for m in numbers:
            assert torch.equal(getattr(alone, kind)[m], getattr(whole, kind)[m])
    flops = counter.get_flop_counts().get("Global", {})
    products = sum(flops.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    square, expansion = CHANNELS * CHANNELS, CHANNELS * 20
    work = (projections + ffns) * square + 2 * ffns * expansion  # one output product per FFN
    assert products == 2 * layout.total * work


def test_modules_import_without_transformers():
    code = "import sys; sys.modules['transformers'] = None; import tinybert_fast.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", timeout=120)


class Wrapped(torch.Tensor):
    """Without memory of its own, as quantised weights are; products take what is inside."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        found = func(*(x.inner if isinstance(x, cls) else x for x in args), **(kwargs or {}))
        return cls(found) if func is torch.ops.aten.detach.default else found


@pytest.mark.parametrize("together", [False, True])
def test_weights_of_a_class_of_their_own(together, monkeypatch):
    monkeypatch.setattr(weights, "pays_to_prepare_together", lambda hidden: together)
    monkeypatch.setattr(encoder, "ops_add_bias", lambda hidden: together)  # all on a GPU
    bert = stand_in().requires_grad_(False)
    layout = tbf.SequenceLayout.from_lengths([5, 2, 0, 5], 6)
    ids = torch.randint(1, 17, (4, 6))
    want = encode(bert, layout, input_ids=ids)
    for dense in filter(is_plain, bert.modules()):
        dense.weight = nn.Parameter(Wrapped(dense.weight.data), requires_grad=False)
    torch.testing.assert_close(encode(bert, layout, input_ids=ids), want)


def test_plain_layers_and_gelu_are_recognised():
    dense = nn.Linear(3, 3)
    assert is_plain(dense)
    assert not is_plain(nn.Linear(3, 3, bias=False))
    assert not is_plain(type("LoraLinear", (nn.Linear,), {})(3, 3))
    handle = dense.register_forward_pre_hook(lambda *_: None)
    assert not is_plain(dense)
    handle.remove()
    assert is_plain(dense)
    for name in ("weight", "bias"):
        other = nn.Linear(3, 3)
        setattr(other, name, nn.Parameter(Wrapped(torch.ones(3, 3)), requires_grad=False))
        assert not is_plain(other)
    assert is_erf_gelu(nn.GELU())
    assert not is_erf_gelu(nn.GELU("tanh"))
    assert not is_erf_gelu(nn.ReLU())


def test_first_tokens():
    layout = tbf.SequenceLayout.from_lengths([2, 0, 3], 4)
    hidden = torch.randn(5, CHANNELS, requires_grad=True)
    first = first_tokens(hidden, layout)
    assert torch.equal(first[:, 0], torch.stack([hidden[0], torch.zeros(CHANNELS), hidden[2]]))
    first.sum().backward()
    assert hidden.grad.sum(1).tolist() == [CHANNELS, 0, CHANNELS, 0, 0]


def test_vocabulary_loss_of_no_row_is_zero():
    transform = SimpleNamespace(
        dense=nn.Linear(CHANNELS, CHANNELS),
        transform_act_fn=nn.GELU(),
        LayerNorm=nn.LayerNorm(CHANNELS),
    )
    head = SimpleNamespace(transform=transform, decoder=nn.Linear(CHANNELS, 17))
    hidden = torch.randn(4, CHANNELS, requires_grad=True)
    loss = vocabulary_loss(head, hidden[:0], torch.empty(0, dtype=torch.int64))
    assert loss == 0
    loss.backward()
    assert not hidden.grad.any()
    assert not head.decoder.weight.grad.any()
