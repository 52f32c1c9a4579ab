"""The losses against the formulas of the paper and of the released code, written out in fp64."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

import tinybert_fast as tbf
from tinybert_fast.modules.capture import Capture, record_padded
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.losses import intermediate_terms, prediction_loss
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.projection import HiddenProjection

BATCH, WIDTH = 4, 9
MATCHES = LayerMatches.parse("0:0,1:2,2:3")  # 2 student layers, 3 teacher layers
MASKS = {
    "full": [range(9)] * 4,
    "right": [range(9), range(6), range(1), range(7)],
    "holes": [range(9), (0, 2, 5), (0, 8), (0,)],
    "left": [range(9), range(3, 9), range(8, 9), range(5, 9)],
    "empty": [range(9), (), range(4), ()],
}
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def mask_of(name):
    mask = torch.zeros(BATCH, WIDTH, dtype=torch.int64)
    for row, columns in zip(mask, MASKS[name]):
        row[list(columns)] = 1
    return mask


@pytest.fixture
def pair():
    """Student 2 x 24 and teacher 3 x 32, 4 heads (6 and 8 wide), fp64, dropout off."""
    torch.manual_seed(0)
    common = {"vocab_size": 30, "num_attention_heads": 4, "max_position_embeddings": 12}
    common["initializer_range"] = 0.3  # scores far from zero
    sizes = (24, 2, 48), (32, 3, 64)
    return [
        BertModel(
            BertConfig(hidden_size=d, num_hidden_layers=m, intermediate_size=f, **common),
            add_pooling_layer=False,  # a pooler would refuse rows that start with padding
        )
        .double()
        .eval()
        for d, m, f in sizes
    ]


def batch_of(name):
    torch.manual_seed(1)
    ids = torch.randint(1, 30, (BATCH, WIDTH))
    return {"input_ids": ids, "attention_mask": mask_of(name)}


def states(model, batch):
    """Hidden states 0..M and, for layers 1..M, masked scores as the released code has them."""
    hidden = model(**batch, output_hidden_states=True).hidden_states
    added = (1.0 - batch["attention_mask"].double())[:, None, None, :] * -10000.0
    scores = [None]
    for layer, states in zip(model.encoder.layer, hidden):
        heads = layer.attention.self
        q, k = (
            f(states).view(BATCH, WIDTH, heads.num_attention_heads, -1).transpose(1, 2)
            for f in (heads.query, heads.key)
        )
        scores.append(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + added)
    return hidden, scores


def official_terms(student, teacher, projection, batch):
    """general_distill.py: MSE over every position; scores at or below -1e2 become 0."""
    (h_s, a_s), (h_t, a_t) = states(student, batch), states(teacher, batch)
    terms = {}
    for m, g in MATCHES.hidden:
        fitted = F.linear(h_s[m], *projection.for_state(m))
        terms[f"hidden_{m}" if m else "embedding"] = F.mse_loss(fitted, h_t[g])
    for m, g in MATCHES.attention:
        s, t = (torch.where(a <= -1e2, torch.zeros_like(a), a) for a in (a_s[m], a_t[g]))
        terms[f"attention_{m}"] = F.mse_loss(s, t)
    return terms


def paper_terms(student, teacher, projection, batch):
    """The same over real tokens, and real (query, key) pairs of each sequence, alone."""
    (h_s, a_s), (h_t, a_t) = states(student, batch), states(teacher, batch)
    real = batch["attention_mask"].bool()
    pairs = (real[:, :, None] & real[:, None, :])[:, None].expand(-1, 4, -1, -1)
    terms = {}
    for m, g in MATCHES.hidden:
        fitted = F.linear(h_s[m][real], *projection.for_state(m))
        terms[f"hidden_{m}" if m else "embedding"] = F.mse_loss(fitted, h_t[g][real])
    for m, g in MATCHES.attention:
        terms[f"attention_{m}"] = F.mse_loss(a_s[m][pairs], a_t[g][pairs])
    return terms


def recorded(model, batch, capture):
    with record_padded(model, capture):
        model(**batch)
    return capture


def packed(model, batch, capture):
    tbf.accelerate(model)
    model(**batch, capture=capture)
    tbf.restore(model)
    return capture


def captures(student, teacher, batch, read_student, read_teacher):
    ours = read_student(student, batch, MATCHES.student_capture())
    with torch.no_grad():
        theirs = read_teacher(teacher, batch, MATCHES.teacher_capture())
    return ours, theirs


def gradients(terms, *modules):
    sum(terms.values()).backward()
    found = {}
    for at, module in enumerate(modules):
        for name, p in module.named_parameters():
            if p.grad is not None:
                found[f"{at}.{name}"], p.grad = p.grad, None
    return found


def assert_agree(actual, expected, *modules):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    ours, theirs = gradients(actual, *modules), gradients(expected, *modules)
    assert ours.keys() >= theirs.keys()
    scale = max(g.abs().max() for g in theirs.values())
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-10, atol=1e-12 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_layer"])
@pytest.mark.parametrize("name", ["full", "right", "holes", "left"])
def test_official_parity(pair, name, shared):
    """Padding counts in hidden states and as queries; empty rows are undefined there."""
    student, teacher = pair
    projection = HiddenProjection(24, 32, MATCHES.student_states, shared=shared).double()
    batch = batch_of(name)
    layout = SequenceLayout.from_mask(batch["attention_mask"])
    ours, theirs = captures(student, teacher, batch, recorded, recorded)
    actual = intermediate_terms(ours, theirs, MATCHES, projection, layout=layout, parity="official")
    expected = official_terms(student, teacher, projection, batch)
    assert_agree(actual, expected, student, projection)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    ("read_student", "read_teacher"),
    [(packed, packed), (recorded, recorded), (packed, recorded), (recorded, packed)],
    ids=["packed", "padded", "padded_teacher", "padded_student"],
)
def test_real_tokens_alone_count(pair, name, read_student, read_teacher):
    student, teacher = pair
    projection = HiddenProjection(24, 32, MATCHES.student_states, std=0.3).double()
    batch = batch_of(name)
    layout = SequenceLayout.from_mask(batch["attention_mask"])
    ours, theirs = captures(student, teacher, batch, read_student, read_teacher)
    actual = intermediate_terms(ours, theirs, MATCHES, projection, layout=layout)
    expected = paper_terms(student, teacher, projection, batch)
    assert_agree(actual, expected, student, projection)


def test_padding_makes_the_difference(pair):
    """The two parities agree on full rows and differ on padded ones, in every term."""
    student, teacher = pair
    projection = HiddenProjection(24, 32).double()
    for name, same in (("full", True), ("right", False)):
        batch = batch_of(name)
        layout = SequenceLayout.from_mask(batch["attention_mask"])
        pair = captures(student, teacher, batch, recorded, recorded)
        paper, official = (
            intermediate_terms(*pair, MATCHES, projection, layout=layout, parity=parity)
            for parity in ("paper", "official")
        )
        for term, value in paper.items():
            assert torch.allclose(official[term], value, rtol=1e-9) is same, term


def test_no_gradient_reaches_the_teacher(pair):
    student, teacher = pair
    batch = batch_of("right")
    ours = packed(student, batch, MATCHES.student_capture())
    theirs = packed(teacher, batch, MATCHES.teacher_capture())  # with a graph, on purpose
    terms = intermediate_terms(ours, theirs, MATCHES, HiddenProjection(24, 32).double())
    sum(terms.values()).backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.embeddings.word_embeddings.weight.grad is not None


def test_gradient_checkpointing_changes_nothing(pair):
    student, teacher = pair
    projection = HiddenProjection(24, 32).double()
    batch = batch_of("holes")
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            name = "activation_checkpointing_enable"  # its older name: before Transformers 5.24
            enable = getattr(student, name, student.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        tbf.accelerate(student.train())
        for module in student.modules():  # train mode checkpoints, and dropout stays off
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        capture = MATCHES.student_capture()
        student(**batch, capture=capture)
        with torch.no_grad():
            theirs = packed(teacher, batch, MATCHES.teacher_capture())
        terms = intermediate_terms(capture, theirs, MATCHES, projection)
        found.append((terms, gradients(terms, student, projection)))
    (plain, plain_grads), (again, again_grads) = found
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], **CLOSE)
    for name in plain_grads:
        torch.testing.assert_close(again_grads[name], plain_grads[name], rtol=1e-10, atol=1e-12)


def test_refusals(pair):
    student, teacher = pair
    batch, projection = batch_of("right"), HiddenProjection(24, 32).double()
    ours, theirs = captures(student, teacher, batch, packed, packed)
    with pytest.raises(ValueError, match="recorded packed"):
        intermediate_terms(ours, theirs, MATCHES, projection, parity="official")
    ours, theirs = captures(student, teacher, batch, recorded, recorded)
    for parity in ("paper", "official"):
        with pytest.raises(ValueError, match="pass layout="):
            intermediate_terms(ours, theirs, MATCHES, projection, parity=parity)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("classes", [2, 5])
def test_prediction_loss(classes, temperature):
    torch.manual_seed(0)
    student = torch.randn(6, classes, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, classes, dtype=torch.float64) * 3
    soft = -F.softmax(teacher / temperature, -1) * F.log_softmax(student / temperature, -1)
    for parity, expected in (("paper", soft.sum(-1).mean()), ("official", soft.mean())):
        actual = prediction_loss(student, teacher, temperature=temperature, parity=parity)
        torch.testing.assert_close(actual, expected, **CLOSE)
        (ours,) = torch.autograd.grad(actual, student)
        (theirs,) = torch.autograd.grad(expected, student, retain_graph=True)
        torch.testing.assert_close(ours, theirs, **CLOSE)


def test_one_output_learns_the_teachers_score():
    student, teacher = torch.randn(6, 1, requires_grad=True), torch.randn(6, 1)
    for parity in ("paper", "official"):
        loss = prediction_loss(student, teacher, temperature=3.0, parity=parity)
        torch.testing.assert_close(loss, F.mse_loss(student, teacher))


def test_other_labels_are_refused():
    with pytest.raises(ValueError, match=r"student logits \(4, 2\) and teacher logits \(4, 3\)"):
        prediction_loss(torch.zeros(4, 2), torch.zeros(4, 3))


def test_capture_of_another_forward_is_replaced(pair):
    """One Capture may serve a whole run: each forward leaves its own states."""
    student, _ = pair
    capture = Capture(hidden_states=(0,), attention=(1,))
    first = packed(student, batch_of("full"), capture).hidden[0]
    second = packed(student, batch_of("right"), capture).hidden[0]
    assert first.shape != second.shape
