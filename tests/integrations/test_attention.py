"""attn_implementation="tinybert_fast": eager's numbers on real tokens, or a refusal."""

import copy
import subprocess
import sys

import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModel, AutoModelForSequenceClassification, BertLMHeadModel, BertModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

import tinybert_fast as tbf
from tinybert_fast.integrations import attention as plug_in
from tinybert_fast.integrations import bert as acceleration
from tinybert_fast.modules import record_padded
from tinybert_fast.ops.layout import SequenceLayout

FP32 = {"atol": 1e-5, "rtol": 1e-5}
FAMILIES = ("Bert", "DistilBert", "Electra", "Roberta")
HEADS, WIDTH, LAYERS = 4, 104, 2  # heads of 26, as in TinyBERT-4L


def config_of(family, *, dropout=0.0, attention_dropout=0.0, **changes):
    settings = {
        "vocab_size": 97,
        "max_position_embeddings": 32,
        "initializer_range": 0.1,  # far from the flat attention of a fresh model
        **changes,
    }
    if family == "DistilBert":
        settings |= {"dim": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 2 * WIDTH}
        settings |= {"dropout": dropout, "attention_dropout": attention_dropout}
    else:
        settings |= {"hidden_size": WIDTH, "num_hidden_layers": LAYERS}
        settings |= {"num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH}
        settings |= {"hidden_dropout_prob": dropout}
        settings |= {"attention_probs_dropout_prob": attention_dropout, "use_cache": False}
    return getattr(transformers, f"{family}Config")(**settings)


def pair_of(family="Bert", **settings):
    """The same weights twice, in eval mode: eager, and the plug-in."""
    torch.manual_seed(0)
    config = config_of(family, **settings)
    kind = getattr(transformers, f"{family}Model")
    without_pooler = {"add_pooling_layer": False} if family in ("Bert", "Roberta") else {}
    eager = kind(config, **without_pooler).eval()
    fast = copy.deepcopy(eager)
    eager.set_attn_implementation("eager")
    fast.set_attn_implementation("tinybert_fast")
    return eager, fast


def inputs_of(cases, padding):
    """Ids and mask: all that the four families have in common."""
    return {k: cases.batch(padding)[k] for k in ("input_ids", "attention_mask")}


def real_of(model, batch):
    """(T, C): the last hidden states of real tokens."""
    hidden = model(**batch).last_hidden_state
    return hidden[batch["attention_mask"].bool()] if "attention_mask" in batch else hidden


def backward_of(real):
    (real * torch.linspace(-1, 1, real.numel()).view(real.shape)).mean().backward()


def gradients_of(model, batch, seed=3):
    model.zero_grad()
    torch.manual_seed(seed)
    backward_of(real_of(model, batch))
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("family", FAMILIES)
def test_real_tokens_and_gradients_with_any_padding(cases, family, padding):
    eager, fast = pair_of(family)
    batch = inputs_of(cases, padding)
    theirs, ours = real_of(eager, batch), real_of(fast, batch)
    torch.testing.assert_close(ours, theirs, **FP32)
    backward_of(theirs)
    backward_of(ours)
    cases.same_gradients(fast, eager)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask(cases, family):
    eager, fast = pair_of(family)
    batch = inputs_of(cases, "full")
    del batch["attention_mask"]
    torch.testing.assert_close(real_of(fast, batch), real_of(eager, batch), **FP32)


def test_rows_of_padding_are_zeros(cases, padding):
    _, fast = pair_of()
    batch = inputs_of(cases, padding)
    seen = []
    for layer in fast.encoder.layer:
        layer.attention.self.register_forward_hook(lambda module, given, out: seen.append(out))
    fast(**batch)
    for out, probabilities in seen:
        assert not out[~batch["attention_mask"].bool()].any()
        assert probabilities is None


def test_the_mask_is_read_once_and_nothing_is_copied(cases, monkeypatch):
    _, fast = pair_of()
    batch, read, strides = inputs_of(cases, "holes"), [], []
    from_mask, attention = SequenceLayout.from_mask, plug_in.ops.attention
    monkeypatch.setattr(SequenceLayout, "from_mask", lambda m: read.append(m) or from_mask(m))
    monkeypatch.setattr(
        plug_in.ops,
        "attention",
        lambda q, k, v, **rest: strides.append(q.stride()) or attention(q, k, v, **rest),
    )
    fast(**batch)
    assert len(read) == 1
    assert strides == [(9 * WIDTH, WIDTH, WIDTH // HEADS, 1)] * LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_follows_the_seed(cases, family):
    _, fast = pair_of(family, attention_dropout=0.1)
    batch = inputs_of(cases, "right")
    before = torch.get_rng_state()
    evaluated = real_of(fast, batch)
    assert torch.equal(torch.get_rng_state(), before)  # drawn only where something is dropped
    fast.train()
    first, again, other = (gradients_of(fast, batch, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(real_of(fast, batch), evaluated)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_replays_dropout(cases, family, reentrant):
    _, fast = pair_of(family, dropout=0.1, attention_dropout=0.1)
    fast.train()
    batch = inputs_of(cases, "holes")
    kept = gradients_of(fast, batch)
    fast.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert torch.equal(gradients_of(fast, batch), kept)


@pytest.mark.parametrize(
    ("family", "masked"), [(family, True) for family in FAMILIES] + [("Bert", False)]
)
def test_compiles_whole(cases, family, masked):
    """One graph, whatever is padding; the mask is never read on the host."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager, fast = pair_of(family)
    whole = torch.compile(fast, fullgraph=True, backend=counter)
    for padding in cases.masks:
        batch = inputs_of(cases, padding)
        if not masked:
            del batch["attention_mask"]
        theirs, ours = real_of(eager, batch), real_of(whole, batch)
        torch.testing.assert_close(ours, theirs, **FP32)
        backward_of(theirs)
        backward_of(ours)
    cases.same_gradients(fast, eager)
    assert counter.frame_count == 1


@pytest.mark.parametrize("checkpointed", [True, False])
def test_compiled_training_is_the_same_training(cases, checkpointed):
    torch._dynamo.reset()
    _, fast = pair_of(dropout=0.1, attention_dropout=0.1)
    fast.train()
    batch = inputs_of(cases, "holes")
    expected = gradients_of(fast, batch)
    if checkpointed:
        fast.gradient_checkpointing_enable({"use_reentrant": False})
    whole = torch.compile(fast, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(gradients_of(whole, batch), expected)


def test_is_exported_and_not_traced(cases):
    """What is exported takes any mask; a trace would hold that of the example."""
    eager, fast = pair_of()
    example, other = inputs_of(cases, "full"), inputs_of(cases, "left")
    exported = torch.export.export(fast, (), example)
    torch.testing.assert_close(real_of(exported.module(), other), real_of(eager, other), **FP32)
    with pytest.raises(ValueError, match=r"torch.jit.trace would keep .*\"eager\"\) can"):
        torch.jit.trace(fast, (example["input_ids"], example["attention_mask"]), strict=False)


def test_layers_compile_one_by_one(cases, padding):
    torch._dynamo.reset()
    eager, fast = pair_of()
    for layer in fast.encoder.layer:
        layer.compile(fullgraph=True, backend="aot_eager")
    batch = inputs_of(cases, padding)
    torch.testing.assert_close(real_of(fast, batch), real_of(eager, batch), **FP32)


def test_compiles_for_any_batch_and_width(cases):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    eager, fast = pair_of()
    whole = torch.compile(fast, fullgraph=True, dynamic=True, backend=counter)
    batch = inputs_of(cases, "right")
    for rows, columns in ((4, 9), (3, 9), (2, 6), (3, 7)):
        part = {k: v[:rows, :columns].clone() for k, v in batch.items()}
        torch.testing.assert_close(real_of(whole, part), real_of(eager, part), **FP32)
    assert counter.frame_count == 1


def test_auto_classes_and_a_clean_config(cases, tmp_path):
    chosen = {"attn_implementation": "tinybert_fast"}
    model = AutoModelForSequenceClassification.from_config(config_of("Bert"), **chosen).eval()
    model.save_pretrained(tmp_path)
    assert "tinybert_fast" not in (tmp_path / "config.json").read_text()
    plain, again = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path, **how).eval()
        for how in ({}, chosen)
    )
    assert plain.config._attn_implementation == "sdpa"
    assert (
        again.config._attn_implementation
        == AutoModel.from_pretrained(tmp_path, **chosen).config._attn_implementation
        == "tinybert_fast"
    )
    batch = cases.batch("right")
    for other in (model, again):
        torch.testing.assert_close(other(**batch).logits, plain(**batch).logits, **FP32)


def test_accelerate_takes_its_place(cases, monkeypatch):
    eager, fast = pair_of()
    batch = inputs_of(cases, "holes")
    warnings = []
    monkeypatch.setattr(acceleration, "_warn", warnings.append)
    tbf.accelerate(fast)
    torch.testing.assert_close(real_of(fast, batch), real_of(eager, batch), **FP32)
    assert not warnings
    tbf.restore(fast)
    assert fast.config._attn_implementation == "tinybert_fast"
    torch.testing.assert_close(real_of(fast, batch), real_of(eager, batch), **FP32)


def test_record_padded_reads_queries_and_keys(cases):
    batch = inputs_of(cases, "holes")
    real = batch["attention_mask"].bool()
    theirs, ours = (tbf.Capture(attention=(1, LAYERS)) for _ in range(2))
    for model, capture in zip(pair_of(), (theirs, ours)):
        with record_padded(model, capture):
            model(**batch)
    for m in theirs.attention:
        torch.testing.assert_close(ours.queries[m][real], theirs.queries[m][real], **FP32)
        torch.testing.assert_close(ours.keys[m][real], theirs.keys[m][real], **FP32)


@pytest.mark.parametrize(
    ("what", "keywords"),
    [
        ("4-D mask came ready-made", {"attention_mask": torch.ones(4, 1, 9, 9).bool()}),
        ("is not the key-padding mask", {"attention_mask": torch.ones(4, 9, 9).bool()}),
        ("9 queries attend to 12 keys", {"attention_mask": torch.ones(4, 12)}),
        ("is not the key-padding mask", {"attention_mask": torch.ones(1, 9)}),
        ("output_attentions asks for", {"output_attentions": True}),
        ("keyword 'cu_seq_lens_q'", {"cu_seq_lens_q": torch.tensor([0, 9])}),
        ("keyword 'sliding_window'", {"sliding_window": 4}),
        ("keyword 'softcap'", {"softcap": 30.0}),
        ("keyword 'capture'", {"capture": tbf.Capture(attention=(1,))}),
        ("is causal", {"is_causal": True}),
    ],
)
def test_refuses_the_call(cases, what, keywords):
    _, fast = pair_of()
    with pytest.raises(ValueError, match=what) as refusal:
        fast(**inputs_of(cases, "right") | keywords)
    assert "eager" in str(refusal.value)


def test_refuses_probabilities_that_the_config_asks_for(cases):
    _, fast = pair_of()
    fast.config._output_attentions = True
    with pytest.raises(ValueError, match="output_attentions asks for"):
        fast(**inputs_of(cases, "right"))


def test_refuses_decoders_and_cross_attention(cases):
    batch = inputs_of(cases, "right")
    config = config_of("Bert", is_decoder=True, add_cross_attention=True)
    decoder = BertLMHeadModel(config)
    decoder.set_attn_implementation("tinybert_fast")
    with pytest.raises(ValueError, match="causal"):
        decoder(**batch)
    with pytest.raises(ValueError, match="causal"):
        decoder(**batch, encoder_hidden_states=torch.zeros(*cases.shape, WIDTH))


def test_refuses_a_rate_that_8_bits_cannot_express(cases):
    _, fast = pair_of(attention_dropout=0.001)
    with pytest.raises(ValueError, match="cannot be expressed in 8 bits"):
        fast.train()(**inputs_of(cases, "right"))


def test_what_reaches_a_layer(cases):
    """The functions alone: no mask at all, other keys than queries, and masks of other kinds."""
    layer = BertModel(config_of("Bert")).encoder.layer[0].attention.self
    q, k, v = torch.randn(3, 2, HEADS, 5, 26)
    out, probabilities = plug_in.attention_function(layer, q, k, v, None)
    expected = torch.softmax(q @ k.mT * 26**-0.5, -1) @ v
    torch.testing.assert_close(out, expected.transpose(1, 2), **FP32)
    assert probabilities is None
    for keys in (k[:, :, :3], k[:, :2]):
        with pytest.raises(ValueError, match="grouped heads"):
            plug_in.attention_function(layer, q, keys, keys, None)
    with pytest.raises(ValueError, match="cross-attention"):
        plug_in.attention_function(layer, q, k, v, None, encoder_hidden_states=v)
    with pytest.raises(ValueError, match="is causal"):  # sdpa too takes silence for causal
        plug_in.attention_function(torch.nn.Identity(), q, k, v, None)
    sizes = {"batch_size": 2, "q_length": 5, "kv_length": 5}
    with pytest.raises(ValueError, match="causal, windowed or custom"):
        plug_in.mask_function(**sizes, mask_function=causal_mask_function)
    layout = plug_in.mask_function(**sizes, mask_function=bidirectional_mask_function)
    assert layout.is_full


@pytest.mark.parametrize("step", ["tbf.register_attention()", "tbf.accelerate"])
def test_what_makes_the_name_known(step):
    code = f"""
import tinybert_fast as tbf
from transformers import AttentionInterface, AttentionMaskInterface
interfaces = AttentionInterface(), AttentionMaskInterface()
assert not any("tinybert_fast" in each for each in interfaces)
{step}
assert all("tinybert_fast" in each for each in interfaces)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/", timeout=120)
