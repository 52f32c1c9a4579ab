"""General distillation: a student learns the teacher's representations of plain text."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import BertConfig, TrainerCallback

from tinybert_fast.data.lines import Lines, encode_lines
from tinybert_fast.data.progress import shown
from tinybert_fast.data.shards import fingerprint
from tinybert_fast.training.common import at_least_one, training_arguments
from tinybert_fast.training.graphs import check_graphs
from tinybert_fast.training.initialise import How
from tinybert_fast.training.loading import load_bert_config, load_encoder, load_tokenizer
from tinybert_fast.training.losses import Parity
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.objectives import Loss, matches_for
from tinybert_fast.training.projection import FILE_NAME as PROJECTION
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
from tinybert_fast.training.report import table
from tinybert_fast.training.run_folder import RunFolder, weights_digest
from tinybert_fast.training.students import Student
from tinybert_fast.training.teacher import Teacher, TeacherDtype
from tinybert_fast.training.teaching import Teaching, check_teaching, start_of


def distill_general(
    teacher: str | Path,
    student: str | Path | BertConfig,
    corpus: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    epochs: float = 3.0,
    steps: int | None = None,
    lr: float = 5e-5,
    batch_size: int = 256,
    accumulation: int = 1,
    max_length: int = 128,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    schedule: str = "linear",
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
    """Teaches a student the teacher's representations of plain text; returns the run's metrics.

    ``teacher``: a BERT folder, not fine-tuned. ``student``: a preset (4l-312, 6l-768), a BertConfig
    or its .json file, or a saved BERT to go on with. ``corpus``: text files with one sentence per
    line, or a list of sentences. ``steps`` overrides ``epochs``. ``init`` starts new weights at
    random (default), from the teacher's ``layers`` or from a ``pca`` of its embeddings.
    ``loss``: "tinybert", over ``matches`` (see LayerMatches.parse; uniform by default); or
    "minilm", the softmaxed ``relations`` (such as "qk,vv"; MiniLMv2's by default) of the student's
    last layer and of ``teacher_layer`` (the last), in ``relation_heads`` of both: the models may
    then have any number of heads, and there is no projection. Defaults: RelationMatches.of.

    ``teacher_dtype``: fp32, bf16, on a CPU int8, on an sm_90 or sm_100 fp8 (training/teacher.py);
    by default that of the run. ``cache_teacher``: ask the teacher once and keep what it says, in a
    folder named here or, with True, in the run's until its end; for CPUs (training/lessons.py says
    why). ``cache_dtype``: fp32, fp16 or bf16, by default as it was computed.
    ``cuda_graphs``: replay steps on one GPU (training/graphs.py).

    ``output`` gets a BertModel that plain Transformers loads, and of TinyBERT's loss
    ``projection.safetensors``, with which task distillation goes on.
    """
    run = RunFolder(output, overwrite=overwrite, resume=resume)
    check_parity(parity)
    at_least_one(steps=steps, checkpoint_steps=checkpoint_steps)
    numbers = check_teaching(parity, teacher_dtype, cache_teacher, cache_dtype, bf16=bf16)
    teacher_config = load_bert_config(teacher)
    chosen = Student.of(student, teacher_config)
    tokenizer = load_tokenizer(teacher, teacher_config)
    chosen.check(teacher, teacher_config, tokenizer)
    matched = matches_for(
        matches,
        chosen.config,
        teacher_config,
        loss=loss,
        relations=relations,
        relation_heads=relation_heads,
        teacher_layer=teacher_layer,
        shared_projection=shared_projection,
        parity=parity,
    )
    max_length = usable(max_length, chosen.config, teacher_config)
    lines = Lines.of(corpus)

    recipe: dict[str, Any] = {
        "epochs": epochs,
        "max_steps": -1 if steps is None else steps,
        "lr": lr,
        "batch_size": batch_size,
        "accumulation": accumulation,
        "warmup": warmup,
        "weight_decay": weight_decay,
        "schedule": schedule,
        "seed": seed,
        "bf16": bf16,
    }
    arguments = training_arguments(
        run.checkpoints("general"),
        **recipe,
        evaluate=False,
        log_steps=log_steps,
        checkpoint_steps=checkpoint_steps,
        **more_arguments(parity, "intermediate"),
    )
    if cuda_graphs:
        check_graphs(arguments, accelerated=accelerate and parity != "official")
    sentences, digest = lines.survey(progress and run.main)
    check_batches(sentences, arguments, parity)
    settings = {
        "teacher": str(teacher),
        "teacher_weights": weights_digest(teacher),
        "tokenizer": fingerprint(tokenizer),
        **student_settings(chosen, init),
        "corpus": digest,
        "max_length": max_length,
        **matched.settings(shared_projection=shared_projection),
        "parity": parity,
        "teacher_dtype": teacher_dtype,
        "cache_teacher": bool(cache_teacher) or None,
        "cache_dtype": cache_dtype,
        "accelerate": accelerate,
        "impl": impl,
        "processes": arguments.world_size,
        **recipe,
    }
    if run.finished(settings):
        return run.metrics()

    fast = partial(prepare, parity=parity, accelerate=accelerate, impl=impl)
    guide = Teacher(teacher_config, lambda: load_encoder(teacher), numbers, fast)
    start = start_of(run, "general", init)
    pupil, projection = chosen.build(
        guide, matched, init=start, shared=shared_projection, seed=seed
    )
    fast(pupil)
    about = run.recorded_by_resumed("teacher") or {"parameters": parameters(guide.model)}
    run.begin(settings)
    run.record(teacher=about)
    with arguments.main_process_first(local=False):
        encoded = encode_lines(
            shown(lines, "encoding the corpus", sentences, progress and run.main),
            tokenizer,
            max_length,
            run.checkpoints() / f"corpus-{digest}-{max_length}.arrow",
        )
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
    trainer = teaching.trainer(
        pupil,
        "general",
        encoded,
        digest,
        stage="intermediate",
        matches=matched,
        projection=projection,
        parity=parity,
        args=arguments,
        data_collator=collator_for(tokenizer, parity, max_length),
        processing_class=tokenizer,
        callbacks=list(callbacks),
        logs=run.logs("general"),
        title="general distillation",
        progress=progress,
        cuda_graphs=cuda_graphs,
    )
    outcome = train(trainer, run, "general")
    history = trainer.state.log_history
    metrics: dict[str, Any] = {
        "task": "general distillation",
        "parameters": parameters(pupil),
        "teacher_parameters": about["parameters"],
        "sentences": sentences,
        **outcome,
        "losses": first_and_last(history),
    }
    changes = teaching.changes()
    if changes:
        metrics["teacher_change"] = changes["general"]
    run.save_model(pupil, tokenizer, projection=projection)
    run.write_metrics(metrics)
    sections = {
        "Result": table(("what", "value"), facts(metrics)),
        "Losses": loss_table(metrics["losses"]),
        **change_tables(changes),
        "Settings": table(("setting", "value"), settings.items()),
        "Use it": usage(run.path, "AutoModel"),
    }
    if projection is not None:
        sections["Use it"] += (
            f"\n\n`{PROJECTION}` holds the map from the student's width to the teacher's: it is no "
            "part of the model, and task distillation goes on with it."
        )
    run.write_report("General distillation", sections, loss_panels(history, "general"))
    run.finish(keep_checkpoints)
    return metrics
