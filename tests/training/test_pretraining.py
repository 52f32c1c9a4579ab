"""The losses of pre-training against Transformers' own model, and what batches hold."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import BertForPreTraining

import tinybert_fast as tbf
from tinybert_fast.data import PreTrainingCollator
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.testing.tiny_models import tiny_config, tiny_tokenizer
from tinybert_fast.training.pretraining import Objectives, PreTraining, PreTrainingBatches

FP32 = {"atol": 2e-5, "rtol": 1e-5}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LOUD = 0.3  # standard deviation of weights: what attention sees must show in the losses


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def examples(tokenizer):
    """Pairs of 3 to 19 tokens, one with an empty-looking B of one token."""
    draw = torch.Generator().manual_seed(0)
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    rows = []
    for number, (a, b) in enumerate([(5, 4), (1, 1), (9, 7), (3, 8)]):
        words = torch.randint(5, len(tokenizer), (a + b,), generator=draw).tolist()
        rows.append(
            {
                "input_ids": [cls, *words[:a], sep, *words[a:], sep],
                "first_length": a + 2,
                "next_sentence_label": number % 2,
                "example_id": number,
            }
        )
    return rows


def batch_of(tokenizer, examples, objectives, **masking):
    masking = {"mlm_probability": 0.3, **masking} if objectives.masks else {"mlm": False}
    collator = PreTrainingCollator(tokenizer, seed=1, **masking)
    return PreTrainingBatches(collator, objectives)(examples, epoch=2)


def model_of(tokenizer, *, fast):
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer), initializer_range=LOUD, **NO_DROPOUT)
    model = BertForPreTraining(config)
    torch.nn.init.normal_(model.cls.predictions.bias)
    return tbf.accelerate(model) if fast else model


def with_layout(batch):
    lengths, ids = batch["lengths"], batch["input_ids"]
    return {**batch, "layout": SequenceLayout.from_lengths(lengths, ids.shape[1])}


@pytest.mark.parametrize("fast", [True, False], ids=["packed", "plain"])
def test_mlm_and_nsp_are_those_of_transformers(tokenizer, examples, fast):
    objectives = Objectives()
    batch = batch_of(tokenizer, examples, objectives)
    rows, labels = batch["targets"]["mlm"]
    dense = torch.full(batch["input_ids"].shape, -100)
    dense.view(-1)[rows] = labels
    theirs = model_of(tokenizer, fast=False)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    want = theirs(**inputs, labels=dense, next_sentence_label=batch["next_sentence_label"]).loss
    want.backward()
    ours = PreTraining(model_of(tokenizer, fast=fast), objectives)
    sums, each = ours(with_layout(batch) if fast else batch)
    assert each is None
    got = sums["mlm"] / len(labels) + sums["nsp"] / len(examples)
    got.backward()
    torch.testing.assert_close(got, want, **FP32)
    for (name, p), q in zip(theirs.named_parameters(), ours.model.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, **FP32, msg=lambda t, name=name: f"{name}: {t}")


@pytest.mark.parametrize(
    ("bidirectional", "fast"),
    [("off", True), ("off", False), ("reverse", True), ("reverse", False), ("causal", True)],
)
def test_single_losses_add_up_to_the_sums(tokenizer, examples, bidirectional, fast):
    objectives = Objectives(bidirectional=bidirectional)
    batch = batch_of(tokenizer, examples, objectives)
    ours = PreTraining(model_of(tokenizer, fast=fast), objectives)
    sums, _ = ours(batch)
    again, each = ours(batch, each=True)
    counts = [len(labels) for _, labels in batch["targets"].values()]
    for term, part in zip(objectives.token_terms, each.split(counts), strict=True):
        torch.testing.assert_close(sums[term], again[term], **FP32)
        torch.testing.assert_close(part.sum(), again[term].detach(), **FP32)
    scores = ours(batch, scores=True)
    for term, value in sums.items():
        torch.testing.assert_close(scores[term][0].float(), value.detach(), **FP32)
        answers = len(examples) if term == "nsp" else len(batch["targets"][term][1])
        assert scores[term][2] == answers
        assert 0 <= scores[term][1] <= answers


@pytest.mark.parametrize("unit", ["token", "word"])
def test_reversed_copies(tokenizer, examples, unit):
    """Segments keep their place, [CLS] and [SEP] too; words stay whole; masks are independent."""
    batch = batch_of(
        tokenizer, examples, Objectives(bidirectional="reverse"), whole_word_mask=unit == "word"
    )
    B, N = len(examples), batch["input_ids"].shape[1]
    assert batch["input_ids"].shape == (2 * B, N)
    flat = batch["input_ids"].flatten().clone()
    masked = torch.zeros(2 * B * N, dtype=torch.bool)
    for rows, labels in batch["targets"].values():
        flat[rows] = labels
        masked[rows] = True
    original, masked = flat.view(2 * B, N), masked.view(2 * B, N)
    (first, _), (second, _) = batch["targets"].values()
    assert len(first) == len(second)
    assert not torch.equal(first, second - B * N)
    for i, example in enumerate(examples):
        ids, a, n = example["input_ids"], example["first_length"], len(example["input_ids"])
        assert original[i, :n].tolist() == ids
        turned = [ids[0], *ids[1 : a - 1][::-1], ids[a - 1], *ids[a : n - 1][::-1], ids[-1]]
        assert original[B + i, :n].tolist() == turned
    for name in ("attention_mask", "token_type_ids"):
        assert torch.equal(batch[name][:B], batch[name][B:])
    if unit == "word":
        pieces = tokenizer.convert_tokens_to_ids("##s")
        for i in range(2 * B):
            for n in range(1, N - 1):
                # Of a piece and the word it ends, both or neither: the word stands before it, or
                # behind it where the order is turned.
                other = n - 1 if i < B else n + 1
                stem = original[i, other]
                if original[i, n] == pieces and stem > 4 and stem != pieces:
                    assert masked[i, n] == masked[i, other]


def test_causal_is_transformers_with_a_causal_mask(tokenizer, examples):
    objectives = Objectives(bidirectional="causal")
    batch = batch_of(tokenizer, examples, objectives)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    theirs = model_of(tokenizer, fast=False).eval()
    ours = PreTraining(model_of(tokenizer, fast=True), objectives)
    sums, _ = ours(with_layout(batch))
    N = ids.shape[1]
    below = torch.ones(N, N, dtype=torch.bool).tril()
    ordinary = mask & ~torch.isin(ids, torch.tensor(tokenizer.all_special_ids))
    for term, allowed, shift in (("lm_forward", below, -1), ("lm_backward", below.T, 1)):
        seen = mask[:, None, None] & allowed
        additive = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        hidden = theirs.bert(
            ids, attention_mask=additive, token_type_ids=batch["token_type_ids"]
        ).last_hidden_state
        b, n = ordinary.nonzero(as_tuple=True)
        logits = theirs.cls.predictions(hidden[b, n + shift])
        want = F.cross_entropy(logits, ids[b, n], reduction="sum")
        torch.testing.assert_close(sums[term], want, **FP32)
        pooled = theirs.bert.pooler(hidden)  # in the end of the right-to-left pass
    order = theirs.cls.seq_relationship(pooled)
    want = F.cross_entropy(order, batch["next_sentence_label"], reduction="sum")
    torch.testing.assert_close(sums["nsp"], want, **FP32)


@pytest.mark.parametrize(
    ("objectives", "idle"),
    [
        (Objectives(nsp=False), ("bert.pooler", "cls.seq_relationship")),
        (Objectives(mlm=False), ("cls.predictions.transform", "cls.predictions.bias")),
    ],
)
def test_what_is_not_learnt_is_left_alone(tokenizer, examples, objectives, idle):
    batch = batch_of(tokenizer, examples, objectives)
    ours = PreTraining(model_of(tokenizer, fast=True), objectives)
    sums, _ = ours(with_layout(batch))
    torch.stack(list(sums.values())).sum().backward()
    for name, p in ours.model.named_parameters():
        assert (p.grad is None) == name.startswith(idle), name


def test_masks_follow_example_and_epoch_alone(tokenizer, examples):
    objectives = Objectives()
    batches = PreTrainingBatches(PreTrainingCollator(tokenizer, seed=3), objectives)

    def masked(rows, epoch):
        batch = batches(rows, epoch)
        return [(i.tolist(), n) for i, n in zip(batch["input_ids"], batch["lengths"])]

    whole = masked(examples, 0)
    for i, (ids, n) in enumerate(whole):
        ((alone, _),) = masked([examples[i]], 0)
        assert alone == ids[:n]
    assert whole != masked(examples, 1)


def test_causal_needs_packed_rows(tokenizer):
    with pytest.raises(ValueError, match="needs packed rows"):
        PreTraining(model_of(tokenizer, fast=False), Objectives(bidirectional="causal"))


@pytest.mark.parametrize("bidirectional", ["off", "causal"])
def test_a_hook_on_a_head_changes_nothing(tokenizer, examples, bidirectional):
    """No head is called; the encoder stays packed, and with it the direction."""
    objectives = Objectives(bidirectional=bidirectional)
    batch = batch_of(tokenizer, examples, objectives)
    model = model_of(tokenizer, fast=True)
    want, _ = PreTraining(model, objectives)(batch)
    model.cls.predictions.transform.register_forward_hook(lambda *_: None)
    assert PreTraining(model, objectives)(batch)[0] == want


def test_a_restored_model_is_not_trained_on_what_it_sees(tokenizer, examples):
    objectives = Objectives(bidirectional="causal")
    step = PreTraining(model_of(tokenizer, fast=True), objectives)
    tbf.restore(step.model)
    with pytest.raises(ValueError, match="'causal' needs packed rows: accelerate the model"):
        step(batch_of(tokenizer, examples, objectives))


def test_only_rows_that_are_read_are_computed(tokenizer, examples):
    """The last layer's output behind its attention, values and gradients, with dropout's cells."""
    batch = with_layout(batch_of(tokenizer, examples, Objectives()))
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer), attention_probs_dropout_prob=0.25)
    model = tbf.accelerate(BertForPreTraining(config))
    inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "layout")}
    read = torch.tensor([7, 0, 3])
    answers = []
    for rows in (None, read):
        torch.manual_seed(1)
        model.zero_grad()
        states = model.encode_packed(**inputs, read=rows).rows
        states = states if rows is not None else states[read]
        states.square().sum().backward()
        answers.append((states, [p.grad for p in model.bert.encoder.parameters()]))
    (want, gradients), (got, ours) = answers
    torch.testing.assert_close(got, want, **FP32)
    for one, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(one, other, **FP32)
    with pytest.raises(ValueError, match="asks for packed"):
        model.bert(**inputs, read=read)


def test_direction_is_refused_where_it_would_be_lost(tokenizer):
    model = copy.deepcopy(model_of(tokenizer, fast=True))
    ids = torch.tensor([[2, 7, 3]])
    with pytest.raises(ValueError, match="direction='causal' needs packed rows"):
        model(ids, direction="causal", output_attentions=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bidirectional": "both"}, "expected one of off, reverse, causal"),
        ({"mlm": False, "nsp": False}, "nothing is left to learn"),
        ({"mlm": False, "bidirectional": "reverse"}, "needs mlm=True"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        Objectives(**options)
