"""Capture and record_padded: what is recorded, with which graph, and what is refused."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel

import tinybert_fast as tbf
from tinybert_fast.modules import record_padded

LENGTHS, WIDTH, HEADS, CHANNELS, LAYERS = (7, 3, 0, 1), 7, 4, 24, 3
EVERYTHING = {"hidden_states": range(LAYERS + 1)}
EVERYTHING |= dict.fromkeys(("attention", "attention_values"), range(1, LAYERS + 1))


def models(kind=BertModel, **changes):
    """The same weights twice: plain and accelerated."""
    torch.manual_seed(0)
    settings = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, **changes}
    config = BertConfig(
        vocab_size=31,
        hidden_size=CHANNELS,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=40,
        max_position_embeddings=16,
        initializer_range=0.2,
        **settings,
    )
    plain = kind(config).train()
    return plain, tbf.accelerate(copy.deepcopy(plain))


def batch():
    generator = torch.Generator().manual_seed(2)
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(1, 31, mask.shape, generator=generator)
    return {"input_ids": ids, "attention_mask": mask.long()}


def recorded(capture):
    """[(what, m, tensor)] in a fixed order."""
    kinds = ("hidden", "queries", "keys", "values")
    return [(kind, m, t) for kind in kinds for m, t in sorted(getattr(capture, kind).items())]


def loss_of(states, layout):
    """A smooth scalar of packed or padded states, over real tokens."""
    total = 0.0
    for _, m, tensor in states:
        rows = tensor if tensor.shape[0] == layout.total else layout.pack(tensor)
        total = total + (m + 1) * rows.square().mean() + rows.sin().mean()
    return total


def test_packed_and_padded_records_agree():
    plain, fast = models()
    inputs = batch()
    packed, padded = tbf.Capture(**EVERYTHING), tbf.Capture(**EVERYTHING)
    output = fast(**inputs, capture=packed)
    with record_padded(plain, padded) as same:
        assert same is padded
        plain(**inputs)
    assert padded.layout is None
    assert packed.layout.lengths == LENGTHS
    ours, theirs = recorded(packed), recorded(padded)
    assert [x[:2] for x in ours] == [x[:2] for x in theirs]
    assert len(ours) == (LAYERS + 1) + 3 * LAYERS
    for (kind, _, got), (_, _, want) in zip(ours, theirs):
        inner = (CHANNELS,) if kind == "hidden" else (HEADS, CHANNELS // HEADS)
        assert got.shape == (sum(LENGTHS), *inner)
        assert want.shape == (len(LENGTHS), WIDTH, *inner)
        torch.testing.assert_close(got, packed.layout.pack(want), atol=1e-5, rtol=1e-5)
    assert torch.equal(packed.layout.pad(packed.hidden[LAYERS]), output.last_hidden_state)
    for m, layer in enumerate(plain.encoder.layer, start=1):  # Transformers' own
        heads = layer.attention.self
        for kind, dense in (("queries", heads.query), ("keys", heads.key), ("values", heads.value)):
            want = dense(padded.hidden[m - 1])
            assert torch.equal(getattr(padded, kind)[m].flatten(2), want)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_through_what_was_recorded(checkpointing):
    plain, fast = models()
    layout = tbf.SequenceLayout.from_lengths(LENGTHS, WIDTH)
    reference = copy.deepcopy(plain)
    if checkpointing:
        for model in (plain, fast):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    grads = []
    for model in (reference, plain, fast):
        capture = tbf.Capture(**EVERYTHING)
        if model is fast:
            model(**batch(), capture=capture)
            loss_of(recorded(capture), layout).backward()
        else:
            with record_padded(model, capture):
                model(**batch())
                states = recorded(capture)
                loss_of(states, layout).backward()
            after = recorded(capture)  # the recomputation in backward must not have replaced them
            assert all(a[2] is b[2] for a, b in zip(states, after, strict=True))
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        for name, grad in other.items():
            torch.testing.assert_close(grad, grads[0][name], atol=1e-5, rtol=1e-4)


def test_checkpointing_replays_dropout_for_recorded_states():
    rates = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    _, fast = models(**rates)
    saved = copy.deepcopy(fast)
    saved.gradient_checkpointing_enable({"use_reentrant": False})
    layout = tbf.SequenceLayout.from_lengths(LENGTHS, WIDTH)
    for model in (fast, saved):
        torch.manual_seed(3)
        capture = tbf.Capture(**EVERYTHING)
        model(**batch(), capture=capture)
        loss_of(recorded(capture), layout).backward()
    for (name, a), (_, b) in zip(fast.named_parameters(), saved.named_parameters()):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad), name


def test_a_record_alone_skips_the_pooler_and_layers_behind_it():
    """With the graph of a whole forward, and also where the config asks for hidden states."""
    _, fast = models(output_hidden_states=True)
    fast.pooler.register_forward_pre_hook(lambda *call: pytest.fail("the pooler ran"))
    grads = []
    for alone in (False, True):
        capture = tbf.Capture(hidden_states=[1], attention=[2])
        answer = fast(**batch(), capture=capture, packed=True, record_only=alone)
        loss = loss_of(recorded(capture), answer.layout)
        grads.append(torch.autograd.grad(loss, list(fast.parameters()), allow_unused=True))
    assert answer.rows.shape == (0, CHANNELS)
    assert answer.hidden_states is None
    for name, got, want in zip(dict(fast.named_parameters()), grads[1], grads[0], strict=True):
        assert (got is None) == (want is None), name
        assert got is None or torch.equal(got, want), name


def test_only_what_was_asked_is_kept_and_the_next_forward_replaces_it():
    _, fast = models()
    capture = tbf.Capture(hidden_states=[0, 2], attention=[3], attention_values=[1])
    fast(**batch(), capture=capture)
    assert sorted(capture.hidden) == [0, 2]
    assert sorted(capture.queries) == sorted(capture.keys) == [3]
    assert sorted(capture.values) == [1]
    before = capture.hidden[2]
    again = {key: value[:2] for key, value in batch().items()}
    fast(**again, capture=capture)
    assert capture.layout.batch_size == 2
    assert capture.hidden[2].shape[0] == 10
    assert before.shape[0] == 11


def test_beside_output_hidden_states_and_through_heads():
    for kind in (BertForMaskedLM, BertForSequenceClassification):
        _, fast = models(kind)
        capture = tbf.Capture(hidden_states=[1], attention=[2], attention_values=[3])
        output = fast(**batch(), capture=capture, output_hidden_states=True)
        assert len(output.hidden_states) == LAYERS + 1
        assert sorted(capture.hidden) == [1]
        assert sorted(capture.queries) == [2]
        assert sorted(capture.values) == [3]
        assert torch.equal(capture.layout.pad(capture.hidden[1]), output.hidden_states[1])


def test_layout_of_the_caller_is_the_recorded_one():
    _, fast = models()
    inputs = batch()
    layout = tbf.SequenceLayout.from_mask(inputs.pop("attention_mask"))
    capture = tbf.Capture(hidden_states=[0])
    fast(**inputs, layout=layout, capture=capture)
    assert capture.layout is layout


def test_recording_leaves_no_hooks_behind():
    plain, _ = models(BertForMaskedLM)

    def hooks():
        return [(m._forward_hooks.copy(), m._forward_pre_hooks.copy()) for m in plain.modules()]

    before = hooks()
    recording = record_padded(plain, tbf.Capture(**EVERYTHING))
    recording.__enter__()
    assert hooks() != before
    recording.__exit__(RuntimeError, RuntimeError("out of memory"), None)
    assert hooks() == before


def test_refusals():
    plain, fast = models()
    with (
        pytest.raises(ValueError, match="this one is accelerated"),
        record_padded(fast, tbf.Capture()),
    ):
        pass
    with (
        pytest.raises(ValueError, match="holds no BERT"),
        record_padded(torch.nn.Linear(2, 2), tbf.Capture()),
    ):
        pass
    with pytest.raises(ValueError, match="hidden state 4"), record_padded(plain, tbf.Capture([4])):
        pass
    with pytest.raises(ValueError, match="hidden state -1"):
        fast(**batch(), capture=tbf.Capture(hidden_states=[-1]))
    for asked in ({"attention": [1]}, {"attention_values": [1]}):
        with pytest.raises(ValueError, match="whose tokens do not all meet"):
            fast(**batch(), capture=tbf.Capture(**asked), direction="causal")
    with pytest.raises(ValueError, match=r"attention of layer 0, .* has 1\.\.3"):
        fast(**batch(), capture=tbf.Capture(attention_values=[0]))
    for more in ({}, {"capture": tbf.Capture([1])}, {"packed": True}):
        with pytest.raises(ValueError, match="give it capture= and packed=True"):
            fast(**batch(), record_only=True, **more)
    plain.gradient_checkpointing_enable({"use_reentrant": True})
    with (
        pytest.raises(ValueError, match="use_reentrant=False"),
        record_padded(plain, tbf.Capture([1])),
    ):
        pass
    plain.eval()
    with record_padded(plain, tbf.Capture([1])):  # checkpointing is off in eval mode
        pass
