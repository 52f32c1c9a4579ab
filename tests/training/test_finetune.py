"""Fine-tuning end to end on tiny models: what is learnt, written, resumed and refused."""

import csv
import json

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
    set_seed,
)

from tinybert_fast.data import LengthCollator, Task, encode_examples, load_examples
from tinybert_fast.testing.tiny_models import (
    WORDS,
    sentiment_file,
    sentiment_rows,
    tiny_classifier,
    tiny_encoder,
)
from tinybert_fast.training.common import RunTrainer, training_arguments
from tinybert_fast.training.finetune import finetune
from tinybert_fast.training.loading import check_model_path, load_classifier, load_tokenizer
from tinybert_fast.training.run_folder import checkpoints_in


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An encoder, 60 training sentences and 40 others."""
    folder = tmp_path_factory.mktemp("made")
    tiny_encoder(folder / "encoder")
    sentiment_file(folder / "train.csv", 60, seed=1)
    sentiment_file(folder / "dev.csv", 40, seed=2)
    return folder


def run(made, output, **options):
    """8 batches an epoch, the last one incomplete."""
    recipe = {"epochs": 2, "lr": 3e-3, "batch_size": 8, "max_length": 16, "progress": False}
    files = (made / "encoder", made / "train.csv", made / "dev.csv")
    return finetune(*files, output, **{**recipe, **options})


class StopAt(TrainerCallback):
    """A crash after the given step; at the end of it nothing more is saved."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("accelerate", [False, True], ids=["padded", "packed"])
def test_learns_and_leaves_a_plain_model(made, tmp_path, accelerate):
    metrics = run(made, tmp_path / "out", epochs=10, accelerate=accelerate)
    assert metrics["dev"]["accuracy"] > 0.9
    assert {"f1", "matthews", "loss"} <= metrics["dev"].keys()
    assert metrics["labels"] == ["bad", "good"]
    assert metrics["steps"] == 80
    out = tmp_path / "out"
    names = {file.name for file in out.iterdir()}
    files = {"config.json", "model.safetensors", "tokenizer.json"}
    files |= {"metrics.json", "report.md", "curves.png", "run.json", "logs"}
    assert files <= names
    assert "checkpoints" not in names
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert "dev accuracy" in (out / "report.md").read_text()
    assert list((out / "logs" / "train").glob("events.*"))

    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert type(model).__module__.startswith("transformers.")
    assert model.config.label2id == {"bad": 0, "good": 1}
    assert model.config.problem_type == "single_label_classification"
    tokenizer = AutoTokenizer.from_pretrained(out)
    logits = model(**tokenizer("the film was awful", return_tensors="pt")).logits
    assert model.config.id2label[logits.argmax().item()] == "bad"


def test_regression_on_pairs(made, tmp_path):
    for name, rows, seed in (("train", 160, 1), ("dev", 40, 2)):
        first, second = sentiment_rows(rows, seed), sentiment_rows(rows, seed + 10)
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("sentence1", "sentence2", "score"))
            for (a, one), (b, other) in zip(first, second):
                table.writerow((a, b, 2.5 * (one == "good") + 2.5 * (other == "good")))
    metrics = finetune(
        made / "encoder",
        tmp_path / "train.csv",
        tmp_path / "dev.csv",
        tmp_path / "out",
        epochs=12,
        lr=5e-3,
        batch_size=16,
        accelerate=False,
        progress=False,
    )
    assert metrics["task"] == "regression"
    assert metrics["selected_by"] == "pearson_spearman"
    assert metrics["dev"]["pearson"] > 0.7
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert (config.num_labels, config.problem_type) == (1, "regression")


def test_the_best_checkpoint_is_the_one_that_is_kept(made, tmp_path):
    scored = {}

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, model=None, **kwargs):
            if "eval_loss" in metrics:
                kept = {name: value.clone() for name, value in model.state_dict().items()}
                scored[state.global_step] = (metrics["eval_loss"], kept)

    options = {"lr": 0.05, "eval_steps": 3, "epochs": 3, "select_by": "loss"}
    metrics = run(made, tmp_path / "out", accelerate=False, callbacks=[Watch()], **options)
    best = min(scored, key=lambda step: scored[step][0])
    assert sorted(scored)[:2] == [3, 6]
    assert metrics["best_step"] == best < metrics["steps"]  # this learning rate ends in a bad place
    saved = weights(tmp_path / "out")
    assert all(torch.equal(saved[name], scored[best][1][name]) for name in saved)


def test_without_a_dev_file_the_last_weights_are_kept(made, tmp_path):
    metrics = finetune(
        made / "encoder",
        made / "train.csv",
        None,
        tmp_path / "out",
        epochs=1,
        accelerate=False,
        progress=False,
        keep_checkpoints=True,
    )
    assert "dev" not in metrics
    assert_same_weights(tmp_path / "out", checkpoints_in(tmp_path / "out/checkpoints/train")[-1])


def test_the_positive_class_of_a_folder_is_its_second(made, tmp_path):
    """F1 is of class 1: MRPC's is `equivalent`, which the alphabet puts first."""
    names = ["not_equivalent", "equivalent"]
    rows = [(text, int(label == "good")) for text, label in sentiment_rows(40)]
    features = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=names)}
    columns = dict(zip(features, map(list, zip(*rows))))
    folder = tmp_path / "mrpc"
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(folder)
    metrics = finetune(
        made / "encoder", folder, folder, tmp_path / "out", epochs=1, max_length=16, progress=False
    )
    assert metrics["labels"] == names
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert config.id2label == dict(enumerate(names))


def test_how_often_to_log_and_save_without_a_dev_file(made, tmp_path):
    seen = {"log": [], "save": []}

    class Seen(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                seen["log"].append((state.global_step, logs["learning_rate"]))

        def on_save(self, args, state, control, **kwargs):
            seen["save"].append(state.global_step)

    files = made / "encoder", made / "train.csv", None, tmp_path / "out"
    often = {"log_steps": 3, "checkpoint_steps": 5, "schedule": "constant", "lr": 1e-3}
    finetune(*files, epochs=1, batch_size=8, progress=False, callbacks=[Seen()], **often)
    assert seen == {"log": [(3, 1e-3), (6, 1e-3)], "save": [5, 8]}
    with pytest.raises(ValueError, match="checkpoint_steps is 5, but a checkpoint follows each ev"):
        run(made, tmp_path / "dev", checkpoint_steps=5)


# ---- resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stop", "accelerate", "options"),
    [
        (6, False, {}),  # before the first checkpoint: from the beginning
        (11, True, {}),  # a checkpoint between two epochs
        (14, False, {"eval_steps": 5}),  # a checkpoint in the middle of the second epoch
        (14, True, {"eval_steps": 5}),
        (6, True, {"eval_steps": 3, "accumulation": 2}),
    ],
    ids=["start", "epoch", "middle-padded", "middle", "accumulation"],
)
def test_resumed_equals_uninterrupted(made, tmp_path, accelerate, stop, options):
    options = {"accelerate": accelerate, "select_by": "loss", **options}
    whole = run(made, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "parts", callbacks=[StopAt(stop)], **options)
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    torch.rand(7)  # another process would not have this state either
    parts = run(made, tmp_path / "parts", resume=True, **options)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert parts["dev"] == whole["dev"]
    assert parts["best_step"] == whole["best_step"]


def test_seconds_before_an_interruption_count(made, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "out", callbacks=[StopAt(11)])
    file = tmp_path / "out" / "run.json"
    kept = json.loads(file.read_text())
    assert 0 < kept["seconds"]["train"] < 1000
    file.write_text(json.dumps({**kept, "seconds": {"train": 1000}}))
    metrics = run(made, tmp_path / "out", resume=True)
    assert 1000 < metrics["train_seconds"] < 2000
    assert metrics["train_loss"] is None  # Trainer's covers the steps since the restart alone
    assert "train loss" not in (tmp_path / "out" / "report.md").read_text()


def test_resuming_wants_the_same_weights(made, tmp_path):
    encoder = tiny_encoder(tmp_path / "encoder")
    files = encoder, made / "train.csv", None, tmp_path / "out"
    options = {"epochs": 1, "max_length": 16, "progress": False}
    metrics = finetune(*files, **options)
    with pytest.raises(ValueError, match="accelerate was True, now False"):
        finetune(*files, **options, resume=True, accelerate=False)
    with pytest.raises(ValueError, match="impl was 'auto', now 'reference'"):
        finetune(*files, **options, resume=True, impl="reference")
    assert finetune(*files, **options, resume=True) == metrics
    tiny_encoder(encoder, seed=1)
    with pytest.raises(ValueError, match="model_weights was "):
        finetune(*files, **options, resume=True)
    (encoder / "tokenizer.json").unlink()
    tiny_encoder(encoder, seed=1, words=(*WORDS[:5], *WORDS[:4:-1]))
    with pytest.raises(ValueError, match="tokenizer was "):
        finetune(*files, **options, resume=True)


def test_resuming_a_finished_run_returns_its_metrics(made, tmp_path, monkeypatch):
    metrics = run(made, tmp_path / "out", epochs=1, accelerate=False)
    before = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    with monkeypatch.context() as patch:  # at once
        for name in ("encode_examples", "load_classifier"):
            patch.delattr(f"tinybert_fast.training.finetune.{name}")
        assert run(made, tmp_path / "out", epochs=1, accelerate=False, resume=True) == metrics
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="epochs was 1, now 2"):
        run(made, tmp_path / "out", epochs=2, accelerate=False, resume=True)
    with pytest.raises(FileExistsError, match="already holds a model"):
        run(made, tmp_path / "out", epochs=1, accelerate=False)
    run(made, tmp_path / "out", epochs=1, accelerate=False, overwrite=True, seed=1)
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns != before


def test_truncated_checkpoint_is_named(made, tmp_path):
    options = {"accelerate": False, "eval_steps": 3}
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "out", callbacks=[StopAt(8)], **options)
    file = tmp_path / "out/checkpoints/train/checkpoint-6/model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint-6.model.safetensors is truncated"):
        run(made, tmp_path / "out", resume=True, **options)


# ---- a loss that is no number --------------------------------------------------------------------


class Poison(TrainerCallback):
    """Before the given step: a weight that makes the loss, or the gradient, NaN."""

    def __init__(self, step, where):
        self.step, self.where = step, where

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1 and self.where == "loss":
            model.classifier.bias.data[0] = float("nan")

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step - 1 and self.where == "gradient":
            model.classifier.bias.grad[0] = float("inf")


@pytest.mark.parametrize(
    ("where", "step", "kept", "said"),
    [
        ("loss", 7, 6, "the loss is NaN or infinite at step 7 of 16"),
        ("gradient", 6, 3, "a weight is NaN or infinite after step 6 of 16"),  # before it is saved
    ],
)
def test_stops_and_keeps_the_last_good_checkpoint(made, tmp_path, where, step, kept, said):
    options = {"eval_steps": 3, "callbacks": [Poison(step, where)], "accelerate": False}
    with pytest.raises(ValueError, match=f"{said}.*checkpoint-{kept}") as raised:
        run(made, tmp_path / "out", **options)
    assert "lower learning rate" in str(raised.value)
    folders = checkpoints_in(tmp_path / "out/checkpoints/train")
    assert folders[-1].name == f"checkpoint-{kept}"
    assert all(value.isfinite().all() for folder in folders for value in weights(folder).values())
    assert not (tmp_path / "out" / "model.safetensors").exists()


# ---- the trainer ---------------------------------------------------------------------------------


def gradients(made, folder, batch_size, accumulation, rows):
    """Gradients of the first optimizer step."""
    taken = {}

    class Take(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 0:
                taken.update({name: p.grad.clone() for name, p in model.named_parameters()})

    examples = load_examples(made / "train.csv").select(range(rows))
    task, tokenizer = Task.of(examples), load_tokenizer(made / "encoder")
    set_seed(0)
    model = load_classifier(made / "encoder", task)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_probs_dropout_prob = 0.0
    for layer in model.bert.encoder.layer:
        layer.attention.self.dropout.p = 0.0
    arguments = training_arguments(
        folder,
        batch_size=batch_size,
        accumulation=accumulation,
        max_steps=1,
        evaluate=False,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    trainer = RunTrainer(
        model=model,
        args=arguments,
        train_dataset=encode_examples(examples, tokenizer, task, 16),
        data_collator=LengthCollator(tokenizer),
        callbacks=[Take()],
        progress=False,
    )
    trainer.train()
    return taken


@pytest.mark.parametrize("rows", [60, 13])  # whole micro-batches; the last one of a single text
def test_accumulated_gradients_equal_those_of_the_large_batch(made, tmp_path, rows):
    small, large = (gradients(made, tmp_path, *how, rows) for how in ((4, 4), (16, 1)))
    for name, value in large.items():
        torch.testing.assert_close(small[name], value, rtol=1e-4, atol=1e-6)


def test_bf16(made, tmp_path):
    metrics = run(made, tmp_path / "out", epochs=1, bf16=True, accelerate=False)
    assert weights(tmp_path / "out")["classifier.bias"].dtype == torch.float32
    assert 0 < metrics["dev"]["loss"] < 2


# ---- refusals ------------------------------------------------------------------------------------


def test_refusals_leave_nothing_behind(made, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FileNotFoundError, match="expected a Transformers model folder"):
        finetune(tmp_path / "none", made / "train.csv", made / "dev.csv", out)
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        finetune(tmp_path, made / "train.csv", made / "dev.csv", out)
    with pytest.raises(FileNotFoundError, match=r"dev2.csv does not exist"):
        finetune(made / "encoder", made / "train.csv", made / "dev2.csv", out)
    with pytest.raises(ValueError, match="select_by is 'f2'; this task has accuracy"):
        run(made, out, select_by="f2")
    with pytest.raises(ValueError, match="select_by is 'loss', but there is no dev file"):
        finetune(made / "encoder", made / "train.csv", None, out, select_by="loss")
    for name in ("batch_size", "eval_steps", "max_length"):
        with pytest.raises(ValueError, match=f"{name} is 0; expected"):
            run(made, out, **{name: 0}, accelerate=False)
    with pytest.raises(ValueError, match="eval_steps is for a dev file, and there is none"):
        finetune(made / "encoder", made / "train.csv", None, out, eval_steps=5)
    unseen = tmp_path / "unseen.csv"
    unseen.write_text("text,label\na film,good\na film,fair\n")
    with pytest.raises(ValueError, match=r"unseen.csv: row 2 has the label 'fair', never seen"):
        finetune(made / "encoder", made / "train.csv", unseen, out)
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("sentence1,sentence2,label\na film,a story,good\n")
    with pytest.raises(ValueError, match=r"pairs.csv: the training file holds single texts"):
        finetune(made / "encoder", made / "train.csv", pairs, out)
    assert not out.exists()


def test_damaged_weights_are_refused(made, tmp_path):
    folder = tiny_encoder(tmp_path / "encoder")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:5000])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_classifier(folder, Task(labels=("a", "b")))
    file.write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"does not hold the weights its config.json asks for: 16"):
        load_classifier(folder, Task(labels=("a", "b")))


def test_what_is_no_model_is_refused_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for path in ("teacher", "models/teacher", "./teacher", "/teacher", "a/b/teacher"):
        with pytest.raises(FileNotFoundError, match="is no folder"):
            load_classifier(path)
    folder = tiny_encoder(tmp_path / "encoder")
    for name in ("tokenizer.json", "config.json"):
        content = (folder / name).read_text()
        (folder / name).write_text(content[:100])
        with pytest.raises(ValueError, match="JSON"):
            load_tokenizer(folder)
        (folder / name).write_text(content)


def test_a_name_of_the_hub_goes_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert check_model_path("google-bert/bert-base-uncased") == "google-bert/bert-base-uncased"


def test_a_head_outlives_the_absence_of_a_class(made, tmp_path):
    start = tiny_classifier(tmp_path / "start", ("bad", "so-so", "good"))
    options = {"lr": 0.0, "epochs": 1, "max_length": 16, "progress": False}
    metrics = finetune(start, made / "train.csv", None, tmp_path / "out", **options)
    assert metrics["labels"] == ["bad", "so-so", "good"]
    assert_same_weights(start, tmp_path / "out")


def test_classifier_head_is_kept_or_replaced(tmp_path, caplog):
    folder = tiny_classifier(tmp_path / "model", ("no", "yes", "maybe"))
    head = load_classifier(folder).classifier.weight
    same = load_classifier(folder, Task(labels=("no", "yes", "maybe")))
    assert torch.equal(same.classifier.weight, head)
    assert not caplog.messages
    other = load_classifier(folder, Task(labels=("a", "b")))
    assert other.classifier.weight.shape == (2, 24)
    assert other.config.id2label == {0: "a", 1: "b"}
    said = f"the head of {folder} is for other classes; a new one takes its place"
    assert caplog.messages == [said]
    with pytest.raises(ValueError, match="no trained classification head"):
        load_classifier(tiny_encoder(tmp_path / "encoder"))
