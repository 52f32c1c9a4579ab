"""What the runner stands on: batches, baselines, peak memory, hardware facts."""

import copy
import subprocess

import pytest
import torch
from torch import nn

from tinybert_fast.benchmarks import hardware
from tinybert_fast.benchmarks.baselines import attention_scores, plain_bert
from tinybert_fast.benchmarks.baselines.distillation import OfficialStep
from tinybert_fast.benchmarks.batches import IGNORED, bucket_counts, draw_batch, draw_lengths
from tinybert_fast.benchmarks.case import Setup
from tinybert_fast.benchmarks.cases import distill_step
from tinybert_fast.benchmarks.memory import peak_bytes
from tinybert_fast.benchmarks.training_step import Teacher, set_dropout
from tinybert_fast.modules.capture import record_padded
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.losses import intermediate_terms
from tinybert_fast.training.matches import LayerMatches

CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("batch", "width"), [(32, 128), (16, 128), (4, 512), (5, 100), (1, 20)])
def test_lengths_leave_sixty_percent_real(batch, width):
    lengths = draw_lengths(batch, width, seeded())
    assert lengths == draw_lengths(batch, width, seeded())
    assert all(3 <= n <= width for n in lengths)
    assert sum(lengths) / (batch * width) == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize("fill", [1.0, 0.6, 0.3])
@pytest.mark.parametrize(("batch", "width"), [(64, 128), (8, 128)])
def test_lengths_of_another_fill(batch, width, fill):
    lengths = draw_lengths(batch, width, seeded(), fill)
    assert sum(lengths) / (batch * width) == pytest.approx(fill, abs=0.03)
    assert max(lengths) > 0.75 * width  # no more is cut off by trimming than from any other batch
    if fill == 1.0:
        assert set(lengths) == {width}


def test_batch_is_padded_right_and_labels_fifteen_percent_of_words():
    lengths = [128, 30, 3]
    batch = draw_batch(lengths, 128, 30522, seeded(), CPU)
    assert batch.attention_mask.sum(1).tolist() == lengths
    assert not batch.input_ids[batch.attention_mask == 0].any()
    labelled = batch.labels != IGNORED
    assert labelled.sum(1).tolist() == [19, 4, 1]  # round(0.15 * (n - 2)), one at least
    assert not labelled[:, 0].any()
    assert not labelled[range(3), [n - 1 for n in lengths]].any()


def test_buckets_hold_every_sequence_once_and_are_trimmed():
    batch = draw_batch([5, 16, 9, 7, 12], 16, 500, seeded(), CPU)
    buckets = batch.buckets(2)
    assert [part.lengths for part in buckets] == [(16, 12, 9), (7, 5)]
    assert [part.input_ids.shape[1] for part in buckets] == [16, 7]
    assert sum(int((part.labels != IGNORED).sum()) for part in buckets) == int(
        (batch.labels != IGNORED).sum()
    )
    assert bucket_counts(batch) == (1, 2, 4)


def test_direct_and_gram_sums_are_the_official_mean_without_padding():
    q, k = (torch.randn(2, 3, 7, 5, dtype=torch.float64) for _ in "qk")
    p, r = (torch.randn(2, 3, 7, 11, dtype=torch.float64) for _ in "pr")
    mean = attention_scores.official(attention_scores.scores(q, k), attention_scores.scores(p, r))
    for total in attention_scores.SUMS.values():
        torch.testing.assert_close(total(q, k, p, r) / (2 * 3 * 7 * 7), mean)


def test_the_direct_sum_of_bf16_numbers_loses_little():
    torch.manual_seed(0)
    operands = [
        torch.randn(2, 17, 3, width).bfloat16().transpose(1, 2).requires_grad_()
        for width in (26, 26, 64, 64)
    ]
    wide = [x.detach().double().requires_grad_() for x in operands]
    found = attention_scores.score_sum("direct", *operands)
    exact = attention_scores.direct_sum(*wide)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-3)
    for mine, right in zip(*(torch.autograd.grad(*x) for x in ((found, operands), (exact, wide)))):
        assert (mine - right).norm() < 2**-7 * right.norm()


def test_packed_tokens_are_those_of_the_padded_batch():
    batch = draw_batch([5, 16, 3], 16, 500, seeded(), CPU)
    real = batch.attention_mask.bool()
    inputs = batch.packed_inputs
    assert torch.equal(inputs["input_ids"][0], batch.input_ids[real])
    assert inputs["position_ids"][0].tolist() == [*range(5), *range(16), *range(3)]
    assert batch.cu_seqlens.tolist() == [0, 5, 21, 24]
    rows = batch.packed_rows.index_select(0, batch.labelled)
    assert torch.equal(inputs["input_ids"][0][rows], batch.input_ids.flatten()[batch.labelled])
    words = inputs["input_ids"][0].unsqueeze(1)
    assert torch.equal(plain_bert.spread(words, batch.places, batch.shape)[..., 0], batch.input_ids)


def test_official_baseline_is_the_official_loss_on_padded_batches():
    """(a) against training/losses.py in its parity mode, padding and its queries included."""
    (case,) = distill_step.CASES["distill_step_b16_n128"](Setup(CPU, smoke=True))
    official: OfficialStep = case.providers[0]
    student, teacher = (copy.deepcopy(m) for m in (official.student, official.teacher))
    for model in (student, teacher):
        model.set_attn_implementation("sdpa")
    set_dropout(student, 0.0)
    batch = official.batches["timed"]
    assert batch.tokens < batch.input_ids.numel()
    matches = LayerMatches.uniform(
        student.config.num_hidden_layers, official.teacher.config.num_hidden_layers
    )
    ours, theirs = matches.student_capture(), matches.teacher_capture()
    for model, capture in ((student, ours), (teacher, theirs)):
        with record_padded(model, capture):
            model(**batch.inputs)
    layout = SequenceLayout.from_mask(batch.attention_mask)
    projection = official.trained["projection"]
    terms = intermediate_terms(ours, theirs, matches, projection, layout=layout, parity="official")
    outcome = official.outcome("timed", "fp32")
    assert outcome.loss == pytest.approx(sum(t.item() for t in terms.values()), rel=1e-5)


def test_peak_counts_what_lives_at_once():
    kept = []

    def call():
        first = torch.empty(1000, dtype=torch.float32)
        del first
        second, third = torch.empty(500), torch.empty(700)
        kept.append(third)
        del second

    assert peak_bytes(call, CPU) == 4 * 1200


def test_peak_sees_inside_operators():
    x = torch.empty(1 << 20)

    def call():
        return torch.nn.functional.mse_loss(x.view(1024, 1024), x.view(1024, 1024).mT)

    assert peak_bytes(call, CPU) >= 4 << 20  # the squared differences, inside one operator


def test_facts_name_the_machine():
    facts = hardware.facts(CPU)
    assert facts["cpu"]
    assert facts["cores"] >= 1
    assert facts["threads"] == torch.get_num_threads()
    assert facts["gpu"] == "none"
    assert facts["torch"] == torch.__version__
    assert facts["bf16_hardware"] in ("yes", "no")


@pytest.fixture
def checkout(monkeypatch, tmp_path):
    """A folder that this code seems to run from."""
    here = tmp_path / "benchmarks" / "hardware.py"
    here.parent.mkdir()
    here.write_text("")
    monkeypatch.setattr(hardware, "__file__", str(here))
    hardware.commit.cache_clear()
    yield tmp_path
    hardware.commit.cache_clear()


def test_commit_of_an_untracked_copy_is_none(checkout):
    assert hardware.commit() == "none"


@pytest.mark.parametrize(
    ("changed", "mark"),
    [("benchmarks/results/rows.csv", ""), ("README.md", ""), ("benchmarks/RESULTS.md", ""),
     ("benchmarks/hardware.py", "+"), ("csrc/philox.h", "+")],
)  # fmt: skip
def test_only_changed_code_marks_a_commit(checkout, changed, mark):
    def git(*words):
        who = ("-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", checkout, *who, *words], check=True, capture_output=True)

    file = checkout / changed
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("before")
    git("init")
    git("add", ".")
    git("commit", "-m", "x")
    file.write_text("after")
    found = hardware.commit()
    assert len(found) == 12 + len(mark)
    assert found.endswith("+") == bool(mark)


def test_a_rounded_teacher_leaves_the_exact_one_as_it_is():
    """Both share their frozen weights, which may not be rounded in place."""
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    before = model[0].weight.clone()
    teacher = Teacher(model)
    rounded = teacher("bf16")
    assert (rounded[0].weight.dtype, rounded[1].weight.dtype) == (torch.bfloat16, torch.float32)
    assert rounded[1].weight is model[1].weight
    assert not rounded[0].weight.requires_grad
    assert torch.equal(teacher("fp32")[0].weight, before)


def test_set_dropout_reaches_every_place():
    model = nn.Sequential(nn.Dropout(0.1), nn.Sequential(nn.Dropout(0.3)))
    set_dropout(model, 0.0)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.0, 0.0]
