"""DistillationTrainer: what it trains, logs, saves, resumes and refuses."""

import copy

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, BertModel, TrainerCallback

import tinybert_fast as tbf
from tinybert_fast.data import LengthCollator
from tinybert_fast.data.collate import Rows
from tinybert_fast.testing.tiny_models import sentiment_rows, tiny_config, tiny_tokenizer
from tinybert_fast.training import teacher as teacher_module
from tinybert_fast.training.bert_adam import BertAdam
from tinybert_fast.training.common import training_arguments
from tinybert_fast.training.distill import DistillationTrainer
from tinybert_fast.training.lessons import LessonCache
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.projection import HiddenProjection
from tinybert_fast.training.relation_matches import RelationMatches
from tinybert_fast.training.teacher import bf16_linears

TERMS = {"embedding", "hidden_1", "hidden_2", "attention_1", "attention_2"}
STAGES = ("intermediate", "prediction")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """44 encoded sentences with labels, and their tokenizer."""
    tokenizer = tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    texts, labels = zip(*sentiment_rows(44))
    encoded = dict(tokenizer(list(texts)))
    encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
    encoded["label"] = [int(label == "good") for label in labels]
    return Dataset.from_dict(encoded), tokenizer


def models(accelerate=True, cls=BertForSequenceClassification, **changes):
    """Student 2 x 24, teacher 4 x 32, 2 heads; weights large enough for losses worth comparing."""
    torch.manual_seed(0)
    common = {"initializer_range": 0.1, **changes}
    student = cls(tiny_config(**common))
    teacher = cls(tiny_config(hidden_size=32, num_hidden_layers=4, intermediate_size=64, **common))
    if accelerate:
        tbf.accelerate(student)
        tbf.accelerate(teacher)
    return student, teacher


def trainer_of(data, output, pair=None, *, stage="intermediate", options=None, **arguments):
    examples, tokenizer = data
    student, teacher = pair or models()
    recipe = {"epochs": 2, "lr": 3e-3, "batch_size": 8, "log_steps": 3, "evaluate": False}
    options = {"data_collator": LengthCollator(tokenizer, lengths=True), **(options or {})}
    return DistillationTrainer(
        student,
        teacher,
        stage=stage,
        args=training_arguments(output, **{**recipe, **arguments}),
        train_dataset=examples,
        processing_class=tokenizer,
        progress=False,
        **options,
    )


def batch_of(data, trainer, rows=8):
    return trainer._prepare_inputs(trainer.data_collator([data[0][i] for i in range(rows)]))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def losses(history):
    return [entry for entry in history if "loss" in entry]


@pytest.mark.parametrize("accelerate", [True, False], ids=["packed", "padded"])
def test_intermediate_stage_learns_and_logs_every_term(data, tmp_path, accelerate):
    student, teacher = models(accelerate)
    frozen = copy.deepcopy(teacher.state_dict())
    trainer = trainer_of(data, tmp_path, (student, teacher), epochs=8)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    logs = losses(trainer.state.log_history)
    assert logs[-1]["step"] == trainer.state.max_steps == 48
    for entry in logs:
        assert {f"{name}_loss" for name in TERMS} <= entry.keys()
        parts = sum(entry[f"{name}_loss"] for name in TERMS)
        assert parts == pytest.approx(entry["loss"], rel=1e-5)
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]
    moved = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, start[k])}
    assert {"projection.fit_dense.weight", "projection.fit_dense.bias"} <= moved
    assert any("encoder.layer.1" in name for name in moved)
    assert not any("classifier" in name or "pooler" in name for name in moved)
    assert not teacher.training
    assert all(torch.equal(v, frozen[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())


def minilm(accelerate=True):
    """A student of 12 heads under a teacher of 4, and MiniLMv2's relations of 12 heads."""
    torch.manual_seed(0)
    student = BertModel(tiny_config(num_attention_heads=12, initializer_range=0.1))
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 5}
    teacher = BertModel(tiny_config(**sizes, initializer_range=0.3))
    if accelerate:
        tbf.accelerate(student)
        tbf.accelerate(teacher)
    return (student, teacher), RelationMatches.of(student.config, teacher.config)


@pytest.mark.parametrize("accelerate", [True, False], ids=["packed", "padded"])
def test_relations_are_learnt_under_other_heads(data, tmp_path, accelerate):
    pair, matches = minilm(accelerate)
    trainer = trainer_of(data, tmp_path, pair, options={"matches": matches}, epochs=8)
    start = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    logs = losses(trainer.state.log_history)
    terms = {f"relation_{kind}_loss" for kind in ("qq", "kk", "vv")}
    for entry in logs:
        assert {name for name in entry if name.endswith("_loss")} == terms
        assert sum(entry[name] for name in terms) == pytest.approx(entry["loss"], rel=1e-5)
    assert logs[-1]["loss"] < 0.8 * logs[0]["loss"]
    assert trainer.projection is None
    moved = {k for k, v in trainer.model.state_dict().items() if not torch.equal(v, start[k])}
    last = "student.encoder.layer.1."
    assert {f"{last}attention.self.{name}.weight" for name in ("query", "key", "value")} <= moved
    behind = ("attention.output", "intermediate", "output")
    assert not any(name.startswith(f"{last}{part}") for name in moved for part in behind)
    assert not (tmp_path / "checkpoint-48" / "projection.safetensors").exists()


@pytest.mark.parametrize("accelerate", [True, False], ids=["packed", "padded"])
def test_prediction_stage_learns_and_keeps_the_best(data, tmp_path, accelerate):
    student, teacher = models(accelerate)
    examples, _ = data
    scores = iter([0.1, 0.9, 0.4, 0.3])
    options = {"eval_dataset": examples, "compute_metrics": lambda _: {"score": next(scores)}}
    trainer = trainer_of(
        data,
        tmp_path,
        (student, teacher),
        stage="prediction",
        options=options,
        evaluate=True,
        eval_steps=5,  # and at step 12, the last
        select_by="score",
        keep=5,
        weight_decay=0.0,
    )
    weights = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            weights.append(copy.deepcopy(trainer.student.state_dict()))

    trainer.add_callback(Watch())
    trainer.train()
    logs = losses(trainer.state.log_history)
    assert all(e["prediction_loss"] == pytest.approx(e["loss"], rel=1e-5) for e in logs)
    assert trainer.state.best_global_step == 10
    assert len(weights) == 3
    final = trainer.student.state_dict()
    assert all(torch.equal(final[k], v) for k, v in weights[1].items())
    assert any(not torch.equal(final[k], v) for k, v in weights[2].items())


def test_the_teacher_says_what_the_student_learns(data, tmp_path):
    """Gold labels play no part: with wrong ones, every logged number is the same."""
    examples, tokenizer = data
    wrong = examples.map(lambda row: {"label": 1 - row["label"]})
    histories = []
    for at, rows in enumerate((examples, wrong)):
        trainer = trainer_of((rows, tokenizer), tmp_path / str(at), stage="prediction")
        trainer.train()
        histories.append([(e["loss"], e["grad_norm"]) for e in losses(trainer.state.log_history)])
    assert histories[0] == histories[1]


def test_loaders_read_rows(data, tmp_path):
    options = {"eval_dataset": data[0], "compute_metrics": None}
    trainer = trainer_of(data, tmp_path, options=options)
    for loader in (trainer.get_train_dataloader(), trainer.get_eval_dataloader()):
        assert isinstance(loader.dataset, Rows)


@pytest.mark.parametrize("stage", STAGES)
def test_packed_and_padded_agree(data, tmp_path, stage):
    """The same loss whichever of the two models is accelerated."""
    found = []
    for student_fast, teacher_fast in ((True, True), (False, False), (True, False), (False, True)):
        student, teacher = models(False)
        if student_fast:
            tbf.accelerate(student)
        if teacher_fast:
            tbf.accelerate(teacher)
        trainer = trainer_of(data, tmp_path, (student, teacher), stage=stage)
        trainer.model.eval()
        with torch.no_grad():
            found.append(trainer.compute_loss(trainer.model, batch_of(data, trainer)).item())
    assert found == pytest.approx([found[0]] * 4, rel=1e-5)


@pytest.mark.parametrize("lengths", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("kind", ["tinybert", "minilm", "prediction"])
def test_accumulated_batches_make_one_step(data, tmp_path, kind, lengths):
    """Micro-batches of 8 and 5 texts of other lengths are one batch of 13, whatever terms are means
    over: texts, tokens or pairs of tokens.
    """
    examples, tokenizer = data
    examples = examples.select(range(13))
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student, teacher = models(lengths, **still)
    options = {"data_collator": LengthCollator(tokenizer, lengths=lengths)}
    if kind == "minilm":
        options["matches"] = RelationMatches.of(student.config, teacher.config)
    found = []
    for size, accumulation in ((16, 1), (8, 2)):
        torch.manual_seed(1)  # of the projection
        trainer = trainer_of(
            (examples, tokenizer),
            tmp_path / str(size),
            (copy.deepcopy(student), teacher),
            stage="prediction" if kind == "prediction" else "intermediate",
            options=options,
            max_steps=1,
            batch_size=size,
            accumulation=accumulation,
            train_sampling_strategy="sequential",
            log_steps=1,
        )
        trainer.train()
        found.append(losses(trainer.state.log_history)[0])
    terms = [name for name in found[0] if "loss" in name]
    assert len(terms) == {"tinybert": 6, "minilm": 4, "prediction": 2}[kind]
    for name in (*terms, "grad_norm"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-5), name


def test_relations_resume_with_the_same_bits(data, tmp_path):
    def run(folder, callbacks=(), **train):
        pair, matches = minilm()
        more = {"save_strategy": "steps", "save_steps": 4, "log_steps": 4}
        options = {"matches": matches, "callbacks": list(callbacks)}
        trainer = trainer_of(data, folder, pair, options=options, **more)
        trainer.train(**train)
        return trainer

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", [StopAt(9)])
    checkpoint = str(tmp_path / "parts" / "checkpoint-8")
    resumed = run(tmp_path / "parts", resume_from_checkpoint=checkpoint)
    assert resumed.state.global_step == 12
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name
    assert losses(resumed.state.log_history) == losses(whole.state.log_history)


@pytest.mark.parametrize("parity", ["paper", "official"])
@pytest.mark.parametrize("stage", STAGES)
def test_resume_ends_with_the_same_bits(data, tmp_path, stage, parity):
    """Interrupted in the middle of the second epoch, dropout on: student, projection, logs."""

    def run(folder, callbacks=(), **train):
        pair = models(accelerate=parity == "paper")
        more = {"save_strategy": "steps", "save_steps": 4}
        if parity == "official":
            more |= {"train_sampling_strategy": "random", "max_grad_norm": 0.0}
        options = {"parity": parity, "callbacks": list(callbacks)}
        trainer = trainer_of(data, folder, pair, stage=stage, options=options, log_steps=4, **more)
        trainer.train(**train)
        return trainer

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", [StopAt(9)])
    resumed = run(
        tmp_path / "parts", resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-8")
    )
    assert resumed.state.global_step == 12
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert ("projection.fit_dense.weight" in expected) is (stage == "intermediate")
    assert losses(resumed.state.log_history) == losses(whole.state.log_history)


def test_checkpoints_are_plain_model_folders(data, tmp_path):
    trainer = trainer_of(data, tmp_path, epochs=1)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    assert not any("projection" in name for name in load_file(folder / "model.safetensors"))
    plain = BertForSequenceClassification.from_pretrained(folder)
    for name, value in trainer.student.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)
    saved = HiddenProjection(24, 32).load(folder)
    assert torch.equal(saved.fit_dense.weight, trainer.projection.fit_dense.weight)
    (folder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"damaged or cut short, remove .*checkpoint-6"):
        trainer_of(data, tmp_path).train(resume_from_checkpoint=str(folder))


def test_projection_per_layer_is_trained(data, tmp_path):
    projection = HiddenProjection(24, 32, (0, 1, 2), shared=False)
    start = copy.deepcopy(projection.state_dict())
    trainer = trainer_of(data, tmp_path, options={"projection": projection}, epochs=1)
    trainer.train()
    assert not any(torch.equal(v, start[k]) for k, v in projection.state_dict().items())
    names = set(load_file(tmp_path / "checkpoint-6" / "projection.safetensors"))
    assert names == set(start)


def test_a_loss_that_is_no_number_stops_the_run(data, tmp_path):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 8:
                with torch.no_grad():
                    trainer.projection.fit_dense.bias[0] = float("nan")

    trainer = trainer_of(
        data, tmp_path, options={"callbacks": [Poison()]}, save_strategy="steps", save_steps=4
    )
    with pytest.raises(ValueError, match=r"step 9 of 12.*checkpoint-8"):
        trainer.train()
    assert not torch.isnan(
        HiddenProjection(24, 32).load(tmp_path / "checkpoint-8").fit_dense.bias
    ).any()


@pytest.mark.parametrize("accelerate", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("stage", STAGES)
def test_bf16(data, tmp_path, stage, accelerate):
    """Close to fp32; weights stay fp32; a teacher with bf16 linear layers says the same."""
    found = {}
    for name, bf16 in (("fp32", False), ("bf16", True), ("bf16_linears", True)):
        student, teacher = models(accelerate)
        if name == "bf16_linears":
            bf16_linears(teacher)
        trainer = trainer_of(
            data, tmp_path / name, (student, teacher), stage=stage, bf16=bf16, epochs=1, log_steps=1
        )
        trainer.train()
        found[name] = [entry["loss"] for entry in losses(trainer.state.log_history)]
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert found["bf16"] == pytest.approx(found["fp32"], rel=0.05)
    assert found["bf16_linears"] == pytest.approx(found["bf16"], rel=1e-3)


def test_gradient_checkpointing_is_passed_on(data, tmp_path):
    import inspect

    import transformers

    old = "gradient_checkpointing"  # before Transformers 5.24
    known = inspect.signature(transformers.TrainingArguments).parameters
    name = "activation_checkpointing" if "activation_checkpointing" in known else old
    found = []
    for on in (False, True):
        trainer = trainer_of(data, tmp_path / str(on), epochs=1, **{name: on})
        trainer.train()
        found.append([entry["loss"] for entry in losses(trainer.state.log_history)])
    layers = trainer.student.bert.encoder.layer
    assert all(layer.gradient_checkpointing for layer in layers)
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_official_parity_uses_the_official_optimizer(data, tmp_path):
    trainer = trainer_of(data, tmp_path, models(False), options={"parity": "official"})
    assert isinstance(trainer.create_optimizer(), BertAdam)
    decayed, spared = trainer.optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    assert all("bias" in names[id(p)] or "LayerNorm" in names[id(p)] for p in spared["params"])


@pytest.mark.parametrize("accelerate", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("stage", STAGES)
def test_cached_lessons_train_the_same_student(data, tmp_path, stage, accelerate):
    """Two epochs in other orders, dropout on, the teacher gone."""
    examples, tokenizer = data
    found = []
    for cached in (False, True):
        indexed = examples.add_column("index", list(range(len(examples))))
        trainer = trainer_of(
            (indexed, tokenizer),
            tmp_path / str(cached),
            models(accelerate),
            stage=stage,
            log_steps=1,
        )
        if cached:
            trainer.lessons = LessonCache.build(
                tmp_path / "lessons", trainer.teach_raw, indexed, trainer.data_collator, {},
                batch_size=8,
            )  # fmt: skip
            trainer.teacher = None
        trainer.train()
        found.append([entry["loss"] for entry in losses(trainer.state.log_history)])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_with_lessons_a_config_stands_for_the_teacher(data, tmp_path):
    examples, tokenizer = data
    indexed = examples.add_column("index", list(range(len(examples))))
    student, teacher = models()
    live = trainer_of((indexed, tokenizer), tmp_path, (student, teacher))
    made = live.teach_raw, indexed, live.data_collator, {}
    lessons = LessonCache.build(tmp_path / "lessons", *made, batch_size=8)
    trainer = trainer_of(
        (indexed, tokenizer), tmp_path, (student, teacher.config), options={"lessons": lessons}
    )
    trainer.train()
    assert trainer.state.global_step == 12
    with pytest.raises(ValueError, match="cached lessons do not hold"):
        trainer_of(
            data, tmp_path, models(False), options={"lessons": lessons, "parity": "official"}
        )


@pytest.mark.parametrize("dtype", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("stage", STAGES)
def test_how_much_a_rounded_teacher_changes_the_loss(data, tmp_path, stage, dtype, monkeypatch):
    # Of fp8 the reference runs, as no user is let.
    monkeypatch.setattr("tinybert_fast.training.distill.check_teacher_dtype", lambda *call: None)
    student, exact = models()
    rounded = teacher_module.CONVERT[dtype](copy.deepcopy(exact))
    options = {"teacher_dtype": dtype}
    trainer = trainer_of(data, tmp_path, (student, rounded), stage=stage, options=options)
    changes = trainer.change_of_terms(exact)
    assert changes.keys() == (TERMS if stage == "intermediate" else {"prediction"})
    assert all(0 <= change < 0.1 for change in changes.values())
    assert sum(changes.values()) > 0
    same = trainer_of(data, tmp_path, (student, exact), stage=stage)
    assert not any(same.change_of_terms(exact).values())
    batch = {k: v for k, v in batch_of(data, trainer).items() if k not in ("labels", "layout")}
    said = trainer.teach(batch)
    if stage == "intermediate" and dtype != "int8":  # though the run is in fp32
        assert {q.dtype for q in said.queries.values()} == {torch.bfloat16}


def other(**changes):
    return lambda: (models()[0], models(**changes)[1])


@pytest.mark.parametrize(
    ("pair", "options", "complaint"),
    [
        (models, {"stage": "both"}, "intermediate, prediction; got 'both'"),
        (models, {"parity": "exact"}, "paper, official; got 'exact'"),
        (models, {"teacher_dtype": "fp4"}, "expected one of fp32, bf16, int8, fp8"),
        (models, {"temperature": 0.0}, "must be positive; got 0.0"),
        (models, {"parity": "official"}, r"accelerated student .*restore\(\) it first"),
        (other(vocab_size=99), {}, "25 word pieces and the teacher 99"),
        (other(num_attention_heads=4), {}, "2 heads and the teacher 4; .*num_attention_heads=4"),
        (other(num_labels=3), {"stage": "prediction"}, "2 labels and the teacher 3"),
        (models, {"matches": LayerMatches.parse("0:0,3:4")}, "student layer 3, but .* 2 layers"),
    ],
)
def test_refusals(data, tmp_path, pair, options, complaint):
    options = dict(options)
    stage = options.pop("stage", "intermediate")
    with pytest.raises(ValueError, match=complaint):
        trainer_of(data, tmp_path, pair(), stage=stage, options=options)


def test_any_bert_class_may_learn_in_the_intermediate_stage(data, tmp_path):
    trainer = trainer_of(data, tmp_path, models(cls=BertModel), epochs=1)
    trainer.train()
    assert BertModel.from_pretrained(tmp_path / "checkpoint-6").config.hidden_size == 24
