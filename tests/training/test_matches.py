"""Layer matches: uniform, explicit, and every refusal with its remedy."""

from types import SimpleNamespace

import pytest

from tinybert_fast.training.matches import LayerMatches


def config(layers, heads=12):
    return SimpleNamespace(num_hidden_layers=layers, num_attention_heads=heads)


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        (4, 12, ((0, 0), (1, 3), (2, 6), (3, 9), (4, 12))),  # TinyBERT-4
        (6, 12, ((0, 0), (1, 2), (2, 4), (3, 6), (4, 8), (5, 10), (6, 12))),  # TinyBERT-6
        (3, 3, ((0, 0), (1, 1), (2, 2), (3, 3))),
    ],
)
def test_uniform_is_the_papers_mapping(student, teacher, pairs):
    matches = LayerMatches.uniform(student, teacher)
    assert matches.hidden == pairs
    assert matches.attention == pairs[1:]
    matches.validate(config(student), config(teacher))


@pytest.mark.parametrize(
    ("student", "teacher", "remedy"),
    [(4, 6, "0:0,1:2,2:3,3:5,4:6"), (5, 12, "0:0,1:2,2:5,3:7,4:10,5:12"), (6, 4, "6:4")],
)
def test_uneven_layers_name_an_explicit_list_that_works(student, teacher, remedy):
    with pytest.raises(ValueError, match=remedy) as error:
        LayerMatches.uniform(student, teacher)
    named = LayerMatches.parse(str(error.value).rsplit(" ", 1)[1])
    named.validate(config(student), config(teacher))


@pytest.mark.parametrize(
    "text",
    [
        "0:0,1:2,2:3,3:5,4:6",
        "hidden=0:0,4:6 attention=2:3,4:6",
        "hidden= attention=2:3,4:6",
        "hidden=1:2 attention=",
    ],
)
def test_text_round_trip(text):
    assert str(LayerMatches.parse(text)) == text
    assert LayerMatches.parse(text.replace(",", " , ").replace(" a", " ; a")) == LayerMatches.parse(
        text
    )


def test_kinds_apart():
    matches = LayerMatches.parse("hidden=0:0,2:6 attention=1:3")
    assert (matches.hidden, matches.attention) == (((0, 0), (2, 6)), ((1, 3),))
    assert LayerMatches.parse("hidden=0:0").attention == ()
    assert matches.student_states == (0, 2)


def test_captures_ask_for_what_the_losses_read_and_no_more():
    matches = LayerMatches.parse("hidden=0:0,1:3,2:3 attention=2:6")
    student, teacher = matches.student_capture(), matches.teacher_capture()
    assert set(student.hidden_states) == {0, 1, 2}
    assert set(student.attention) == {2}
    assert set(teacher.hidden_states) == {0, 3}
    assert set(teacher.attention) == {6}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("1-3", "student:teacher pairs such as .*'1-3'"),
        ("0:0,1", "got '1'"),
        ("0:0,,1:3", "got ''"),
        ("", "no layer is matched"),
        ("1:2,1:3", "name one twice"),
        ("hidden=0:0 attention=0:0", "attention matches count from 1.*embedding output"),
        ("hidden=0:0 pooler=1:1", "student:teacher pairs"),
    ],
)
def test_bad_text(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        LayerMatches.parse(text)


def test_layers_that_do_not_exist():
    with pytest.raises(ValueError, match="student layer 5, but the student has 4 layers"):
        LayerMatches.parse("5:6").validate(config(4), config(12))
    with pytest.raises(ValueError, match="teacher layer 9, but the teacher has 6 layers"):
        LayerMatches.uniform(4, 12).validate(config(4), config(6))


def test_head_counts_must_agree_where_attention_is_compared():
    with pytest.raises(ValueError, match=r"12 heads and the teacher 16.*num_attention_heads=16"):
        LayerMatches.uniform(4, 12).validate(config(4), config(12, heads=16))
    LayerMatches.parse("hidden=0:0,4:12").validate(config(4), config(12, heads=16))
