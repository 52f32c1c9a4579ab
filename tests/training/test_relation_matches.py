"""MiniLM's loss: which relations are compared, the formulas written out in fp64, and training by it
under a teacher with another number of heads.
"""

import copy

import pytest
import torch
from transformers import BertConfig, BertModel

import tinybert_fast as tbf
from tinybert_fast.modules.capture import record_padded
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.testing.tiny_models import tiny_config
from tinybert_fast.training.initialise import initialise_student
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.objectives import matches_for
from tinybert_fast.training.relation_matches import RelationMatches

STUDENT = tiny_config(hidden_size=24, num_attention_heads=12)
TEACHER = tiny_config(hidden_size=48, num_attention_heads=4, num_hidden_layers=5)
BASE = BertConfig()  # 12 layers, 12 heads, 768
TINY = BertConfig(hidden_size=312, num_hidden_layers=4, num_attention_heads=12)
ROWS = ("111111", "111100", "000111", "101001", "000000")


def test_defaults_are_minilm_v2_s():
    found = RelationMatches.of(TINY, BASE)
    assert found == RelationMatches(("qq", "kk", "vv"), 12, student_layer=4, teacher_layer=12)
    assert str(found) == "qq,kk,vv of 12 heads, 4:12"
    assert found.settings(shared_projection=True) == {
        "loss": "minilm", "relations": "qq,kk,vv", "relation_heads": 12, "teacher_layer": 12,
    }  # fmt: skip
    own = RelationMatches.of(BASE, BertConfig(num_hidden_layers=24), "qk, vv", 48, 21)
    assert own == RelationMatches(("qk", "vv"), 48, student_layer=12, teacher_layer=21)


@pytest.mark.parametrize(
    ("student", "teacher", "heads"),
    [
        ((24, 12), (48, 4), 12),
        ((312, 12), (256, 4), 4),  # 12 does not divide 256
        ((768, 12), (1024, 16), 16),
        ((24, 12), (32, 8), 8),
    ],
)
def test_default_heads_are_the_most_that_divide_both_widths(student, teacher, heads):
    configs = (BertConfig(hidden_size=w, num_attention_heads=h) for w, h in (student, teacher))
    assert RelationMatches.of(*configs).heads == heads


def test_only_what_is_compared_is_recorded():
    both = RelationMatches.of(STUDENT, TEACHER)
    for capture, layer in ((both.student_capture(), 2), (both.teacher_capture(), 5)):
        assert (capture.hidden_states, capture.attention) == (set(), {layer})
        assert capture.attention_values == {layer}
    values = RelationMatches.of(STUDENT, TEACHER, "vv").student_capture()
    assert (values.attention, values.attention_values) == (set(), {2})
    scores = RelationMatches.of(STUDENT, TEACHER, "qk").student_capture()
    assert (scores.attention, scores.attention_values) == ({2}, set())


def models(dtype=torch.float64):
    torch.manual_seed(0)
    made = []
    for config in (STUDENT, TEACHER):
        config = copy.deepcopy(config)
        config.initializer_range = 0.3  # relations far from uniform
        made.append(BertModel(config, add_pooling_layer=False).to(dtype).eval())
    return made


def batch():
    torch.manual_seed(1)
    mask = torch.tensor([[int(c) for c in row] for row in ROWS])
    return {"input_ids": torch.randint(1, 25, mask.shape), "attention_mask": mask}


def heads_of_last_layer(model, inputs):
    """Transformers' own queries, keys and values (B, N, C) of the last layer."""
    states = model(**inputs, output_hidden_states=True).hidden_states[-2]
    heads = model.encoder.layer[-1].attention.self
    return {"q": heads.query(states), "k": heads.key(states), "v": heads.value(states)}


def written_out(ours, theirs, kind, heads, mask):
    total, rows = 0.0, 0
    for b, row in enumerate(mask.bool()):
        relations = []
        for side in (ours, theirs):
            a, b_ = (
                side[letter][b, row].unflatten(1, (heads, -1)).transpose(0, 1) for letter in kind
            )
            relations.append(torch.softmax(a @ b_.mT / a.shape[-1] ** 0.5, -1))
        student, teacher = relations
        total = total + (teacher * (teacher.log() - student.log())).sum()
        rows += heads * int(row.sum())
    return total / rows


@pytest.mark.parametrize("accelerate", ["both", "student", "neither"])
@pytest.mark.parametrize("heads", [12, 3])
def test_terms_are_the_papers(accelerate, heads):
    """All four relations of 12 and of 4 heads, values and gradients, packed and padded."""
    student, teacher = models()
    inputs = batch()
    mask = inputs["attention_mask"]
    matches = RelationMatches.of(STUDENT, TEACHER, "qk,qq,kk,vv", heads)
    plain = [heads_of_last_layer(model, inputs) for model in (student, teacher)]
    theirs = {name: x.detach() for name, x in plain[1].items()}
    parameters = [
        p for n, p in student.named_parameters() if "layer.0" in n or "layer.1.attention.self" in n
    ]
    want = {k: written_out(plain[0], theirs, k, heads, mask) for k in matches.kinds}
    gradients = torch.autograd.grad(sum(want.values()), parameters)
    captures = matches.student_capture(), matches.teacher_capture()
    for model, capture, fast in zip(
        (student, teacher), captures, (accelerate != "neither", accelerate == "both")
    ):
        if fast:
            tbf.accelerate(model)(**inputs, capture=capture)
        else:
            with record_padded(model, capture):
                model(**inputs)
    layout = SequenceLayout.from_mask(mask)
    got = matches.terms(*captures, None, layout=layout)
    assert got.keys() == {"relation_qk", "relation_qq", "relation_kk", "relation_vv"}
    for kind, loss in want.items():
        torch.testing.assert_close(got[f"relation_{kind}"], loss, rtol=1e-10, atol=0.0)
    found = torch.autograd.grad(sum(got.values()), parameters)
    torch.testing.assert_close(found, gradients, rtol=1e-8, atol=1e-12)
    assert all(p.grad is None for p in teacher.parameters())
    if accelerate == "neither":
        with pytest.raises(ValueError, match="pass layout="):
            matches.terms(*captures, None)


def test_layers_to_start_from_are_evenly_spread():
    assert RelationMatches.of(TINY, BASE).copied_layers == {1: 3, 2: 6, 3: 9, 4: 12}
    assert RelationMatches.of(TINY, BASE, teacher_layer=10).copied_layers[4] == 10
    assert RelationMatches.of(TINY, TEACHER, heads=24).copied_layers == {1: 1, 2: 3, 3: 4, 4: 5}
    student = BertModel(tiny_config(num_hidden_layers=2))
    teacher = BertModel(tiny_config(num_hidden_layers=5))
    matches = RelationMatches.of(student.config, teacher.config)
    assert initialise_student(student, teacher, "layers", matches=matches) is None
    for ours, theirs in ((0, 2), (1, 4)):
        copied, source = (m.encoder.layer[at] for m, at in ((student, ours), (teacher, theirs)))
        for name, value in copied.state_dict().items():
            assert torch.equal(value, source.state_dict()[name])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"loss": "distilbert"}, "loss is 'distilbert'; expected one of tinybert, minilm"),
        ({"relations": "qv"}, "relation 'qv' is not one of qk, qq, kk, vv"),
        ({"relations": "qq,qq"}, "named once each; got 'qq,qq'"),
        ({"relations": ""}, "relation '' is not one of"),
        (
            {"relation_heads": 5},
            "5 relation heads must divide .* width 24 and the teacher's 48; .* 1, 2, 3, 4, 6, 8,",
        ),
        ({"relation_heads": 0}, "0 relation heads must divide"),
        ({"teacher_layer": 6}, "teacher layer 6 are asked for, and the teacher has layers 1..5"),
        ({"teacher_layer": 0}, "teacher layer 0 are asked for"),
        ({"parity": "official"}, "parity='official' is the code that TinyBERT's authors released"),
        ({"matches": "0:0,1:2"}, "matches belongs to loss='tinybert' and means nothing to"),
        ({"shared_projection": False}, "projection_per_layer belongs to loss='tinybert'"),
        ({"loss": "tinybert", "relations": "qq"}, "relations belongs to loss='minilm'"),
        ({"loss": "tinybert", "relation_heads": 2}, "relation_heads belongs to loss='minilm'"),
        ({"loss": "tinybert", "teacher_layer": 2}, "teacher_layer belongs to loss='minilm'"),
        (
            {"loss": "tinybert", "matches": "0:0,1:2,2:5"},
            "12 heads and the teacher 4; .*, or --loss minilm",
        ),
    ],
)
def test_refusals(options, complaint):
    options = {"matches": None, "loss": "minilm", **options}
    with pytest.raises(ValueError, match=complaint):
        matches_for(student=STUDENT, teacher=TEACHER, **options)


def test_no_head_count_divides_both_widths():
    other = tiny_config(hidden_size=20, num_attention_heads=5)
    with pytest.raises(ValueError, match=r"12 heads nor the teacher's 5 divide both.* 1, 2, 4$"):
        RelationMatches.of(STUDENT, other)
    assert RelationMatches.of(STUDENT, other, heads=4).heads == 4


def test_of_options():
    found = matches_for(None, STUDENT, TEACHER, loss="minilm", relation_heads=6)
    assert found == RelationMatches.of(STUDENT, TEACHER, heads=6)
    same_heads = tiny_config(num_hidden_layers=4)
    assert matches_for(None, tiny_config(), same_heads) == LayerMatches.uniform(2, 4)
