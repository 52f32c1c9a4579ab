"""accelerate(): the outputs and gradients of Transformers' BERT, for every class, padding and
mode.
"""

import contextlib
import copy
import functools
import inspect
import logging
import pickle

import pytest
import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification, BertModel, EncoderDecoderModel
from transformers.models.bert.modeling_bert import BertForPreTrainingOutput
from transformers.utils import output_capturing

import tinybert_fast as tbf
from tinybert_fast import ops
from tinybert_fast.integrations import bert as integration
from tinybert_fast.modules import encoder
from tinybert_fast.ops import dispatch

FP32 = {"atol": 1e-5, "rtol": 1e-5}
CLASSES = (
    "BertModel",
    "BertForPreTraining",
    "BertForMaskedLM",
    "BertForNextSentencePrediction",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)


@pytest.fixture(autouse=True)
def _say_again():
    """Warnings that are given once per process, once per test."""
    integration._warn.cache_clear()


def labels_of(name, mask):
    """Keyword labels that give class ``name`` a loss over real tokens."""
    generator = torch.Generator().manual_seed(1)
    batch = mask.shape[0]
    words = torch.randint(97, mask.shape, generator=generator)
    masked = torch.where(
        (torch.rand(mask.shape, generator=generator) < 0.4) & mask.bool(), words, -100
    )
    masked[0, :2] = words[0, :2]
    pairs = torch.where(mask.any(1), torch.arange(batch) % 2, -100)  # no order in an empty row
    return {
        "BertModel": {},
        "BertForPreTraining": {"labels": masked, "next_sentence_label": pairs},
        "BertForMaskedLM": {"labels": masked},
        "BertForNextSentencePrediction": {"labels": pairs},
        "BertForSequenceClassification": {"labels": pairs},
        "BertForTokenClassification": {"labels": torch.where(mask.bool(), words % 2, -100)},
        "BertForQuestionAnswering": {},
    }[name]


def tensors(output):
    return {key: value for key, value in output.items() if torch.is_tensor(value)}


def assert_same_on_real_tokens(ours, theirs, mask):
    """Rows (B, N, ...) of real tokens, everything else (pooled, logits of a sequence, loss) where a
    row has tokens.
    """
    assert tensors(ours).keys() == tensors(theirs).keys()
    for key, want in tensors(theirs).items():
        got = ours[key]
        assert got.shape == want.shape, key
        if want.shape[:2] == mask.shape:
            got, want = got[mask.bool()], want[mask.bool()]
        elif want.dim() and want.shape[0] == mask.shape[0]:
            live = mask.any(1)
            got, want = got[live], want[live]
        torch.testing.assert_close(got, want, **FP32, msg=lambda text, key=key: f"{key}: {text}")


def scalar_of(output, mask):
    """A smooth function of all that counts in an output: real tokens, sequences that have tokens,
    and the loss.
    """
    total = output.get("loss", 0.0)
    for value in tensors(output).values():
        if value.dim() == 0:
            continue
        value = value[mask.bool()] if value.shape[:2] == mask.shape else value[mask.any(1)]
        total = total + (value * torch.linspace(-1, 1, value.numel()).view(value.shape)).mean()
    return total


@pytest.mark.parametrize("width", [312, 768])
@pytest.mark.parametrize("name", ["BertModel", "BertForPreTraining"])
def test_real_tokens_and_gradients_with_any_padding(cases, name, width, padding):
    plain, fast = cases.pair(name, width)
    batch = cases.batch(padding)
    mask = batch["attention_mask"]
    theirs, ours = plain(**batch), fast(**batch)
    assert_same_on_real_tokens(ours, theirs, mask)
    scalar_of(theirs, mask).backward()
    scalar_of(ours, mask).backward()
    cases.same_gradients(fast, plain)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class(cases, name, poolable):
    """Training mode, labels given; heads that skip unlabelled rows are asked for their logits as
    well.
    """
    plain, fast = cases.pair(name, accelerate={"training_logits": True})
    plain.train(), fast.train()
    batch = cases.batch(poolable)
    batch |= labels_of(name, batch["attention_mask"])
    theirs, ours = plain(**batch), fast(**batch)
    assert type(theirs) is type(ours)
    assert_same_on_real_tokens(ours, theirs, batch["attention_mask"])
    scalar_of(theirs, batch["attention_mask"]).backward()
    scalar_of(ours, batch["attention_mask"]).backward()
    cases.same_gradients(fast, plain)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_masked_lm_training_skips_unlabelled_rows(cases, name, padding):
    plain, fast = cases.pair(name)
    batch = cases.batch(padding)
    batch |= labels_of(name, batch["attention_mask"])
    with torch.no_grad():
        evaluated = fast(**batch)
        assert_same_on_real_tokens(evaluated, plain(**batch), batch["attention_mask"])
    plain.train(), fast.train()
    theirs, ours = plain(**batch), fast(**batch)
    pooled_padding = name == "BertForPreTraining" and padding in ("left", "hole_first")
    logits = "prediction_logits" if name == "BertForPreTraining" else "logits"
    assert (getattr(ours, logits) is None) is not pooled_padding
    torch.testing.assert_close(ours.loss, theirs.loss, **FP32)
    torch.testing.assert_close(ours.loss, evaluated.loss, **FP32)
    theirs.loss.backward()
    ours.loss.backward()
    cases.same_gradients(fast, plain)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
@pytest.mark.parametrize("training", [False, True])
def test_labels_on_padding_do_not_count(cases, name, training):
    _, fast = cases.pair(name)
    fast.train(training)
    batch = cases.batch("right")
    batch |= labels_of(name, batch["attention_mask"])
    want = fast(**batch).loss
    assert (batch["attention_mask"] == 0).any()
    batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, 5)
    assert torch.equal(fast(**batch).loss, want)


def test_flop_counters_see_what_is_computed(cases):
    """As much as Transformers' own code computes, and less for padding; in the backward the scores
    once more.
    """
    plain, fast = cases.pair("BertModel", attn_implementation="eager")
    layers, width, pairs = 2, plain.config.hidden_size, cases.shape[0] * cases.shape[1] ** 2
    found = {}
    for name, model in (("plain", plain), ("fast", fast)):
        for padding in ("full", "right"):
            with FlopCounterMode(display=False) as counter:
                hidden = model(**cases.batch(padding)).last_hidden_state
            found[name, padding] = counter.get_total_flops()
            with FlopCounterMode(display=False) as counter:
                hidden.sum().backward()
            found[name, padding, "backward"] = counter.get_total_flops()
    assert found["fast", "full"] == found["plain", "full"] == found["plain", "right"]
    assert found["fast", "right"] < found["fast", "full"]
    more = found["fast", "full", "backward"] - found["plain", "full", "backward"]
    assert more == 2 * pairs * width * layers


def rows_of_the_last_ffn(model, batch):
    """How many rows the last layer's FFN computes of a batch."""
    rows = []
    dense = model.bert.encoder.layer[-1].output.dense
    hook = dense.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    model(**batch)
    hook.remove()
    return rows


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "BertForNextSentencePrediction"])
def test_the_last_layer_computes_what_the_head_reads(cases, name, poolable):
    """First tokens alone, unless somebody asks for hidden states or another pooler reads them."""
    _, fast = cases.pair(name)
    batch = cases.batch(poolable)
    tokens, sequences = int(batch["attention_mask"].sum()), cases.shape[0]
    assert rows_of_the_last_ffn(fast, batch) == [sequences]
    assert rows_of_the_last_ffn(fast, {**batch, "output_hidden_states": True}) == [tokens]
    fast.bert.pooler = MeanPooler(fast.config)
    assert rows_of_the_last_ffn(fast, batch) == [tokens]


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_the_last_layer_computes_labelled_rows_in_training(cases, name):
    _, fast = cases.pair(name)
    fast.train()
    batch = cases.batch("right")
    tokens = int(batch["attention_mask"].sum())
    batch |= labels_of(name, batch["attention_mask"])
    labelled = int((batch["labels"] != -100).sum())
    firsts = cases.shape[0] if name == "BertForPreTraining" else 0
    assert rows_of_the_last_ffn(fast, batch) == [firsts + labelled]
    assert rows_of_the_last_ffn(fast, {**batch, "output_hidden_states": True}) == [tokens]
    tbf.accelerate(fast, training_logits=True)
    assert rows_of_the_last_ffn(fast, batch) == [tokens]


def test_an_empty_row_gets_the_logits_of_pooled_zeros(cases):
    _, fast = cases.pair("BertForSequenceClassification")
    batch = cases.batch("empty_row")
    pooled = fast.bert(**batch).pooler_output
    torch.testing.assert_close(fast(**batch).logits, fast.classifier(pooled), **FP32)
    nothing = {**batch, "attention_mask": torch.zeros(cases.shape, dtype=torch.int64)}
    assert fast(**nothing).logits.isfinite().all()


class MeanPooler(nn.Module):
    """A pooler that reads every position."""

    def __init__(self, config):
        super().__init__()
        torch.manual_seed(2)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden):
        return torch.tanh(self.dense(hidden.mean(1)))


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForSequenceClassification"])
def test_another_pooler_reads_every_position(cases, name):
    plain, fast = cases.pair(name)
    for model in (plain, fast):
        model.bert.pooler = MeanPooler(model.config)
    batch = cases.batch("full")
    logits = "logits" if name == "BertForSequenceClassification" else "seq_relationship_logits"
    torch.testing.assert_close(fast(**batch)[logits], plain(**batch)[logits], **FP32)


def test_pretraining_gives_a_loss_for_both_labels_only(cases):
    _, fast = cases.pair("BertForPreTraining")
    batch = cases.batch("right")
    labels = labels_of("BertForPreTraining", batch["attention_mask"])
    fast.train()
    one = fast(**batch, labels=labels["labels"])
    assert one.loss is None
    assert one.prediction_logits.shape == (*cases.shape, cases.vocabulary)
    loss, order = fast(**batch, **labels, return_dict=False)
    assert loss.dim() == 0
    assert order.shape == (cases.shape[0], 2)


@pytest.mark.parametrize(
    ("problem", "labels", "number"),
    [
        ("regression", torch.tensor([0.5, -1.0, 2.0, 0.0]), 1),
        ("single_label_classification", torch.tensor([0, 2, 1, 2]), 3),
        ("multi_label_classification", torch.tensor([[0, 1, 1.0]] * 4), 3),
    ],
)
def test_sequence_classification_problems(cases, problem, labels, number):
    plain, fast = cases.pair(
        "BertForSequenceClassification",
        config=cases.config(num_labels=number, problem_type=problem),
    )
    batch = cases.batch("right", labels=labels)
    theirs, ours = plain(**batch), fast(**batch)
    assert_same_on_real_tokens(ours, theirs, batch["attention_mask"])


def test_multiple_choice(cases):
    plain, fast = cases.pair("BertForMultipleChoice")
    batch = {k: v.view(2, 2, -1) for k, v in cases.batch("right").items()}
    batch["labels"] = torch.tensor([1, 0])
    theirs, ours = plain(**batch), fast(**batch)
    torch.testing.assert_close(ours.loss, theirs.loss, **FP32)
    torch.testing.assert_close(ours.logits, theirs.logits, **FP32)


def test_question_answering_never_answers_with_padding(cases, padding):
    plain, fast = cases.pair("BertForQuestionAnswering")
    batch = cases.batch(padding)
    mask = batch["attention_mask"]
    start, end = mask.argmax(1), mask.shape[1] - 1 - mask.flip(1).argmax(1)
    theirs, ours = plain(**batch), fast(**batch, start_positions=start, end_positions=end)
    expected = 0.0
    for got, want, at in (
        (ours.start_logits, theirs.start_logits, start),
        (ours.end_logits, theirs.end_logits, end),
    ):
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], **FP32)
        assert (got[~mask.bool()] == torch.finfo(got.dtype).min).all()
        real = want.masked_fill(~mask.bool(), -torch.inf)
        expected = expected + F.cross_entropy(real[mask.any(1)], at[mask.any(1)]) / 2
    torch.testing.assert_close(ours.loss, expected, **FP32)
    expected.backward()
    ours.loss.backward()
    cases.same_gradients(fast, plain)


def test_question_answering_ignores_positions_on_padding(cases):
    _, fast = cases.pair("BertForQuestionAnswering")
    batch = cases.batch("right")  # row 2 has 4 tokens
    inside = torch.tensor([1, 1, 1, 1])
    on_padding, outside = torch.tensor([1, 1, 5, 1]), torch.tensor([1, 1, 99, 1])
    losses = [
        fast(**batch, start_positions=at, end_positions=at).loss
        for at in (on_padding, outside, inside)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_empty_rows_pool_zeros(cases):
    _, fast = cases.pair("BertForPreTraining")
    batch = cases.batch("empty_row")
    empty = ~batch["attention_mask"].any(1)
    zeros = torch.zeros(1, 1, 312)
    pooled = fast.bert(**batch).pooler_output
    torch.testing.assert_close(pooled[empty], fast.bert.pooler(zeros).expand(int(empty.sum()), -1))
    order = fast(**batch).seq_relationship_logits
    torch.testing.assert_close(order, fast.cls.seq_relationship(pooled), **FP32)


def test_a_batch_of_padding_alone(cases):
    _, fast = cases.pair("BertForPreTraining")
    batch = cases.batch("right", attention_mask=torch.zeros(cases.shape, dtype=torch.int64))
    output = fast(**batch, output_hidden_states=True)
    assert not output.hidden_states[-1].any()
    assert output.seq_relationship_logits.isfinite().all()
    output.seq_relationship_logits.sum().backward()


def test_padding_is_zero_where_padded_states_are_returned(cases, poolable):
    _, fast = cases.pair("BertModel")
    batch = cases.batch(poolable)
    output = fast(**batch, output_hidden_states=True)
    for states in (output.last_hidden_state, *output.hidden_states):
        assert not states[~batch["attention_mask"].bool()].any()


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32, None])
def test_mask_dtypes_and_no_mask(cases, kind):
    plain, fast = cases.pair("BertModel")
    batch = cases.batch("right")
    mask = batch.pop("attention_mask")
    if kind is None:
        mask = torch.ones_like(mask)
    else:
        batch["attention_mask"] = mask.to(kind)
    assert_same_on_real_tokens(fast(**batch), plain(**batch), mask)


def test_positions_types_and_embeddings_of_the_caller(cases, poolable):
    plain, fast = cases.pair("BertModel")
    batch = cases.batch(poolable)
    mask = batch["attention_mask"]
    offsets = torch.arange(cases.shape[1]) + 3
    ready = torch.randn(*cases.shape, 312)
    common = {"attention_mask": mask}
    for inputs in (
        {"input_ids": batch["input_ids"]},  # neither types nor positions
        {"input_ids": batch["input_ids"], "position_ids": offsets[None]},
        {"input_ids": batch["input_ids"], "position_ids": offsets.expand(cases.shape).flip(0)},
        {
            "input_ids": batch["input_ids"],
            "token_type_ids": torch.ones(1, cases.shape[1], dtype=int),
        },
        {"inputs_embeds": ready, "token_type_ids": batch["token_type_ids"]},
        {"inputs_embeds": ready, "position_ids": offsets[None]},
    ):
        assert_same_on_real_tokens(fast(**inputs, **common), plain(**inputs, **common), mask)


def test_gradient_of_ready_made_embeddings(cases):
    plain, fast = cases.pair("BertModel")
    mask = cases.batch("holes")["attention_mask"]
    grads = []
    for model in (plain, fast):
        ready = torch.randn(*cases.shape, 312, generator=torch.Generator().manual_seed(3))
        ready.requires_grad_()
        scalar_of(model(inputs_embeds=ready, attention_mask=mask), mask).backward()
        grads.append(ready.grad[mask.bool()])
    torch.testing.assert_close(grads[1], grads[0], **FP32)


@pytest.mark.parametrize("asked", [True, 1, [0, -1], [-2], []], ids=str)
@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForQuestionAnswering"])
def test_hidden_states(cases, name, asked, poolable):
    selected = asked is not True and asked != []  # 1 == True, and asks for another thing
    if selected and not hasattr(output_capturing, "selected_hidden_states"):
        pytest.skip("this Transformers numbers selected hidden states otherwise")
    plain, fast = cases.pair(name)
    batch = cases.batch(poolable)
    mask = batch["attention_mask"].bool()
    theirs = plain(**batch, output_hidden_states=asked).hidden_states
    ours = fast(**batch, output_hidden_states=asked).hidden_states
    if theirs is None:
        assert ours is None
        return
    assert len(ours) == len(theirs)
    for got, want in zip(ours, theirs):
        assert (got is None) == (want is None)
        if want is not None:
            torch.testing.assert_close(got[mask], want[mask], **FP32)


def test_hidden_states_by_config_and_as_tuple(cases):
    plain, fast = cases.pair("BertForPreTraining", config=cases.config(output_hidden_states=True))
    batch = cases.batch("right")
    theirs, ours = plain(**batch, return_dict=False), fast(**batch, return_dict=False)
    assert isinstance(ours, tuple)
    assert [type(x) for x in ours] == [type(x) for x in theirs]
    assert len(ours[-1]) == 3
    assert isinstance(fast.bert(**batch, return_dict=False), tuple)
    fast.config.return_dict = False
    assert isinstance(fast(**batch), tuple)
    assert isinstance(fast(**batch, return_dict=True), BertForPreTrainingOutput)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradient_checkpointing(cases, monkeypatch, reentrant, dropout):
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    _, fast = cases.pair("BertForMaskedLM", **rates)
    batch = cases.batch("right")
    batch |= labels_of("BertForMaskedLM", batch["attention_mask"])
    fast.train()
    saved = copy.deepcopy(fast)
    saved.gradient_checkpointing_enable({"use_reentrant": reentrant})
    losses, runs = [], []
    layer = encoder.encode_layer
    monkeypatch.setattr(
        encoder, "encode_layer", lambda *a, **k: (runs.append(1), layer(*a, **k))[1]
    )
    for model in (fast, saved):
        torch.manual_seed(5)
        losses.append(model(**batch).loss)
        losses[-1].backward()
    assert len(runs) == 2 + 2 * 2, "each layer runs again in backward"
    assert losses[0] == losses[1]
    for (name, a), (_, b) in zip(fast.named_parameters(), saved.named_parameters()):
        assert torch.equal(a.grad, b.grad), name


def test_reentrant_checkpointing_over_frozen_embeddings(cases):
    plain, fast = cases.pair("BertForMaskedLM")
    batch = cases.batch("right")
    batch |= labels_of("BertForMaskedLM", batch["attention_mask"])
    for model in (plain, fast):
        model.train().bert.embeddings.requires_grad_(False)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model(**batch).loss.backward()
    for (name, a), (_, b) in zip(fast.named_parameters(), plain.named_parameters()):
        if b.requires_grad:
            assert b.grad is not None, name
            torch.testing.assert_close(a.grad, b.grad, rtol=2e-5, atol=1e-6, msg=name)


def test_dropout_follows_the_torch_seed_and_the_mode(cases):
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}
    plain, fast = cases.pair("BertModel", **rates)
    batch = cases.batch("right")
    before = torch.random.get_rng_state()
    assert_same_on_real_tokens(fast(**batch), plain(**batch), batch["attention_mask"])
    assert torch.equal(before, torch.random.get_rng_state()), (
        "an eval forward drew from torch's generator"
    )
    fast.train()
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(fast(**batch).last_hidden_state)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[2], fast(**batch).last_hidden_state), (
        "a second step drew the same mask"
    )


@pytest.mark.parametrize(
    "place",
    [
        "embeddings.dropout",
        "encoder.layer.1.attention.self.dropout",
        "encoder.layer.1.attention.output.dropout",
        "encoder.layer.1.output.dropout",
    ],
)
def test_each_dropout_place(cases, place):
    """One rate alone disturbs the output, around its value without dropout."""
    _, fast = cases.pair("BertModel")
    fast.get_submodule(place).p = 0.1
    batch = cases.batch("full")
    still = fast(**batch).last_hidden_state
    fast.train()
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = torch.stack([fast(**batch).last_hidden_state for _ in range(40)])
    spread = drawn.std(0).mean()
    assert spread > 1e-3
    assert (drawn.mean(0) - still).abs().mean() < spread


def test_other_activations_run_packed(cases, caplog):
    for activation in ("relu", "gelu_new"):
        plain, fast = cases.pair("BertForMaskedLM", hidden_act=activation)
        batch = cases.batch("left")
        assert_same_on_real_tokens(fast(**batch), plain(**batch), batch["attention_mask"])
    assert not caplog.records


def test_adapters_and_hooks_on_linear_layers_are_heard(cases, caplog):
    plain, fast = cases.pair("BertModel")
    batch = cases.batch("right")
    shapes = []
    for model in (plain, fast):
        for name, module in model.named_modules():
            if name.endswith(("query", "dense")) and "pooler" not in name:
                module.register_forward_hook(
                    lambda m, args, out: (shapes.append(out.shape), out * 1.5)[1]
                )
    assert_same_on_real_tokens(fast(**batch), plain(**batch), batch["attention_mask"])
    assert len(shapes) == 2 * 2 * 4
    assert not caplog.records


# ---- what packed rows cannot serve ----


def served_by_transformers(caplog, match):
    return [r for r in caplog.records if r.levelno == logging.WARNING and match in r.message]


def test_left_padding_with_a_pooler_runs_transformers_and_says_so_once(cases, caplog):
    plain, fast = cases.pair("BertForSequenceClassification")
    batch = cases.batch("left")
    for _ in range(2):
        torch.testing.assert_close(fast(**batch).logits, plain(**batch).logits, atol=0, rtol=0)
    assert len(served_by_transformers(caplog, "starts with padding")) == 1
    fast(**cases.batch("right"))
    with pytest.raises(ValueError, match="starts with padding"):
        fast(**batch, capture=tbf.Capture(hidden_states=(0,)))


@pytest.mark.parametrize(
    ("reason", "call"),
    [
        ("output_attentions", lambda b: {**b, "output_attentions": True}),
        ("3-D mask", lambda b: {**b, "attention_mask": torch.ones(4, 9, 9)}),
        ("4-D mask", lambda b: {**b, "attention_mask": torch.zeros(4, 1, 9, 9)}),
        ("cu_seq_lens_q", lambda b: {**b, "cu_seq_lens_q": torch.tensor([0, 9])}),
        ("is_causal", lambda b: {**b, "is_causal": True}),
    ],
)
def test_calls_that_run_transformers(cases, caplog, reason, call):
    plain, fast = cases.pair(
        "BertForSequenceClassification", config=cases.config(attn_implementation="eager")
    )
    batch = call(cases.batch("right"))
    try:
        theirs = plain(**batch, output_hidden_states=True)
    except (ValueError, RuntimeError) as error:  # Transformers refuses it: so do we, in its words
        with pytest.raises(type(error)):
            fast(**batch)
    else:
        ours = fast(**batch, output_hidden_states=True)
        fast(**batch)
        torch.testing.assert_close(ours.logits, theirs.logits, atol=0, rtol=0)
        assert len(ours.hidden_states) == len(theirs.hidden_states) == 3
        assert len(ours.attentions or ()) == len(theirs.attentions or ())
    assert len(served_by_transformers(caplog, reason)) == 1
    with pytest.raises(ValueError, match=reason):
        fast(**batch, capture=tbf.Capture(hidden_states=(0,)))


@pytest.mark.parametrize(
    "where",
    [
        "embeddings.word_embeddings",
        "embeddings.dropout",
        "encoder",
        "encoder.layer.1.output.LayerNorm",
        "encoder.layer.0.intermediate.intermediate_act_fn",
    ],
)
def test_hooks_on_bypassed_modules_are_heard(cases, caplog, where):
    _, fast = cases.pair("BertModel")
    heard = []
    fast.get_submodule(where).register_forward_hook(lambda *_: heard.append(where))
    fast(**cases.batch("right"))
    assert heard
    assert len(served_by_transformers(caplog, "hook")) == 1


@pytest.mark.parametrize("where", ["encoder.layer.1", "encoder.layer.0.output"])
def test_backward_hooks_on_bypassed_modules_are_heard(cases, caplog, where):
    _, fast = cases.pair("BertModel")
    heard = []
    fast.get_submodule(where).register_full_backward_hook(lambda *_: heard.append(where))
    fast(**cases.batch("right")).last_hidden_state.sum().backward()
    assert heard
    assert len(served_by_transformers(caplog, "hook")) == 1


@pytest.mark.parametrize(
    "where",
    [
        "embeddings",
        "embeddings.dropout",
        "encoder",
        "encoder.layer.1",
        "encoder.layer.1.attention",
        "encoder.layer.0.attention.self",
        "encoder.layer.1.attention.output",
        "encoder.layer.1.intermediate",
        "encoder.layer.0.output",
        "encoder.layer.0.output.LayerNorm",
    ],
)
def test_a_replaced_module_runs_transformers(cases, caplog, where):
    plain, fast = cases.pair("BertModel")
    for model in (plain, fast):
        module = model.get_submodule(where)
        module.__class__ = twice_as_much(type(module))
    batch = cases.batch("right")
    assert torch.equal(fast(**batch).last_hidden_state, plain(**batch).last_hidden_state)
    assert len(served_by_transformers(caplog, "was replaced")) == 1


class Wrapper(nn.Module):
    """Around a module whose parts are then elsewhere, as tools put them."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


@pytest.mark.parametrize("where", ["encoder.layer.1", "encoder.layer.1.attention"])
def test_a_wrapped_module_runs_transformers(cases, caplog, where):
    plain, fast = cases.pair("BertModel")
    for model in (plain, fast):
        model.set_submodule(where, Wrapper(model.get_submodule(where)))
    batch = cases.batch("right")
    assert torch.equal(fast(**batch).last_hidden_state, plain(**batch).last_hidden_state)
    assert len(served_by_transformers(caplog, "replaced by a Wrapper")) == 1


def test_a_layer_norm_without_bias_runs_transformers(cases, caplog):
    plain, fast = cases.pair("BertModel")
    for model in (plain, fast):
        model.encoder.layer[0].output.LayerNorm.register_parameter("bias", None)
    batch = cases.batch("right")
    assert torch.equal(fast(**batch).last_hidden_state, plain(**batch).last_hidden_state)
    assert len(served_by_transformers(caplog, "a LayerNorm has no bias")) == 1


@pytest.mark.parametrize(
    "where",
    [
        "embeddings",
        "encoder.layer.1",
        "encoder.layer.0.output.LayerNorm",
        "encoder.layer.0.attention.self.query",
        "encoder.layer.1.output.dense",
    ],
)
def test_a_forward_set_on_an_instance_is_heard(cases, where):
    """As Accelerate's hooks and others' patches do."""
    plain, fast = cases.pair("BertModel")
    for model in (plain, fast):
        module = model.get_submodule(where)
        module.forward = functools.partial(twice_as_much(type(module)).forward, module)
    batch = cases.batch("right")
    theirs, ours = plain(**batch), fast(**batch)
    assert_same_on_real_tokens(ours, theirs, batch["attention_mask"])


@pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq", "sparse"])
def test_an_embedding_with_options_runs_transformers(cases, caplog, option):
    plain, fast = cases.pair("BertModel")
    for model in (plain, fast):
        setattr(model.embeddings.word_embeddings, option, True)
    batch = cases.batch("right")
    assert torch.equal(fast(**batch).last_hidden_state, plain(**batch).last_hidden_state)
    assert len(served_by_transformers(caplog, "an Embedding has one of max_norm")) == 1


def test_sequences_in_one_row_under_flash_attention_run_transformers(cases, caplog):
    """DataCollatorWithFlattening's form, which packed rows would let attend to one another."""
    _, fast = cases.pair("BertModel")
    fast.config._attn_implementation = "flash_attention_2"
    row = {"input_ids": torch.ones(1, 9, dtype=torch.int64)}
    with contextlib.suppress(Exception):  # flash attention itself is not here
        fast(**row, position_ids=torch.tensor([[*range(5), *range(4)]]))
    assert len(served_by_transformers(caplog, "separates sequences by position_ids")) == 1
    fast(**row)


def twice_as_much(cls):
    """A module that packed rows would miss if they only read its tensors."""

    def forward(self, *args, **kwargs):
        out = cls.forward(self, *args, **kwargs)
        if isinstance(out, torch.Tensor):
            return out * 2
        if isinstance(out, tuple):
            return (out[0] * 2, *out[1:])
        out.last_hidden_state = out.last_hidden_state * 2
        return out

    return type("Twice", (cls,), {"forward": forward})


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
@pytest.mark.parametrize(
    "where", ["", ".predictions", ".predictions.transform", ".predictions.transform.LayerNorm"]
)
def test_a_changed_masked_lm_head_runs_transformers(cases, caplog, name, where):
    plain, fast = cases.pair(name)
    batch = cases.batch("right")
    batch |= labels_of(name, batch["attention_mask"])
    heard = []
    for model in (plain.train(), fast.train()):
        head = model.get_submodule("cls" + where)
        head.register_forward_hook(lambda *_: heard.append(where))
        head.register_full_backward_hook(lambda *_: heard.append(where))
    torch.testing.assert_close(fast(**batch).loss, plain(**batch).loss)
    assert len(heard) == 2
    fast(**batch).loss.backward()
    assert len(heard) == 4
    assert len(served_by_transformers(caplog, "own head: a hook")) == 1


def test_models_that_run_transformers(cases, caplog):
    decoder = cases.config(is_decoder=True, add_cross_attention=True)
    plain, fast = cases.pair("BertLMHeadModel", config=decoder)
    batch = cases.batch("right", labels=torch.ones(cases.shape, dtype=int))
    states = torch.randn(4, 5, 312)
    ours = fast(**batch, encoder_hidden_states=states)
    assert torch.equal(ours.loss, plain(**batch, encoder_hidden_states=states).loss)
    assert len(served_by_transformers(caplog, "decoder")) == 1

    _, fast = cases.pair("BertModel")
    fast.encoder.layer[1].register_forward_hook(lambda *_: None)
    fast(**cases.batch("right"))
    assert len(served_by_transformers(caplog, "hook")) == 1

    _, fast = cases.pair("BertModel")
    fast.encoder.layer[1] = type("Other", (type(fast.encoder.layer[1]),), {})(fast.config, 1)
    fast(**cases.batch("right"))
    assert len(served_by_transformers(caplog, "Other")) == 1


def test_transformers_recorders_do_not_count_as_hooks(cases, caplog):
    """output_attentions leaves hooks on every layer for good; the calls after it are packed
    again.
    """
    _, fast = cases.pair("BertModel", config=cases.config(attn_implementation="eager"))
    batch = cases.batch("right")
    assert len(fast(**batch, output_attentions=True).attentions) == 2
    caplog.clear()
    integration._warn.cache_clear()
    fast(**batch)
    assert not caplog.records


def test_refusals(cases):
    _, fast = cases.pair("BertModel")
    batch = cases.batch("right")
    with pytest.raises(ValueError, match="exactly one of"):
        fast(attention_mask=batch["attention_mask"])
    with pytest.raises(ValueError, match="4 sequences of 9 positions, and the inputs are 4 of 7"):
        fast(batch["input_ids"][:, :7], batch["attention_mask"])
    with pytest.raises(ValueError, match="40 tokens wide and the model has 32 positions"):
        fast(torch.ones(1, 40, dtype=torch.int64))
    with pytest.raises(ValueError, match="nothing to accelerate"):
        tbf.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Mine, a subclass, may compute something else"):
        tbf.accelerate(type("Mine", (BertModel,), {})(cases.config()))
    with pytest.raises(ValueError, match="got str"):
        tbf.accelerate("bert-base-uncased")
    with pytest.raises(ValueError, match="got int"):
        tbf.restore(3)
    with pytest.raises(ValueError, match=r"hidden state 3, and this model has 0\.\.2"):
        fast(**batch, capture=tbf.Capture(hidden_states=(3,)))
    with pytest.raises(ValueError, match=r"attention of layer 0, and this model has 1\.\.2"):
        fast(**batch, capture=tbf.Capture(attention=(0,)))
    layout = tbf.SequenceLayout.from_mask(batch.pop("attention_mask"))
    with pytest.raises(ValueError, match="without attention_mask"):
        fast(**batch, layout=layout, output_attentions=True)


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        ("trition", "impl='trition' is not one of auto, triton"),
        (5, "impl=5 is not one of"),
        (("reference",), r"nor a \(forward, backward\) pair"),
        (("torch", ["reference"]), r"nor a \(forward, backward\) pair"),
        (("torch", "native"), "accelerate: .* the backward must be 'torch' or 'reference'"),
        ("triton", r"cannot run here: nobody installed it"),
        ("native", "no native implementation of bias_gelu, layer_norm"),
        (("native", "reference"), "TINYBERT_FAST_IMPL=native names it for the ops that have it"),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining"])
def test_refuses_an_impl_that_can_never_run(cases, name, impl, message, monkeypatch):
    unavailable = {"native": None, "triton": "nobody installed it"}
    monkeypatch.setattr(dispatch, "UNAVAILABLE", dispatch.UNAVAILABLE | unavailable)
    model = getattr(transformers, name)(cases.config())
    with pytest.raises(ValueError, match=message):
        tbf.accelerate(model, impl=impl)
    assert not tbf.is_accelerated(model)
    tbf.accelerate(model, impl=("auto", "reference"))
    with pytest.raises(ValueError, match=message):
        tbf.accelerate(model, impl=impl)  # again, of an accelerated one
    assert model.bert.fast_impl == ("auto", "reference")


def test_native_serves_what_has_no_masked_lm_head(cases, monkeypatch):
    monkeypatch.setitem(dispatch.UNAVAILABLE, "native", None)
    for name in ("BertModel", "BertForSequenceClassification"):
        assert tbf.is_accelerated(cases.pair(name, accelerate={"impl": "native"})[1])


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertForSequenceClassification"])
def test_is_restored_before_it_is_exported_or_traced(cases, name):
    plain, fast = cases.pair(name)
    batch = cases.batch("right")
    by_position = (batch["input_ids"], batch["attention_mask"])
    with pytest.raises(ValueError, match=r"restore\(model\) before exporting or tracing"):
        torch.export.export(fast, (), batch)
    with pytest.raises(ValueError, match=r"restore\(model\) before exporting or tracing"):
        torch.jit.trace(fast, by_position, strict=False)
    restored = torch.export.export(tbf.restore(fast), (), batch).module()
    assert_same_on_real_tokens(restored(**batch), plain(**batch), batch["attention_mask"])


def test_layout_of_the_caller(cases):
    _, fast = cases.pair("BertForMaskedLM")
    batch = cases.batch("holes")
    want = fast(**batch).logits
    layout = tbf.SequenceLayout.from_mask(batch.pop("attention_mask"))
    assert torch.equal(fast(**batch, layout=layout).logits, want)


# ---- the model as an object ----


@pytest.mark.parametrize("name", [*CLASSES, "BertForMultipleChoice", "BertLMHeadModel"])
def test_accelerate_is_in_place_idempotent_and_undone(cases, name):
    torch.manual_seed(0)
    model = getattr(transformers, name)(cases.config())
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    assert not tbf.is_accelerated(model)
    assert tbf.accelerate(model) is model
    assert tbf.accelerate(model, impl="reference") is model
    assert tbf.is_accelerated(model)
    assert {m.fast_impl for m in model.modules() if isinstance(m, integration.Accelerated)} == {
        "reference"
    }
    assert list(model.state_dict()) == keys
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert type(model).__name__ == name
    assert tbf.restore(model) is model
    assert [type(m) for m in model.modules()] == classes
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert not tbf.is_accelerated(model)
    assert tbf.restore(model) is model


def test_restored_model_runs_transformers_code(cases):
    plain, fast = cases.pair("BertForPreTraining")
    batch = cases.batch("left")
    theirs, ours = (m(**batch, output_hidden_states=True) for m in (plain, tbf.restore(fast)))
    assert torch.equal(ours.prediction_logits, theirs.prediction_logits)
    assert all(
        torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True)
    )


@pytest.fixture
def own_accelerate():
    """Accelerate keeps the precision of the process's first accelerator, a Trainer's among them."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("own_accelerate")
@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForSequenceClassification"])
def test_restored_after_a_trainer_prepared_it(cases, name):
    """Accelerate leaves a forward on the instance, which would go on to call ours."""
    plain, fast = cases.pair(name)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    accelerator.prepare(fast)
    tbf.restore(fast)
    batch = cases.batch("left")
    assert torch.equal(fast(**batch).logits, plain(**batch).logits)
    accelerator.prepare(fast)
    assert fast(**batch).logits.isfinite().all()


@pytest.mark.usefixtures("own_accelerate")
def test_a_forward_on_the_instance_is_not_passed_over(cases):
    """accelerate() could not be heard behind it, and restore() would leave it on our class."""
    plain, fast = cases.pair("BertModel")
    Accelerator(mixed_precision="bf16", cpu=True).prepare(plain)
    with pytest.raises(ValueError, match=r"call accelerate\(\) before them"):
        tbf.accelerate(plain)
    assert not tbf.is_accelerated(plain)
    fast.forward = functools.partial(type(fast).forward, fast)
    with pytest.raises(ValueError, match=r"undo that before restore\(\)"):
        tbf.restore(fast)
    assert tbf.is_accelerated(fast)


@pytest.mark.parametrize("name", CLASSES)
def test_signatures_that_the_trainer_reads(name):
    """Trainer drops the columns that forward does not name, and finds labels by name."""
    from transformers.utils.generic import find_labels

    plain = getattr(transformers, name)
    fast = integration.FAST_CLASSES.get(plain, plain)
    theirs, ours = (inspect.signature(c.forward).parameters for c in (plain, fast))
    assert set(theirs) - set(ours) <= {"cache", "past_key_values", "use_cache"}
    assert list(ours)[:6] == list(theirs)[:6]
    assert find_labels(fast) == find_labels(plain)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_accelerated(cases, clone):
    _, fast = cases.pair(
        "BertForPreTraining", accelerate={"impl": "reference", "training_logits": True}
    )
    twin = clone(fast)
    assert tbf.is_accelerated(twin)
    assert twin.bert.fast_impl == "reference"
    assert twin.fast_training_logits
    batch = cases.batch("right")
    assert torch.equal(twin(**batch).prediction_logits, fast(**batch).prediction_logits)
    assert twin.cls.predictions.decoder.weight is twin.bert.embeddings.word_embeddings.weight


def spied(monkeypatch, *names):
    """Let ``names`` of tinybert_fast.ops note each call: a list of (name, keywords)."""
    calls = []

    def spy(name, op):
        def noted(*args, **kwargs):
            calls.append((name, kwargs))
            return op(*args, **kwargs)

        monkeypatch.setattr(ops, name, noted)

    for name in names:
        spy(name, getattr(ops, name))
    return calls


def test_impl_is_handed_down_to_every_op(cases, monkeypatch):
    names = {"attention", "dropout_add_layer_norm", "embedding_layer_norm", "bias_gelu"}
    names |= {"layer_norm", "linear_cross_entropy"}
    calls = spied(monkeypatch, *names)
    _, fast = cases.pair("BertForMaskedLM", accelerate={"impl": "reference"})
    batch = cases.batch("right")
    fast.train()(**batch, **labels_of("BertForMaskedLM", batch["attention_mask"]))
    assert {name for name, _ in calls} == names
    assert {keywords["impl"] for _, keywords in calls} == {"reference"}


def test_dropout_places_have_one_seed_and_their_own_site(cases, monkeypatch):
    calls = spied(monkeypatch, "embedding_layer_norm", "attention", "dropout_add_layer_norm")
    _, fast = cases.pair("BertModel", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2)
    fast.train()(**cases.batch("right"))
    assert [keywords["site"] for _, keywords in calls] == [0, 4, 5, 6, 8, 9, 10]
    assert len({tuple(keywords["seed"].tolist()) for _, keywords in calls}) == 1
    for name, keywords in calls:
        assert keywords["dropout_p"] == (0.2 if name == "attention" else 0.1)


def test_inside_other_models(cases):
    """A BertModel of any owner is found: here the encoder of an encoder-decoder and a user's own
    subclass.
    """

    class Mine(BertForSequenceClassification):
        pass

    model = tbf.accelerate(Mine(cases.config()))
    assert type(model) is Mine
    assert tbf.is_accelerated(model)
    pair = EncoderDecoderModel(
        encoder=BertModel(cases.config()),
        decoder=transformers.BertLMHeadModel(
            cases.config(is_decoder=True, add_cross_attention=True)
        ),
    ).eval()
    batch = cases.batch("right")
    want = pair(**batch, decoder_input_ids=batch["input_ids"]).logits
    got = tbf.accelerate(pair)(**batch, decoder_input_ids=batch["input_ids"]).logits
    torch.testing.assert_close(got, want, **FP32)


def test_resized_embeddings_and_frozen_layers(cases):
    plain, fast = cases.pair("BertForMaskedLM")
    batch = cases.batch("right")
    batch |= labels_of("BertForMaskedLM", batch["attention_mask"])
    for model in (plain, fast):
        torch.manual_seed(0)
        model.resize_token_embeddings(cases.vocabulary + 3)
        model.bert.embeddings.requires_grad_(False)
        model.bert.encoder.layer[0].requires_grad_(False)
        model.train()(**batch).loss.backward()
    cases.same_gradients(fast, plain)
    assert fast.bert.encoder.layer[0].output.dense.weight.grad is None


def test_padding_token_gets_no_word_gradient(cases):
    plain, fast = cases.pair("BertModel")
    batch = cases.batch("full")
    batch["input_ids"][:, 3] = plain.config.pad_token_id
    for model in (plain, fast):
        model(**batch).last_hidden_state.square().sum().backward()
    cases.same_gradients(fast, plain)
    assert not fast.embeddings.word_embeddings.weight.grad[0].any()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes(cases, kind):
    plain, fast = cases.pair("BertForMaskedLM")
    plain, fast = plain.to(kind), fast.to(kind)
    batch = cases.batch("right")
    batch |= labels_of("BertForMaskedLM", batch["attention_mask"])
    close = {"atol": 1e-9, "rtol": 1e-9} if kind == torch.float64 else {"atol": 0.02, "rtol": 0.02}
    theirs, ours = plain.train()(**batch), fast.train()(**batch)
    torch.testing.assert_close(ours.loss, theirs.loss, check_dtype=False, **close)
    ours.loss.backward()
    assert all(p.grad.dtype == kind for p in fast.parameters())


def test_autocast(cases):
    """bf16 compute over fp32 weights: as near to fp32 as Transformers' own autocast is."""
    plain, fast = cases.pair("BertForPreTraining", hidden_dropout_prob=0.1)
    batch = cases.batch("right")
    batch |= labels_of("BertForPreTraining", batch["attention_mask"])
    exact = plain(**batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = plain(**batch).loss, fast(**batch).loss
        fast.train()
        loss = fast(**batch).loss
        states = [m(**batch, output_hidden_states=True).hidden_states for m in (plain, fast.eval())]
    assert abs(ours - exact) <= 2 * abs(theirs - exact) + 0.01
    assert [x.dtype for x in states[1]] == [x.dtype for x in states[0]]
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in fast.parameters())


def test_compile(cases):
    """torch.compile(model): the host's reading of the mask is its one break, and once T has varied
    no batch compiles anything again."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    plain, fast = cases.pair("BertForPreTraining", width=48)
    whole = torch.compile(fast, backend=counter)
    graphs = []
    for padding in ("right", "one_token", "empty_row", "holes", "right"):
        batch = cases.batch(padding)
        theirs, ours = plain(**batch), whole(**batch)
        assert_same_on_real_tokens(ours, theirs, batch["attention_mask"])
        graphs.append(counter.frame_count)
    assert graphs[1:] == graphs[1:2] * 4
    scalar_of(theirs, batch["attention_mask"]).backward()
    scalar_of(ours, batch["attention_mask"]).backward()
    cases.same_gradients(fast, plain)


def test_config_class_is_untouched(cases):
    _, fast = cases.pair("BertForMaskedLM")
    assert type(fast.config) is BertConfig
    assert "fast" not in fast.config.to_json_string()
