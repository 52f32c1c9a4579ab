"""The metrics of the GLUE tasks in plain numpy: accuracy, F1, Matthews, Pearson, Spearman.

`predicted` and `true` are (rows,) arrays. A metric without a defined value (constant predictions
for a correlation, a class nobody predicts for F1) is 0.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from tinybert_fast.data import Task


def accuracy(predicted: np.ndarray, true: np.ndarray) -> float:
    return float(np.mean(predicted == true))


def f1(predicted: np.ndarray, true: np.ndarray, positive: int = 1) -> float:
    """2 tp / (2 tp + fp + fn) of the class `positive`."""
    both = np.sum((predicted == positive) & (true == positive))
    either = np.sum(predicted == positive) + np.sum(true == positive)
    return float(2 * both / either) if either else 0.0


def macro_f1(predicted: np.ndarray, true: np.ndarray) -> float:
    """Mean of f1 over every class that is true or predicted somewhere."""
    return float(np.mean([f1(predicted, true, k) for k in np.union1d(predicted, true)]))


def matthews(predicted: np.ndarray, true: np.ndarray) -> float:
    """Correlation of the two class assignments, any number of classes (Gorodkin's R_K)."""
    classes = np.union1d(predicted, true)
    a = (predicted[:, None] == classes).astype(np.float64)  # (rows, classes)
    b = (true[:, None] == classes).astype(np.float64)
    a, b = a - a.mean(0), b - b.mean(0)
    return _ratio(np.sum(a * b), np.sqrt(np.sum(a * a) * np.sum(b * b)))


def pearson(predicted: np.ndarray, true: np.ndarray) -> float:
    if np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return 0.0
    a, b = predicted - np.mean(predicted), true - np.mean(true)
    return _ratio(np.sum(a * b), np.sqrt(np.sum(a * a) * np.sum(b * b)))


def spearman(predicted: np.ndarray, true: np.ndarray) -> float:
    """Pearson's correlation of the ranks; equal values share their mean rank."""
    return pearson(_ranks(predicted), _ranks(true))


def score(logits: np.ndarray, true: np.ndarray, task: Task) -> dict[str, float]:
    """Every metric of the task. logits (rows, classes) or (rows, 1); true (rows,)."""
    if task.regression:
        predicted = logits.reshape(-1).astype(np.float64)
        values = {"pearson": pearson(predicted, true), "spearman": spearman(predicted, true)}
        return {**values, "pearson_spearman": (values["pearson"] + values["spearman"]) / 2}
    predicted = logits.argmax(-1)
    if task.num_labels == 2:
        return {
            "accuracy": accuracy(predicted, true),
            "f1": f1(predicted, true),
            "matthews": matthews(predicted, true),
        }
    return {"accuracy": accuracy(predicted, true), "macro_f1": macro_f1(predicted, true)}


def metric_for(task: Task) -> str:
    """The metric that picks the best checkpoint unless another is named."""
    return "pearson_spearman" if task.regression else "accuracy"


def metric_names(task: Task) -> tuple[str, ...]:
    """The names in the answer of `score`."""
    zeros = np.zeros((2, task.num_labels))
    return tuple(score(zeros, np.zeros(2, dtype=np.int64), task))


def check_metric(name: str | None, task: Task, dev_file: str | Path | None) -> str:
    """The metric to pick a checkpoint by: `name` if the task has it, its default for None."""
    if name is not None and dev_file is None:
        raise ValueError(
            f"select_by is {name!r}, but there is no dev file to choose a checkpoint on; give one, "
            "or leave select_by out"
        )
    known = (*metric_names(task), "loss")
    if name is not None and name not in known:
        raise ValueError(f"select_by is {name!r}; this task has {', '.join(known)}")
    return name or metric_for(task)


def compute_metrics(task: Task) -> Callable:
    """For transformers.Trainer: an EvalPrediction -> the metrics of the task."""

    def compute(prediction) -> dict[str, float]:
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        return score(logits, np.asarray(prediction.label_ids).reshape(-1), task)

    return compute


def _ratio(top, bottom) -> float:
    return float(top / bottom) if bottom > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[where]
