"""The demo's result: held-out accuracy and speed of every model, and where everything is."""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tinybert_fast import integrations
from tinybert_fast.data import LengthCollator, Task, encode_examples, load_examples, sort_by_length
from tinybert_fast.data.atomic import atomic_write
from tinybert_fast.training.demo.settings import DemoSettings, folder_of
from tinybert_fast.training.evaluate import predict
from tinybert_fast.training.loading import load_classifier, load_tokenizer
from tinybert_fast.training.metrics import score
from tinybert_fast.training.recipe_parts import parameters
from tinybert_fast.training.report import Panels, plot, table
from tinybert_fast.training.run_folder import METRICS

RESULT = "demo.json"
REPORT = "report.md"
PICTURE = "losses.png"
SPEED_BATCH = 32
SMOOTH = 10  # logged values in the running mean of a curve
KINDS = {"attention": "attention loss", "relation": "relation loss"}  # of terms, by first word
LOSS_NAMES = {"tinybert": "TinyBERT's losses", "minilm": "MiniLM's loss"}
NAMES = {
    "teacher": "teacher (MiniLM-L6, fine-tuned)",
    "student": f"TinyBERT-4L-312, distilled by {LOSS_NAMES['tinybert']}",
    "student-minilm": f"TinyBERT-4L-312, distilled by {LOSS_NAMES['minilm']}",
    "alone-random": "TinyBERT-4L-312, no teacher",
    "alone-pca": "TinyBERT-4L-312, no teacher, PCA start",
}


def measure(
    path: Path, groups: Mapping[str, Sequence[str]], settings: DemoSettings
) -> dict[str, dict[str, Any]]:
    """Group name -> parameters, folders, dev and held-out accuracy of each, sentences/s of the
    first: median over rounds that go through all groups, batches of similar length, collated
    before.
    """
    held_out = load_examples(path / "data" / "held_out.csv")
    found: dict[str, dict[str, Any]] = {}
    speed_of: dict[str, Any] = {}
    batches: list[Any] = []
    for group, folders in groups.items():
        found[group] = {"name": NAMES[group], "folders": list(folders), "dev": [], "held_out": []}
        for at, folder in enumerate(folders):
            model = integrations.accelerate(load_classifier(path / folder))
            tokenizer = load_tokenizer(path / folder)
            task = Task.of_model(model.config)
            encoded = encode_examples(held_out, tokenizer, task, settings.max_length)
            model.to("cuda" if torch.cuda.is_available() else "cpu")
            logits = predict(model, encoded, tokenizer, batch_size=2 * SPEED_BATCH)
            accuracy = score(logits, np.asarray(encoded["label"]), task)["accuracy"]
            metrics = json.loads((path / folder / METRICS).read_text(encoding="utf-8"))
            found[group]["held_out"].append(accuracy)
            found[group]["dev"].append(metrics["dev"]["accuracy"])
            found[group]["parameters"] = parameters(model)
            if at == 0:
                speed_of[group] = model
                batches = batches or _collated(encoded, tokenizer)
    for group, speed in sentences_per_second(speed_of, batches, settings.speed_rounds).items():
        found[group]["sentences_per_second"] = speed
    for values in found.values():
        values["mean"] = statistics.fmean(values["held_out"])
        several = len(values["held_out"]) > 1
        values["sd"] = statistics.stdev(values["held_out"]) if several else None
    return found


def _collated(encoded: Any, tokenizer: Any) -> list[dict[str, torch.Tensor]]:
    longest_first, _ = sort_by_length(encoded)
    collate = LengthCollator(tokenizer)
    rows = [longest_first[i] for i in range(len(longest_first))]
    return [collate(rows[i : i + SPEED_BATCH]) for i in range(0, len(rows), SPEED_BATCH)]


@torch.inference_mode()
def sentences_per_second(
    models: Mapping[str, Any], batches: Sequence[Mapping[str, torch.Tensor]], rounds: int
) -> dict[str, float]:
    """Median over rounds in which each model runs through all batches, after a warm-up batch."""
    sentences = sum(len(batch["input_ids"]) for batch in batches)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(rounds + 1):
        for name, model in models.items():
            device = next(model.parameters()).device
            start = time.perf_counter()
            for batch in batches if turn else batches[:1]:
                inputs = {k: v.to(device) for k, v in batch.items() if k != "labels"}
                model(**inputs)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: sentences / statistics.median(times) for name, times in seconds.items()}


def gap_key(loss: str) -> str:
    return "gap_recovered" if loss == "tinybert" else f"gap_recovered_{loss}"


def gaps(models: Mapping[str, Mapping[str, Any]], losses: Sequence[str]) -> dict[str, Any]:
    """(student - no teacher) / (teacher - no teacher) for each loss: of the means, and for each
    seed.
    """

    def share(teacher: float, student: float, alone: float) -> float | None:
        return (student - alone) / (teacher - alone) if teacher > alone else None

    teacher, alone = models["teacher"], models["alone-random"]
    found: dict[str, Any] = {}
    for loss in losses:
        student, key = models[folder_of("student", loss)], gap_key(loss)
        found[key] = share(teacher["mean"], student["mean"], alone["mean"])
        found[f"{key}_by_seed"] = [
            share(teacher["mean"], *pair) for pair in zip(student["held_out"], alone["held_out"])
        ]
    return found


def write(
    path: Path,
    settings: DemoSettings,
    models: dict[str, dict[str, Any]],
    *,
    sizes: Mapping[str, int],
    times: Mapping[str, float],
    lr: float,
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """demo.json, report.md and losses.png; returns what demo.json holds."""
    result = {
        "demo": settings.name,
        "models": models,
        **gaps(models, settings.losses),
        "alone_lr": lr,
        "data": dict(sizes),
        "seconds": dict(times),
        "total_seconds": round(sum(times.values()), 1),
        "settings": {**asdict(settings), "matches": str(settings.matches or "uniform")},
        "machine": {**machine, "threads": settings.threads, "torch": torch.__version__},
        "folder": str(path),
        "files": {"result": RESULT, "report": REPORT, "plot": PICTURE, "data": "data"},
    }
    picture = plot(_panels(path, models, settings.losses))
    if picture is not None:
        atomic_write(path / PICTURE, picture)
    atomic_write(path / RESULT, json.dumps(result, indent=2) + "\n")
    atomic_write(path / REPORT, _report(result))
    return result


def model_rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """What the table of the demo shows of each model."""
    rows: list[tuple[str, ...]] = []
    for values in result["models"].values():
        spread = "" if values["sd"] is None else f" ± {100 * values['sd']:.1f}"
        rows.append(
            (
                values["name"],
                f"{values['parameters'] / 1e6:.1f} M",
                f"{100 * values['mean']:.1f} %{spread}",
                f"{values['sentences_per_second']:,.0f}",
                values["folders"][0]
                if len(values["folders"]) == 1
                else values["folders"][0] + " ...",
            )
        )
    return rows


MODEL_COLUMNS = ("model", "parameters", "held-out accuracy", "sentences/s", "folder")


def remarks(result: Mapping[str, Any]) -> list[str]:
    """How to read the figures, one sentence each."""
    settings, data = result["settings"], result["data"]
    seeds, rates = settings["seeds"], settings["alone_lrs"]
    said, shares = [], []
    for loss in settings["losses"]:
        key = gap_key(loss)
        if result[key] is not None:
            each = ", ".join(f"{100 * s:.0f} %" for s in result[f"{key}_by_seed"] if s is not None)
            more = f" (seed by seed: {each})" if seeds > 1 else ""
            shares.append(f"by {LOSS_NAMES[loss]} {100 * result[key]:.0f} %{more}")
    if shares:
        said.append(
            "Gap recovered, (distilled - no teacher) / (teacher - no teacher): "
            f"{'; '.join(shares)}."
        )
    if seeds > 1:
        said.append(
            f"Mean ± standard deviation over {seeds} seeds of task distillation and of the runs "
            "without a teacher; the teacher and each loss's generally distilled student are shared."
        )
    sampling = 100 * (0.8 * 0.2 / data["held_out"]) ** 0.5
    said.append(
        f"Held out: {data['held_out']:,} sentences, not used for training or to choose checkpoints "
        f"(one standard error of an accuracy is about {sampling:.1f} points); checkpoints (of "
        f"distilled students by {settings['select_students_by']}, of others by accuracy) and "
        f"learning rates were chosen on {data['dev']:,} others; training: {data['train']:,}."
    )
    said.append(
        f"Task distillation: {data['augmented']:,} sentences, "
        f"{data['augmented'] - data['train']:,} of them unlabelled, "
        f"{settings['intermediate_epochs']:g} + {settings['prediction_epochs']:g} epochs."
    )
    if "minilm" in settings["losses"]:
        said.append(
            "MiniLM's loss: the relations among queries, among keys and among values of the last "
            "layers (MiniLMv2), in general and in the intermediate stage."
        )
    rate = f"learning rate {result['alone_lr']:g}"
    if len(rates) > 1:
        rate += f", the best on dev of {', '.join(f'{r:g}' for r in rates)} in the first seed"
    said.append(
        f"Without a teacher: the labelled sentences, {settings['alone_epochs']:g} epochs, {rate}."
    )
    if settings["pca_alone"]:
        said.append("From the PCA start alone: that learning rate as well, not chosen anew.")
    return [
        *said,
        f"Trained in {'bf16 autocast' if settings['bf16'] else 'fp32'}, scored in fp32. Speed: "
        f"batches of {SPEED_BATCH} without padding, {settings['threads']} threads, tokenising left "
        "out.",
    ]


def _report(result: Mapping[str, Any]) -> str:
    seconds = [(name, f"{value:,.0f}") for name, value in result["seconds"].items()]
    folder = result["models"][folder_of("student", result["settings"]["losses"][0])]["folders"][0]
    parts = [
        f"# Demo ({result['demo']}): a TinyBERT student of MiniLM on movie reviews",
        table(MODEL_COLUMNS, model_rows(result)),
        "\n".join(f"- {remark}" for remark in remarks(result)),
        "## Seconds of each phase",
        table(("phase", "seconds"), [*seconds, ("total", f"{result['total_seconds']:,.0f}")]),
        f"## Losses\n\n![losses]({PICTURE})",
        "## Machine",
        table(("what", "value"), result["machine"].items()),
        "## Settings",
        table(("setting", "value"), result["settings"].items()),
        "## Use it",
        "```python\nfrom transformers import pipeline\n"
        f'classify = pipeline("text-classification", "{result["folder"]}/{folder}")\n'
        'classify("a lovely film")\n```',
    ]
    return "\n\n".join(parts) + "\n"


def _panels(path: Path, models: Mapping[str, Mapping[str, Any]], losses: Sequence[str]) -> Panels:
    """The losses of the first seed's runs, smoothed, and the dev accuracies."""
    panels: Panels = {}
    first = {name: path / values["folders"][0] for name, values in models.items()}
    stages = [("task losses", "teacher", first["teacher"] / "history-train.json")]
    for loss in losses:
        general, student = path / folder_of("general", loss), first[folder_of("student", loss)]
        stages += [
            ("general distillation", "", general / "history-general.json"),
            ("task distillation, intermediate", "", student / "history-intermediate.json"),
            ("task losses", f"by {LOSS_NAMES[loss]}", student / "history-prediction.json"),
        ]
    stages.append(("task losses", "no teacher", first["alone-random"] / "history-train.json"))
    for panel, who, file in stages:
        if not file.exists():  # a stage of 0 epochs
            continue
        for entry in json.loads(file.read_text(encoding="utf-8")):
            for name, value in _losses(entry, who).items():
                title, curve = (panel, who) if who else (f"{panel}: {name}", name)
                points = panels.setdefault(title, {}).setdefault(curve, [])
                points.append((entry["step"], value))
            if "eval_accuracy" in entry:
                point = (entry["step"], entry["eval_accuracy"])
                panels.setdefault("dev accuracy", {}).setdefault(who, []).append(point)
    for panel, curves in panels.items():
        if panel != "dev accuracy":
            panels[panel] = {name: _smooth(points) for name, points in curves.items()}
    return panels


def _losses(entry: Mapping[str, Any], who: str) -> dict[str, float]:
    """One curve for a task loss; sums over the layers for an intermediate one."""
    if "loss" not in entry:
        return {}
    if who:
        return {who: entry["loss"]}
    sums: dict[str, float] = {}
    for name, value in entry.items():
        if name.endswith("_loss"):
            kind = KINDS.get(name.partition("_")[0], "hidden-state loss")
            sums[kind] = sums.get(kind, 0.0) + value
    return sums


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    values = [value for _, value in points]
    return [
        (step, statistics.fmean(values[max(0, i + 1 - SMOOTH) : i + 1]))
        for i, (step, _) in enumerate(points)
    ]
