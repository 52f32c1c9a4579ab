"""Scores a saved classification or regression model on a labelled file."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from tinybert_fast import integrations
from tinybert_fast.data import (
    LengthCollator,
    Task,
    encode_examples,
    load_examples,
    sort_by_length,
    usable_length,
)
from tinybert_fast.data.atomic import atomic_write
from tinybert_fast.data.collate import Rows
from tinybert_fast.data.progress import shown
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.training.loading import check_accelerates, load_classifier, load_tokenizer
from tinybert_fast.training.metrics import score
from tinybert_fast.training.teacher import classify


def evaluate(
    model_path: str | Path,
    file: str | Path,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    batch_size: int = 64,
    max_length: int = 128,
    bf16: bool = False,
    accelerate: bool = True,
    impl: str = "auto",
    predictions: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """The model's metrics on the file, the number of examples and the speed without tokenising.

    `predictions`: a .jsonl to write, for each row of the file its label, the prediction and, for
    classes, the probability of that prediction.
    """
    model = load_classifier(model_path)
    task = Task.of_model(model.config)
    kind = "regression" if task.regression else "classification"
    examples = load_examples(file, text, text_pair, label, kind=kind)
    task = Task.of_model(model.config, text_pair="text_pair" in examples.column_names)
    max_length = usable_length(max_length, model.config)
    tokenizer = load_tokenizer(model_path, model.config)
    if accelerate:
        check_accelerates(model_path, model.config)
    encoded = encode_examples(examples, tokenizer, task, max_length, str(file))
    if accelerate:
        integrations.accelerate(model, impl=impl)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    start = time.perf_counter()
    logits = predict(model, encoded, tokenizer, batch_size=batch_size, bf16=bf16, progress=progress)
    seconds = time.perf_counter() - start
    metrics = {
        **score(logits, np.asarray(encoded["label"]), task),
        "examples": len(encoded),
        "seconds": seconds,
        "examples_per_second": len(encoded) / seconds,
    }
    if predictions is not None:
        _write_predictions(Path(predictions), examples["label"], logits, task)
    return metrics


@torch.inference_mode()
def predict(
    model,
    encoded: Dataset,
    tokenizer,
    *,
    batch_size: int = 64,
    bf16: bool = False,
    progress: bool = False,
) -> np.ndarray:
    """Logits (rows, classes) fp32, in the order of `encoded`. Leaves the model in eval mode.

    Batches are of similar length. Runs where the model's parameters are.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected 1 or more")
    model.eval()
    device = next(model.parameters()).device
    longest_first, order = sort_by_length(encoded)
    collate = LengthCollator(tokenizer, lengths=True)
    loader = DataLoader(Rows(longest_first), batch_size=batch_size, collate_fn=collate)
    parts = []
    for batch in shown(loader, "evaluating", len(loader), progress):
        batch.pop("labels", None)
        width = batch["input_ids"].shape[1]
        layout = SequenceLayout.from_lengths(batch.pop("lengths"), width, device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            inputs = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
            parts.append(classify(model, inputs, layout).logits.float())
    logits = torch.cat(parts).cpu().numpy()
    in_order = np.empty_like(logits)
    in_order[order] = logits
    return in_order


def _write_predictions(path: Path, labels, logits: np.ndarray, task: Task) -> None:
    lines: list[dict[str, Any]] = []
    if task.labels is None:
        for true, row in zip(labels, logits):
            lines.append({"label": true, "prediction": float(row[0])})
    else:
        probability = np.exp(logits - logits.max(-1, keepdims=True))
        probability /= probability.sum(-1, keepdims=True)
        for true, row in zip(labels, probability):
            best = int(row.argmax())
            lines.append(
                {"label": true, "prediction": task.labels[best], "probability": float(row[best])}
            )
    atomic_write(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
