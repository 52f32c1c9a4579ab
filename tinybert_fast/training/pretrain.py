"""Pre-training from text: masked tokens and next sentences, adaptive, sparse and bidirectional."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import BertConfig, BertForPreTraining, TrainerCallback, set_seed

from tinybert_fast import integrations
from tinybert_fast.data import Corpus, PreTrainingCollator, Shards, sort_by_length, train_wordpiece
from tinybert_fast.data.shards import Survey, fingerprint, shards_of, survey
from tinybert_fast.data.wordpiece import SMALLEST
from tinybert_fast.training.common import at_least_one, training_arguments
from tinybert_fast.training.graphs import check_graphs
from tinybert_fast.training.loading import has_tokenizer, load_pretraining, load_tokenizer
from tinybert_fast.training.masking import Masking
from tinybert_fast.training.pretraining import (
    Objectives,
    PreTrainingBatches,
    PreTrainingTrainer,
)
from tinybert_fast.training.recipe_parts import (
    facts,
    first_and_last,
    loss_table,
    parameters,
    train,
    usable,
    usage,
)
from tinybert_fast.training.report import panels_of, table
from tinybert_fast.training.run_folder import RunFolder, agree, weights_digest
from tinybert_fast.training.students import PRESETS, Student

log = logging.getLogger(__name__)

Source = str | Path | Sequence[str | Path] | Corpus
HELD_OUT_RATIO = 0.15
EVAL_STEPS = 500
VOCAB_SIZE = 30522
SHARDED_ON = ("cuda",)  # where accelerate shards models; on a CPU it copies them and says nothing
# The packed encoder reads a layer's weights without calling the layer, so layers are not sharded
# one by one: the model is one unit.
FSDP: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "auto_wrap_policy": "NO_WRAP",
        "state_dict_type": "FULL_STATE_DICT",
    },
}


def pretrain(
    corpus: Source,
    output: str | Path,
    *,
    model: str | Path | BertConfig = "4l-312",
    tokenizer: str | Path | None = None,
    vocab_size: int | None = None,
    lowercase: bool | None = None,
    held_out: Source | float | None = None,
    held_out_examples: int = 10_000,
    data: str | Path | None = None,
    max_length: int = 128,
    short: float = 0.1,
    duplicates: int = 1,
    words: str = "wordpiece",
    processes: int = 1,
    mlm: bool = True,
    nsp: bool = True,
    bidirectional: str = "off",
    masking: Masking | None = None,
    epochs: float = 3.0,
    steps: int | None = None,
    lr: float = 1e-4,
    batch_size: int = 32,
    accumulation: int = 1,
    warmup: float = 0.1,
    weight_decay: float = 0.01,
    schedule: str = "linear",
    eval_steps: int | None = None,
    checkpoint_steps: int = 500,
    log_steps: int = 10,
    seed: int = 0,
    bf16: bool = False,
    fsdp: bool = False,
    accelerate: bool = True,
    impl: str = "auto",
    cuda_graphs: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    keep_checkpoints: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Pre-trains a BertForPreTraining on plain text, writes it to ``output``, returns its metrics.

    Args:
        corpus, held_out: a Corpus, or text files and folders (``Corpus.of``). ``held_out`` may be a
            share: each (1 / share)-th document of the corpus is then kept from training.
        held_out_examples: at most so many, always the same, are read by an evaluation during
            training; the last one reads all.
        model: a preset (4l-312, 6l-768), a BertConfig or its .json file: new weights; or a saved
            BERT of any class, with which training goes on. What is not trained (the NSP head
            without ``nsp``, say) keeps its weights.
        tokenizer: a folder; by default that of a saved model, or one trained on the corpus with
            ``vocab_size`` (30522) and ``lowercase`` (True), which are for that alone.
        data: folder for tokenizer and shards, ``output``/data by default. What was made there
            before from the same text in the same way is used again.
        max_length, short, duplicates, words, processes: of ``write_shards``.
        bidirectional, masking: ``training/pretraining.py``, ``training/masking.py``.
        batch_size: per device and micro-batch; a step reads batch_size x accumulation x processes
            examples, and an incomplete last step of an epoch is left out.
        fsdp: shards parameters, gradients and optimizer over the GPUs instead of copying them.
        cuda_graphs: replay steps on one GPU (training/graphs.py).

    Raises:
        ValueError, OSError: as ``write_shards``; settings that contradict each other; a corpus with
            fewer examples than one step reads.
    """
    run = RunFolder(output, overwrite=overwrite, resume=resume)
    folder = Path(run.path / "data" if data is None else data)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{data} is a file; expected a folder for tokenizer and shards")
    if held_out is None and eval_steps is not None:
        raise ValueError("eval_steps is for held-out text, and there is none; leave it out")
    eval_steps = EVAL_STEPS if eval_steps is None else eval_steps
    masking = masking or Masking()
    objectives = Objectives(mlm, nsp, bidirectional)
    objectives.check_packed(accelerate)
    if not objectives.masks and masking != Masking():
        raise ValueError("masking options are of no use here: this training masks nothing")
    at_least_one(steps=steps, checkpoint_steps=checkpoint_steps, eval_steps=eval_steps)
    at_least_one(held_out_examples=held_out_examples)
    start = _Start.of(model, tokenizer, vocab_size, lowercase)
    max_length = usable(max_length, start.config)
    if nsp and start.config.type_vocab_size < 2:
        raise ValueError(f"{start.student.name} has one segment type; pairs need two (--no-nsp)")
    parts = _parts(corpus, held_out)

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
        run.checkpoints("pretrain"),
        **recipe,
        evaluate="held_out" in parts,
        eval_steps=eval_steps,
        log_steps=log_steps,
        checkpoint_steps=checkpoint_steps,
        dataloader_drop_last=True,  # steps are the same for any number of processes
        ddp_find_unused_parameters=False,
        **(FSDP if fsdp else {}),
    )
    if fsdp and arguments.device.type not in SHARDED_ON:
        raise ValueError(
            f"fsdp shares a model out over GPUs, and this run is on {arguments.device.type}; leave "
            "out --fsdp: each process then holds the model"
        )
    if fsdp and arguments.world_size == 1:
        raise ValueError("fsdp shares a model out over processes, and this is one: use torchrun")
    if cuda_graphs:
        check_graphs(arguments, accelerated=accelerate)
    found = {name: survey(part, nsp=nsp) for name, part in parts.items()}
    pairing: dict[str, Any] = {
        "max_length": max_length,
        "nsp": nsp,
        "short": short,
        "duplicates": duplicates,
        "words": words,
        "seed": seed,
    }
    settings = {
        **start.settings(),
        **{f"{name}_text": one.corpus for name, one in found.items()},
        **pairing,
        "mlm": mlm,
        "bidirectional": bidirectional,
        **masking.settings(),
        "fsdp": fsdp,
        "accelerate": accelerate,
        "impl": impl,
        "processes": arguments.world_size,
        **recipe,
    }
    if run.finished(settings):
        return run.metrics()

    making: dict[str, Any] = {"processes": processes, "progress": progress and run.main}
    with arguments.main_process_first(local=False):  # the others find what it made
        start.get_tokenizer(parts["train"], found["train"], folder, making["progress"])
        shards = {
            name: shards_of(part, found[name], start.tokenizer, folder, **making, **pairing)
            for name, part in parts.items()
        }
    agree({f"examples of {name}": len(one.examples) for name, one in shards.items()})
    _check_examples(shards["train"], batch_size * accumulation * arguments.world_size)
    set_seed(seed)  # of new weights
    pupil = start.build()
    if accelerate:
        integrations.accelerate(pupil, impl=impl)
    manifest, text = shards["train"].manifest, start.tokenizer
    collator = (
        masking.collator(manifest, text, seed)
        if objectives.masks
        else PreTrainingCollator(text, mlm=False)
    )
    run.begin(settings)
    dev = None
    if "held_out" in shards:
        every = shards["held_out"].examples
        dev = spread(every, held_out_examples)
        log.log(
            logging.WARNING if making["progress"] and len(dev) < len(every) else logging.INFO,
            "evaluating on %s of %s held-out examples every %s steps, on all of them at the end",
            *(f"{number:,}" for number in (len(dev), len(every), eval_steps)),
        )
    trainer = PreTrainingTrainer(
        pupil,
        collator=collator,
        objectives=objectives,
        ratio=masking.over_steps,
        losses=masking.losses(text, arguments.device),
        held_out=None if dev is None else plain_batches(text, objectives),
        args=arguments,
        train_dataset=shards["train"].examples,
        eval_dataset=dev,
        processing_class=text,
        callbacks=list(callbacks),
        logs=run.logs("pretrain"),
        title="pre-training",
        progress=progress,
        cuda_graphs=cuda_graphs,
    )
    outcome = train(trainer, run, "pretrain")
    history = trainer.state.log_history
    metrics: dict[str, Any] = {
        "task": "pre-training",
        "parameters": parameters(pupil),
        "vocabulary": len(text),
        "train_examples": manifest.examples,
        "train_tokens": manifest.tokens,
        **outcome,
        **trainer.speed(),
        "losses": first_and_last(history),
    }
    if "held_out" in shards:
        metrics["held_out_examples"] = shards["held_out"].manifest.examples
        whole = sort_by_length(shards["held_out"].examples)[0]
        scores = trainer.evaluate(whole, metric_key_prefix="final")
        metrics["held_out"] = {name.removeprefix("final_"): value for name, value in scores.items()}
    run.save_model(trainer.inner, text, state=trainer.inner_state())
    run.write_metrics(metrics)
    sections = {
        "Result": table(
            ("what", "value"),
            [(f"held-out {k}", v) for k, v in metrics.get("held_out", {}).items()] + facts(metrics),
        ),
        "Losses": loss_table(metrics["losses"]),
        "Settings": table(("setting", "value"), settings.items()),
        "Use it": usage(run.path, "BertForPreTraining"),
    }
    run.write_report("Pre-training", sections, panels_of(history))
    run.finish(keep_checkpoints)
    return metrics


def spread(examples: Dataset, most: int) -> Dataset:
    """At most so many examples, from everywhere in the text, longest first."""
    if len(examples) > most:
        examples = examples.select(np.arange(most) * len(examples) // most)
    return sort_by_length(examples)[0]


def plain_batches(tokenizer: Any, objectives: Objectives) -> PreTrainingBatches:
    """Of held-out text: HELD_OUT_RATIO of the tokens, uniform, always the same ones, so that runs
    compare whatever they mask in training.
    """
    masks = {"mlm_probability": HELD_OUT_RATIO} if objectives.masks else {"mlm": False}
    return PreTrainingBatches(PreTrainingCollator(tokenizer, **masks), objectives)


@dataclass
class _Start:
    """The model and the tokenizer that a run starts from."""

    student: Student
    vocab_size: int
    lowercase: bool
    tokenizer: Any = None

    @classmethod
    def of(
        cls,
        model: str | Path | BertConfig,
        tokenizer: str | Path | None,
        vocab_size: int | None,
        lowercase: bool | None,
    ) -> _Start:
        text = None if tokenizer is None else load_tokenizer(tokenizer)
        size = VOCAB_SIZE if vocab_size is None else vocab_size
        student = Student.of(model, BertConfig(vocab_size=size if text is None else len(text)))
        if student.folder is not None and has_tokenizer(student.folder):
            theirs = load_tokenizer(student.folder)
            if text is not None and fingerprint(text) != fingerprint(theirs):
                raise ValueError(
                    f"{student.name} was trained with another tokenizer than {tokenizer}; leave "
                    "the tokenizer out, or start with new weights"
                )
            text = theirs
        elif student.folder is not None and text is None:
            raise ValueError(f"{student.name} holds no tokenizer; give the one it was trained with")
        if text is None and size < SMALLEST:
            raise ValueError(f"vocab_size is {size}; expected {SMALLEST} or more")
        if text is not None and (vocab_size, lowercase) != (None, None):
            raise ValueError(
                "vocab_size and lowercase (--cased) are for a tokenizer trained on the corpus, and "
                "this run has one already; leave them out"
            )
        if text is not None and len(text) > student.config.vocab_size:
            raise ValueError(
                f"{student.name} has {student.config.vocab_size} word pieces and the tokenizer "
                f"{len(text)}; they need one vocabulary"
            )
        size = min(size, student.config.vocab_size)
        if text is None and size < SMALLEST:
            raise ValueError(
                f"{student.name} has {size} word pieces; a tokenizer trained on the corpus needs "
                f"{SMALLEST} or more"
            )
        return cls(student, size, lowercase is not False, text)

    @property
    def config(self) -> BertConfig:
        return self.student.config

    def settings(self) -> dict[str, Any]:
        known: dict[str, Any] = (
            {"vocab_size": self.vocab_size, "lowercase": self.lowercase}
            if self.tokenizer is None
            else {"tokenizer": fingerprint(self.tokenizer)}
        )
        if self.student.folder is not None:
            return {**known, "model_weights": weights_digest(self.student.folder)}
        return {**known, "config": self.config.to_diff_dict()}

    def get_tokenizer(self, corpus: Corpus, found: Survey, data: Path, progress: bool) -> None:
        """One of the corpus's own, where none was given; trained once."""
        if self.tokenizer is not None:
            return
        what = (found.corpus, corpus.sentences, self.vocab_size, self.lowercase)
        folder = data / f"tokenizer-{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}"
        if (folder / "tokenizer.json").exists():
            self.tokenizer = load_tokenizer(folder)
            return
        self.tokenizer = train_wordpiece(
            corpus,
            folder,
            vocab_size=self.vocab_size,
            lowercase=self.lowercase,
            progress=progress,
        )

    def build(self) -> Any:
        if self.student.folder is None:
            config = self.config
            if self.student.name in PRESETS:
                config.vocab_size = len(self.tokenizer)
            config.pad_token_id = self.tokenizer.pad_token_id
            return BertForPreTraining(config)
        model, new = load_pretraining(self.student.folder)
        if new:
            log.warning("%s holds no %s: they start anew", self.student.name, ", ".join(new))
        return model


def _parts(corpus: Source, held_out: Source | float | None) -> dict[str, Corpus]:
    """{"train": ..., "held_out": ...}, the second where there is one."""
    whole = Corpus.of(corpus)
    if held_out is None:
        return {"train": whole}
    if not isinstance(held_out, float):
        return {"train": whole, "held_out": Corpus.of(held_out)}
    if not 0.0 < held_out <= 0.5:
        raise ValueError(f"held_out is {held_out}; expected a share above 0, at most 0.5")
    every = round(1 / held_out)
    return {
        "train": whole.part(every, held_out=False),
        "held_out": whole.part(every, held_out=True),
    }


def _check_examples(shards: Shards, of_a_step: int) -> None:
    examples = shards.manifest.examples
    if examples < of_a_step:
        raise ValueError(
            f"the corpus gives {examples} examples and one step reads {of_a_step} (batch size x "
            "accumulation x processes); choose a smaller batch size, or more duplicates"
        )
