"""Task distillation: a student learns one task from a teacher that was fine-tuned on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import BertConfig, TrainerCallback

from tinybert_fast.data import Task, encode_examples, load_examples, sort_by_length
from tinybert_fast.data.shards import fingerprint
from tinybert_fast.training import evaluate
from tinybert_fast.training.common import at_least_one, training_arguments
from tinybert_fast.training.distill import Stage
from tinybert_fast.training.finetune import load_dev
from tinybert_fast.training.graphs import check_graphs
from tinybert_fast.training.initialise import How
from tinybert_fast.training.loading import load_bert_config, load_classifier, load_tokenizer
from tinybert_fast.training.losses import Parity
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.metrics import check_metric, compute_metrics, metric_names, score
from tinybert_fast.training.objectives import Loss, matches_for
from tinybert_fast.training.recipe_parts import (
    change_tables,
    check_batches,
    check_parity,
    collator_for,
    facts,
    first_and_last,
    loss_panels,
    loss_table,
    more_arguments,
    parameters,
    prepare,
    student_settings,
    train,
    usable,
    usage,
)
from tinybert_fast.training.report import Panels, table
from tinybert_fast.training.run_folder import (
    INTERMEDIATE,
    RunFolder,
    examples_digest,
    weights_digest,
)
from tinybert_fast.training.students import Student
from tinybert_fast.training.teacher import Teacher, TeacherDtype
from tinybert_fast.training.teaching import Teaching, check_teaching, start_of

SINGLE_LENGTH, PAIR_LENGTH = 64, 128  # tokens of an input in the paper
PREDICTION: Stage = "prediction"
STAGES = (INTERMEDIATE, PREDICTION)


def distill_task(
    teacher: str | Path,
    student: str | Path | BertConfig,
    train_file: str | Path,
    dev_file: str | Path | None,
    output: str | Path,
    *,
    augmented: str | Path | None = None,
    augmented_prediction: bool | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    intermediate_epochs: float = 20.0,
    intermediate_lr: float = 5e-5,
    intermediate_schedule: str = "constant",
    prediction_epochs: float = 3.0,
    prediction_lr: float = 3e-5,
    prediction_schedule: str = "linear",
    batch_size: int = 32,
    accumulation: int = 1,
    max_length: int | None = None,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    temperature: float = 1.0,
    init: How | None = None,
    loss: Loss = "tinybert",
    matches: LayerMatches | str | None = None,
    shared_projection: bool = True,
    relations: str | None = None,
    relation_heads: int | None = None,
    teacher_layer: int | None = None,
    parity: Parity = "paper",
    teacher_dtype: TeacherDtype | None = None,
    cache_teacher: bool | str | Path = False,
    cache_dtype: str | None = None,
    eval_steps: int = 100,
    select_by: str | None = None,
    checkpoint_steps: int = 500,
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
    """Trains in two stages, writes the student to `output` and returns the run's metrics.

    Stage A, `intermediate`: embedding, hidden-state and attention losses at a constant rate, or
    MiniLM's by `loss="minilm"`; its student stays in `output/intermediate`. 0 epochs leave it out.
    Stage B, `prediction`: the teacher's logits alone, never gold labels (one output: its score, by
    mean squared error); the student that is best on `dev_file`, looked at every `eval_steps` steps,
    is kept (`select_by`: a metric of the task, by default accuracy or the mean of Pearson and
    Spearman; or "loss", which tells students on a small dev set apart more finely).

    `augmented`: a file that stands in for `train_file` in stage A, so it should hold the original
    texts too. Labels of neither are read. Stage B uses it as well unless the task is a regression,
    as in the paper; `augmented_prediction` decides otherwise. `student`, `init`, `loss`, `matches`:
    see distill_general, whose output is the student meant here, its projection included; also for
    `teacher_dtype`, `cache_teacher`, `cache_dtype`, `cuda_graphs`. Files and columns:
    `load_examples`. `max_length`: 64 for single texts and 128 for pairs by default.
    """
    run = RunFolder(output, overwrite=overwrite, resume=resume)
    check_parity(parity)
    if intermediate_epochs < 0:
        raise ValueError(f"intermediate_epochs is {intermediate_epochs}; expected 0 or more")
    if temperature <= 0:
        raise ValueError(
            f"the temperature divides the logits: expected more than 0, got {temperature}"
        )
    at_least_one(eval_steps=eval_steps, checkpoint_steps=checkpoint_steps)
    numbers = check_teaching(parity, teacher_dtype, cache_teacher, cache_dtype, bf16=bf16)
    config = load_bert_config(teacher)
    chosen = Student.of(student, config)
    tokenizer = load_tokenizer(teacher, config)
    chosen.check(teacher, config, tokenizer)
    matched = matches_for(
        matches,
        chosen.config,
        config,
        loss=loss,
        relations=relations,
        relation_heads=relation_heads,
        teacher_layer=teacher_layer,
        shared_projection=shared_projection,
        parity=parity,
    )
    data = _read(
        config, train_file, dev_file, augmented, text=text, text_pair=text_pair, label=label
    )
    task = data.task
    if augmented_prediction is None:
        augmented_prediction = not task.regression
    select_by = check_metric(select_by, task, dev_file)
    if max_length is None:
        max_length = PAIR_LENGTH if task.text_pair else SINGLE_LENGTH
    max_length = usable(max_length, chosen.config, config)
    first = "augmented" if "augmented" in data.parts else "train"
    sources = {INTERMEDIATE: first, PREDICTION: first if augmented_prediction else "train"}

    common: dict[str, Any] = {
        "batch_size": batch_size,
        "accumulation": accumulation,
        "weight_decay": weight_decay,
        "seed": seed,
        "bf16": bf16,
    }
    recipes: dict[str, dict[str, Any]] = {
        INTERMEDIATE: {
            "epochs": intermediate_epochs,
            "lr": intermediate_lr,
            "schedule": intermediate_schedule,
            "warmup": 0.0 if intermediate_schedule == "constant" else warmup,
        },
        PREDICTION: {
            "epochs": prediction_epochs,
            "lr": prediction_lr,
            "schedule": prediction_schedule,
            "warmup": warmup,
        },
    }
    looks: dict[str, Any] = {"evaluate": False}
    if "dev" in data.parts:  # and at the last step
        looks = {"eval_steps": eval_steps, "select_by": select_by}
    arguments = {}
    if intermediate_epochs:
        arguments[INTERMEDIATE] = training_arguments(
            run.checkpoints(INTERMEDIATE),
            **common,
            **recipes[INTERMEDIATE],
            evaluate=False,
            log_steps=log_steps,
            checkpoint_steps=checkpoint_steps,
            **more_arguments(parity, INTERMEDIATE),
        )
    arguments[PREDICTION] = training_arguments(
        run.checkpoints(PREDICTION),
        **common,
        **recipes[PREDICTION],
        **looks,
        checkpoint_steps=None if "dev" in data.parts else checkpoint_steps,
        log_steps=log_steps,
        **more_arguments(parity, PREDICTION),
    )
    for name in sources.values():
        check_batches(len(data.parts[name]), arguments[PREDICTION], parity)
    if cuda_graphs:
        check_graphs(arguments[PREDICTION], accelerated=accelerate and parity != "official")
    settings = {
        "teacher": str(teacher),
        "teacher_weights": weights_digest(teacher),
        "tokenizer": fingerprint(tokenizer),
        **student_settings(chosen, init),
        **data.digests(),
        "augmented_prediction": augmented_prediction,
        "max_length": max_length,
        **matched.settings(shared_projection=shared_projection),
        "parity": parity,
        "temperature": temperature,
        "teacher_dtype": teacher_dtype,
        "cache_teacher": bool(cache_teacher) or None,
        "cache_dtype": cache_dtype,
        "accelerate": accelerate,
        "impl": impl,
        "processes": arguments[PREDICTION].world_size,
        **common,
        **{
            f"{stage}_{name}": value
            for stage, recipe in recipes.items()
            for name, value in recipe.items()
        },
        **looks,
    }
    if run.finished(settings):
        return run.metrics()

    how: dict[str, Any] = {"parity": parity, "accelerate": accelerate, "impl": impl}
    guide = Teacher(config, lambda: load_classifier(teacher), numbers, partial(prepare, **how))
    about = run.recorded_by_resumed("teacher") or {"parameters": parameters(guide.model)}
    encoded = {
        name: encode_examples(examples, tokenizer, task, max_length, str(data.files[name]))
        for name, examples in data.parts.items()
    }
    texts = {stage: encoded[name] for stage, name in sources.items()}
    dev = sort_by_length(encoded["dev"])[0] if "dev" in encoded else None
    begun = STAGES[0] if intermediate_epochs else PREDICTION
    start = None if run.recorded_by_resumed(INTERMEDIATE) else start_of(run, begun, init)
    pupil, projection = chosen.build(
        guide, matched, task=task, init=start, shared=shared_projection, seed=seed
    )
    if dev is not None and "dev" not in about:
        guide.model.to(arguments[PREDICTION].device)
        logits = evaluate.predict(guide.model, dev, tokenizer, batch_size=2 * batch_size)
        about["dev"] = score(logits, np.asarray(dev["label"]), task)

    metrics: dict[str, Any] = {
        "task": f"{'regression' if task.regression else 'classification'}, distilled",
        "labels": list(task.labels) if task.labels else None,
        "parameters": parameters(pupil),
        "teacher_parameters": about["parameters"],
        "train_examples": len(data.parts["train"]),
    }
    if dev is not None:
        metrics["dev_examples"] = len(dev)
        metrics["teacher_dev"] = about["dev"]
    prepare(pupil, **how)
    run.begin(settings)
    run.record(teacher=about)
    digests = data.digests()
    teaching = Teaching.of(
        guide,
        teacher,
        run,
        tokenizer,
        max_length,
        cache_teacher=cache_teacher,
        cache_dtype=cache_dtype,
        compare=teacher_dtype not in (None, "fp32"),
    )
    shown: dict[str, Any] = {
        "parity": parity,
        "data_collator": collator_for(tokenizer, parity, max_length),
        "processing_class": tokenizer,
        "callbacks": list(callbacks),
        "progress": progress,
        "cuda_graphs": cuda_graphs,
    }
    panels: Panels = {}
    if intermediate_epochs:
        done = run.recorded(INTERMEDIATE)
        if done is None:
            trainer = teaching.trainer(
                pupil,
                INTERMEDIATE,
                texts[INTERMEDIATE],
                str(digests[sources[INTERMEDIATE]]),
                stage=INTERMEDIATE,
                matches=matched,
                projection=projection,
                args=arguments[INTERMEDIATE],
                logs=run.logs(INTERMEDIATE),
                title=INTERMEDIATE,
                **shown,
            )
            done = train(trainer, run, INTERMEDIATE)
            history = trainer.state.log_history
            run.save_model(pupil, tokenizer, INTERMEDIATE, projection)
            done |= {"losses": first_and_last(history), "history": history}
            run.record(**{INTERMEDIATE: done})
        else:
            pupil = load_classifier(run.path / INTERMEDIATE, task)
            prepare(pupil, **how)
        panels |= loss_panels(done["history"], INTERMEDIATE)
        metrics[INTERMEDIATE] = {name: v for name, v in done.items() if name != "history"}

    trainer = teaching.trainer(
        pupil,
        PREDICTION,
        texts[PREDICTION],
        str(digests[sources[PREDICTION]]),
        stage=PREDICTION,
        matches=None,
        temperature=temperature,
        args=arguments[PREDICTION],
        eval_dataset=dev,
        compute_metrics=compute_metrics(task),
        logs=run.logs(PREDICTION),
        title=PREDICTION,
        **shown,
    )
    outcome = train(trainer, run, PREDICTION)
    history = trainer.state.log_history
    panels |= loss_panels(history, PREDICTION)
    metrics[PREDICTION] = {**outcome, "losses": first_and_last(history)}
    if teaching.changes():
        metrics["teacher_change"] = teaching.changes()
    if dev is not None:
        best = trainer.state.best_global_step
        log = next(e for e in history if e.get("step") == best and f"eval_{select_by}" in e)
        metrics["selected_by"], metrics["best_step"] = select_by, best
        metrics["dev"] = {name: log[f"eval_{name}"] for name in (*metric_names(task), "loss")}
    run.save_model(pupil, tokenizer)
    run.write_metrics(metrics)
    run.write_report("Task distillation", _sections(run.path, metrics, settings), panels)
    run.finish(keep_checkpoints)
    return metrics


@dataclass(frozen=True)
class _Data:
    task: Task
    files: dict[str, str | Path | None]  # of "train", "dev", "augmented"
    parts: dict[str, Dataset]  # where there is a file

    def digests(self) -> dict[str, str | None]:
        return {k: examples_digest(self.parts[k]) if k in self.parts else None for k in self.files}


def _read(
    config: BertConfig,
    train_file: str | Path,
    dev_file: str | Path | None,
    augmented_file: str | Path | None,
    *,
    text: str | None,
    text_pair: str | None,
    label: str | None,
) -> _Data:
    """The files, held to the teacher's task: single texts or pairs; classes or scores in the dev
    file, which alone needs labels.
    """
    first = load_examples(train_file, text, text_pair, labelled=False)
    task = Task.of_model(config, text_pair="text_pair" in first.column_names)
    parts = {"train": first}
    if dev_file is not None:
        parts["dev"] = load_dev(dev_file, task, text, text_pair, label)
    if augmented_file is not None:
        augmented = load_examples(augmented_file, text, text_pair, labelled=False)
        parts["augmented"] = augmented
        if ("text_pair" in augmented.column_names) != (task.text_pair is not None):
            wanted = "pairs" if task.text_pair else "single texts"
            raise ValueError(
                f"{train_file} holds {wanted} and {augmented_file} does not; name the columns"
            )
    files = {"train": train_file, "dev": dev_file, "augmented": augmented_file}
    return _Data(task, files, parts)


def _sections(path: Path, metrics: dict[str, Any], settings: dict[str, Any]) -> dict[str, str]:
    sections = {}
    if "dev" in metrics:
        teacher = metrics["teacher_dev"]
        rows = [(name, teacher.get(name, ""), value) for name, value in metrics["dev"].items()]
        sections["Dev set"] = table(("metric", "teacher", "student"), rows)
    values = facts(metrics)
    for stage in STAGES:
        values += facts(metrics.get(stage, {}), f"{stage}: ")
    sections["Run"] = table(("what", "value"), values)
    for stage in STAGES:
        if stage in metrics:
            sections[f"Losses, {stage} stage"] = loss_table(metrics[stage]["losses"])
    sections |= change_tables(metrics.get("teacher_change", {}))
    if metrics["labels"]:
        sections["Classes"] = ", ".join(f"`{label}`" for label in metrics["labels"])
    sections["Settings"] = table(("setting", "value"), settings.items())
    sections["Use it"] = usage(path, "AutoModelForSequenceClassification")
    if INTERMEDIATE in metrics:
        sections["Use it"] += f"\n\nThe student of the first stage is in `{path / INTERMEDIATE}`."
    return sections
