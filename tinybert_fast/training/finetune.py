"""Fine-tuning for sentence and sentence-pair classification and regression."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed

from tinybert_fast import integrations
from tinybert_fast.data import (
    LengthCollator,
    Task,
    encode_examples,
    load_examples,
    sort_by_length,
    usable_length,
)
from tinybert_fast.data.shards import fingerprint
from tinybert_fast.data.tasks import class_order
from tinybert_fast.training.common import RunTrainer, training_arguments
from tinybert_fast.training.graphs import check_graphs
from tinybert_fast.training.loading import (
    check_accelerates,
    check_model_path,
    load_classifier,
    load_config,
    load_tokenizer,
)
from tinybert_fast.training.metrics import check_metric, compute_metrics, metric_names
from tinybert_fast.training.recipe_parts import facts, parameters, usage
from tinybert_fast.training.recipe_parts import train as train_stage
from tinybert_fast.training.report import panels_of, table
from tinybert_fast.training.run_folder import RunFolder, examples_digest, weights_digest


def finetune(
    model_path: str | Path,
    train_file: str | Path,
    dev_file: str | Path | None,
    output: str | Path,
    *,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    kind: str = "auto",
    epochs: float = 3.0,
    lr: float = 5e-5,
    batch_size: int = 32,
    accumulation: int = 1,
    max_length: int = 128,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    schedule: str = "linear",
    eval_steps: int | None = None,
    select_by: str | None = None,
    checkpoint_steps: int | None = None,
    log_steps: int = 10,
    seed: int = 0,
    bf16: bool = False,
    accelerate: bool = True,
    impl: str = "auto",
    cuda_graphs: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    keep_checkpoints: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Trains a classification or regression model, writes it to `output` and returns its metrics.

    The checkpoint that is best on `dev_file` is kept (`select_by`: a metric of the task, by default
    accuracy or the mean of Pearson and Spearman; or "loss"), evaluated each epoch or every
    `eval_steps` steps; without `dev_file` the last one is, and one is written each epoch or every
    `checkpoint_steps` steps. Files and columns: `load_examples`.
    `accelerate`: packed encoder of tinybert_fast; the saved model is plain Transformers either way.
    `cuda_graphs`: replay steps on one GPU (training/graphs.py).
    Effective batch: batch_size x accumulation x processes.
    """
    run = RunFolder(output, overwrite=overwrite, resume=resume)
    check_model_path(model_path)
    columns = (text, text_pair, label)
    train = load_examples(train_file, *columns, kind=kind)
    config = load_config(model_path)
    if dev_file is None and eval_steps is not None:
        raise ValueError(
            "eval_steps is for a dev file, and there is none: give --dev, or leave it out"
        )
    task = Task.of(train, tuple((config.id2label or {}).values()), class_order(train_file, label))
    dev = None if dev_file is None else load_dev(dev_file, task, *columns)
    select_by = check_metric(select_by, task, dev_file)
    max_length = usable_length(max_length, config)
    tokenizer = load_tokenizer(model_path, config)
    if accelerate:
        check_accelerates(model_path, config)
    recipe: dict[str, Any] = {
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "eval_steps": eval_steps,
        "select_by": select_by if dev is not None else None,
        "seed": seed,
        "bf16": bf16,
    }
    arguments = training_arguments(
        run.checkpoints(),
        evaluate=dev is not None,
        log_steps=log_steps,
        checkpoint_steps=checkpoint_steps,
        ddp_find_unused_parameters=False,  # a classifier uses all it has
        **recipe,
    )
    if cuda_graphs:
        check_graphs(arguments, accelerated=accelerate)
    settings = {
        "model": str(model_path),
        "model_weights": weights_digest(model_path),
        "tokenizer": fingerprint(tokenizer),
        "train": examples_digest(train),
        "dev": None if dev is None else examples_digest(dev),
        "labels": task.labels,
        "max_length": max_length,
        "accelerate": accelerate,
        "impl": impl,
        "processes": arguments.world_size,
        **recipe,
    }
    if run.finished(settings):
        return run.metrics()

    encoded = encode_examples(train, tokenizer, task, max_length, str(train_file))
    encoded_dev = None
    if dev is not None:
        encoded_dev, _ = sort_by_length(
            encode_examples(dev, tokenizer, task, max_length, str(dev_file))
        )
    set_seed(seed)  # of the new head
    model = load_classifier(model_path, task)
    if accelerate:
        integrations.accelerate(model, impl=impl)
    run.begin(settings)

    trainer = RunTrainer(
        model=model,
        args=arguments,
        data_collator=LengthCollator(tokenizer, lengths=True),
        train_dataset=encoded,
        eval_dataset=encoded_dev,
        processing_class=tokenizer,
        compute_metrics=compute_metrics(task),
        callbacks=list(callbacks),
        logs=run.logs(),
        title="fine-tuning",
        progress=progress,
        cuda_graphs=cuda_graphs,
    )
    outcome = train_stage(trainer, run)
    panels = panels_of(trainer.state.log_history)
    metrics: dict[str, Any] = {
        "task": "regression" if task.regression else "classification",
        "labels": list(task.labels) if task.labels else None,
        "parameters": parameters(model),
        "train_examples": len(train),
        **outcome,
    }
    if encoded_dev is not None:
        scores = trainer.evaluate(metric_key_prefix="final")  # of the checkpoint that was chosen
        metrics["dev_examples"] = len(encoded_dev)
        metrics["selected_by"] = select_by
        metrics["best_step"] = trainer.state.best_global_step
        metrics["dev"] = {name: scores[f"final_{name}"] for name in (*metric_names(task), "loss")}
    run.save_model(model, tokenizer)
    run.write_metrics(metrics)
    run.write_report("Fine-tuning", report_sections(run, metrics, settings), panels)
    run.finish(keep_checkpoints)
    return metrics


def load_dev(
    path: str | Path,
    task: Task,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
):
    """Labelled examples to score a model of `task` on: of its kind, single texts or pairs alike."""
    kind = "regression" if task.regression else "classification"
    examples = load_examples(path, text, text_pair, label, kind=kind)
    if ("text_pair" in examples.column_names) != (task.text_pair is not None):
        wanted = "single texts" if task.text_pair is None else "pairs"
        raise ValueError(
            f"{path}: the training file holds {wanted}, this one does not; name the columns"
        )
    return examples


def report_sections(
    run: RunFolder, metrics: dict[str, Any], settings: dict[str, Any]
) -> dict[str, str]:
    """report.md of a classification model: results, classes, settings, how to load it."""
    results = [(f"dev {name}", value) for name, value in metrics.get("dev", {}).items()]
    sections = {"Result": table(("what", "value"), results + facts(metrics))}
    if metrics.get("labels"):
        sections["Classes"] = ", ".join(f"`{label}`" for label in metrics["labels"])
    sections["Settings"] = table(("setting", "value"), settings.items())
    sections["Use it"] = usage(run.path, "AutoModelForSequenceClassification")
    return sections
