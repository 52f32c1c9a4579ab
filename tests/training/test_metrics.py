"""Metrics against scikit-learn and SciPy, and the values they take where those have none."""

import numpy as np
import pytest
from transformers import EvalPrediction

from tinybert_fast.data import Task
from tinybert_fast.training import metrics as ours

theirs = pytest.importorskip("sklearn.metrics")
stats = pytest.importorskip("scipy.stats")

CASES = [(2, 1), (2, 50), (5, 50), (5, 3)]  # (classes, rows): some classes absent in the last


@pytest.mark.parametrize(("classes", "rows"), CASES)
def test_classes(classes, rows):
    draw = np.random.default_rng(rows)
    a, b = draw.integers(0, classes, (2, rows))
    assert ours.accuracy(a, b) == pytest.approx(theirs.accuracy_score(b, a))
    assert ours.macro_f1(a, b) == pytest.approx(
        theirs.f1_score(b, a, average="macro", zero_division=0)
    )
    assert ours.matthews(a, b) == pytest.approx(theirs.matthews_corrcoef(b, a))
    if classes == 2:
        assert ours.f1(a, b) == pytest.approx(theirs.f1_score(b, a, zero_division=0))


def test_correlations_with_ties():
    draw = np.random.default_rng(0)
    a, b = draw.integers(0, 6, (2, 40)) / 2
    assert ours.pearson(a, b) == pytest.approx(stats.pearsonr(a, b).statistic)
    assert ours.spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def test_undefined_is_zero():
    flat, other = np.full(7, 0.1), np.arange(7) / 7
    assert ours.pearson(flat, other) == ours.spearman(other, flat) == 0.0
    zeros = np.zeros(7, dtype=int)
    assert ours.matthews(zeros, zeros) == ours.f1(zeros, zeros) == 0.0


@pytest.mark.parametrize(
    ("task", "names"),
    [
        (Task(labels=("a", "b")), ("accuracy", "f1", "matthews")),
        (Task(labels=("a", "b", "c")), ("accuracy", "macro_f1")),
        (Task(), ("pearson", "spearman", "pearson_spearman")),
    ],
)
def test_each_task_has_its_metrics(task, names):
    assert ours.metric_names(task) == names
    assert ours.metric_for(task) in names
    true = np.array([0.0, 1.0, 1.0, 0.0]) if task.regression else np.array([0, 1, 1, 0])
    logits = np.eye(3)[[0, 1, 1, 0]][:, : task.num_labels] if not task.regression else true[:, None]
    for predictions in (logits, (logits, "hidden states")):
        values = ours.compute_metrics(task)(EvalPrediction(predictions=predictions, label_ids=true))
        assert values == dict.fromkeys(names, pytest.approx(1.0))
