"""Where a student starts: what PCA keeps, what layers copy, what is refused."""

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

from tinybert_fast.training.initialise import (
    _sampled_sums,
    initialise_student,
    mean_free_basis,
)
from tinybert_fast.training.matches import LayerMatches

VOCABULARY = 200


def config(width=24, layers=2, **changes):
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
    }
    return BertConfig(**{**sizes, **changes})


def teacher_of(width=32, layers=4, rank=None):
    """Embeddings with a common mean and, if asked, a low rank; a layer norm with its own scale."""
    torch.manual_seed(0)
    teacher = BertModel(config(width, layers)).eval()
    embeddings = teacher.embeddings
    with torch.no_grad():
        word = torch.randn(VOCABULARY, width)
        if rank is not None:
            word = torch.randn(VOCABULARY, rank) @ torch.randn(rank, width)
            embeddings.position_embeddings.weight.zero_()
            embeddings.token_type_embeddings.weight.zero_()
        embeddings.word_embeddings.weight.copy_(word + 0.5 * torch.randn(width))
        embeddings.LayerNorm.weight.copy_(torch.rand(width) + 0.5)
        embeddings.LayerNorm.bias.copy_(torch.randn(width) * 0.1)
    return teacher


def embedded(model):
    """Embedding output of every word piece at positions 0..9: (20, 10, C)."""
    model.eval()
    with torch.no_grad():
        return model.embeddings(torch.arange(VOCABULARY).view(20, 10))


def error(student, teacher, projection):
    """Share of the teacher's variance that the projected student misses."""
    weight, bias = projection.for_state(0)
    target = embedded(teacher)
    miss = embedded(student) @ weight.T + bias - target
    return (miss.square().mean() / (target - target.mean((0, 1))).square().mean()).item()


@pytest.mark.parametrize("width", [1, 2, 26, 312])
def test_mean_free_basis_is_orthonormal_and_blind_to_the_mean(width):
    basis = mean_free_basis(width)
    assert basis.shape == (width, width - 1)
    torch.testing.assert_close(basis.T @ basis, torch.eye(width - 1, dtype=torch.float64))
    torch.testing.assert_close(basis.sum(0), torch.zeros(width - 1, dtype=torch.float64))


def test_pca_is_exact_at_equal_width():
    teacher, student = teacher_of(32), BertModel(config(32))
    projection = initialise_student(student, teacher, "pca")
    weight, bias = projection.for_state(0)
    torch.testing.assert_close(
        embedded(student) @ weight.T + bias, embedded(teacher), rtol=1e-4, atol=1e-4
    )


def test_pca_is_exact_for_embeddings_of_low_rank():
    """Rank 20 and a common mean fit into 24 channels, one of which layer norm takes."""
    teacher, student = teacher_of(32, rank=20), BertModel(config(24))
    assert error(student, teacher, initialise_student(student, teacher, "pca")) < 1e-6


def test_pca_keeps_more_with_more_width_and_more_than_chance():
    teacher = teacher_of(32)
    missed = {}
    for width in (8, 16, 24):
        torch.manual_seed(1)
        student = BertModel(config(width))
        missed[width] = error(student, teacher, initialise_student(student, teacher, "pca"))
    assert missed[24] < missed[16] < missed[8] < 1.0
    torch.manual_seed(1)
    student = BertModel(config(24))
    assert missed[24] < 0.4 * error(student, teacher, initialise_student(student, teacher))


def test_pca_projection_is_the_best_linear_map():
    """Moving the projection any way loses: the start is a least-squares solution."""
    teacher, student = teacher_of(32), BertModel(config(24))
    projection = initialise_student(student, teacher, "pca").double()
    tables = [
        [
            getattr(model.embeddings, f"{name}_embeddings").weight.detach().double()
            for name in ("word", "position", "token_type")
        ]
        for model in (student, teacher)
    ]
    x, y = (
        torch.nn.functional.layer_norm(_sampled_sums(*three), three[0].shape[1:], eps=1e-12)
        for three in tables
    )
    norm = teacher.embeddings.LayerNorm
    y = y * norm.weight.double() + norm.bias.double()
    weight, bias = projection.for_state(0)
    residual = x @ weight.T + bias - y
    scale = (x.T @ y).abs().max()
    assert (residual.T @ x).abs().max() < 1e-5 * scale  # normal equations
    assert residual.mean(0).abs().max() < 1e-6


def test_pca_start_is_of_ordinary_size():
    """Unit layer norm, every channel heard, nothing in the encoder touched."""
    teacher, student = teacher_of(32), BertModel(config(24))
    before = {k: v.clone() for k, v in student.encoder.state_dict().items()}
    initialise_student(student, teacher, "pca")
    assert (student.embeddings.LayerNorm.weight == 1).all()
    assert (student.embeddings.LayerNorm.bias == 0).all()
    loudness = embedded(student).square().mean((0, 1)).sqrt()
    assert loudness.min() > 0.4
    assert loudness.max() < 2.5
    assert all(torch.equal(v, before[k]) for k, v in student.encoder.state_dict().items())


def test_pca_serves_short_students_and_any_class():
    teacher = teacher_of(32)
    student = BertForSequenceClassification(config(24, max_position_embeddings=16))
    projection = initialise_student(student, teacher, "pca", shared=False)
    assert set(projection.fit_denses) == {"0", "1", "2"}
    assert torch.equal(projection.for_state(0)[0], projection.for_state(2)[0])


def test_layers_copies_matched_layers():
    torch.manual_seed(0)
    teacher, student = BertModel(config(24, 3)).eval(), BertModel(config(24, 2))
    projection = initialise_student(
        student, teacher, "layers", matches=LayerMatches.parse("0:0,1:2,2:3")
    )
    for ours, theirs in zip(student.encoder.layer, teacher.encoder.layer[1:]):
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value)
    assert torch.equal(embedded(student), embedded(teacher))
    assert torch.equal(student.pooler.dense.weight, teacher.pooler.dense.weight)
    assert torch.equal(projection.for_state(0)[0], torch.eye(24))


def test_layers_of_a_student_as_deep_as_its_teacher_is_the_teacher():
    torch.manual_seed(0)
    teacher, student = BertModel(config(24, 2)).eval(), BertModel(config(24, 2)).eval()
    initialise_student(student, teacher, "layers")
    ids = torch.randint(VOCABULARY, (3, 7))
    with torch.no_grad():
        assert torch.equal(student(ids).last_hidden_state, teacher(ids).last_hidden_state)


def test_random_changes_nothing():
    student = BertModel(config(24))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    projection = initialise_student(student, teacher_of(32), "random")
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    weight, bias = projection.for_state(1)
    assert weight.shape == (32, 24)
    assert 0.01 < weight.std() < 0.03
    assert (bias == 0).all()


@pytest.mark.parametrize(
    ("how", "student", "complaint"),
    [
        ("svd", config(24), "random, layers, pca; got 'svd'"),
        ("layers", config(24), "hidden_size is 24 .* 32 in the teacher; start .* 'pca'"),
        ("pca", config(40), "at most the teacher's 32 channels, but the student has 40"),
        ("pca", config(24, vocab_size=150), r"word_embeddings have 150 rows.*vocab_size=200"),
        ("pca", config(24, max_position_embeddings=64), "max_position_embeddings=40"),
    ],
)
def test_refusals(how, student, complaint):
    with pytest.raises(ValueError, match=complaint):
        initialise_student(BertModel(student), teacher_of(32), how)


def test_layers_refuses_a_layer_without_a_match():
    teacher, student = BertModel(config(24, 4)), BertModel(config(24, 2))
    with pytest.raises(ValueError, match="student layer 1 is matched with no teacher layer"):
        initialise_student(student, teacher, "layers", matches=LayerMatches.parse("0:0,2:4"))
