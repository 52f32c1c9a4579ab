"""General and task distillation end to end on tiny models: learnt, written, resumed, refused."""

import csv
import io
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    TrainerCallback,
)

from tinybert_fast.data import load_examples
from tinybert_fast.testing.tiny_models import (
    WORDS,
    sentiment_file,
    sentiment_rows,
    tiny_classifier,
    tiny_config,
    tiny_encoder,
    tiny_tokenizer,
)
from tinybert_fast.training import (
    general_distillation,
    run_folder,
    task_distillation,
    teaching,
)
from tinybert_fast.training.evaluate import evaluate
from tinybert_fast.training.finetune import finetune
from tinybert_fast.training.projection import HiddenProjection
from tinybert_fast.training.recipe_parts import check_batches
from tinybert_fast.training.recipes import distill_general, distill_task

TEACHER = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64}
STUDENT = tiny_config()  # 2 x 24
TRAIN, DEV = 60, 40


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A fine-tuned teacher, its encoder before that, 60 + 40 sentences, and 90 without labels."""
    folder = tmp_path_factory.mktemp("made")
    tiny_encoder(folder / "encoder", **TEACHER)
    sentiment_file(folder / "train.csv", TRAIN, seed=1)
    sentiment_file(folder / "dev.csv", DEV, seed=2)
    lines = [text for text, _ in sentiment_rows(90, seed=3)]
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n")
    with (folder / "augmented.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("sentence",), *([line] for line in lines)])
    scores = finetune(
        folder / "encoder",
        folder / "train.csv",
        folder / "dev.csv",
        folder / "teacher",
        epochs=12,
        lr=3e-3,
        batch_size=8,
        max_length=16,
        progress=False,
    )
    assert scores["dev"]["accuracy"] > 0.9
    return folder


@pytest.fixture(scope="module")
def distilled(made, tmp_path_factory):
    """A general and, from it, a task distillation, with the metrics of both."""
    folder = tmp_path_factory.mktemp("distilled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "plot", lambda panels: b"")
        general_metrics = general(made, folder / "general", epochs=6, init="pca")
        options = {"intermediate_epochs": 6, "prediction_epochs": 6}
        task_metrics = task(made, folder / "task", folder / "general", **options)
    return folder, general_metrics, task_metrics


@pytest.fixture(autouse=True)
def plots(request, monkeypatch):
    """Drawing takes longer than these runs: one test looks at the picture."""
    if "curves" not in request.node.name:
        monkeypatch.setattr(run_folder, "plot", lambda panels: b"")


def general(made, output, student=STUDENT, **options):
    recipe = {"epochs": 2, "lr": 3e-3, "batch_size": 16, "max_length": 16, "progress": False}
    files = made / "encoder", student, made / "corpus.txt"
    return distill_general(*files, output, **{**recipe, **options})


def task(made, output, student=STUDENT, dev="dev.csv", **options):
    recipe = {
        "intermediate_epochs": 2,
        "intermediate_lr": 3e-3,
        "prediction_epochs": 2,
        "prediction_lr": 3e-3,
        "batch_size": 8,
        "eval_steps": 4,
        "max_length": 16,
        "progress": False,
    }
    files = student, made / "train.csv", dev and made / dev
    return distill_task(made / "teacher", *files, output, **{**recipe, **options})


class StopAt(TrainerCallback):
    """A crash at the nth optimizer step of the whole run, its stages counted together."""

    def __init__(self, step):
        self.left = step

    def on_step_end(self, args, state, control, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def assert_same_weights(one, other, name="model.safetensors"):
    one, other = load_file(one / name), load_file(other / name)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


def names(folder):
    return {file.name for file in folder.iterdir()}


FILES = {"config.json", "model.safetensors", "tokenizer.json", "run.json", "logs"}
FILES |= {"metrics.json", "report.md", "curves.png"}


def test_general_distillation(distilled):
    folder, metrics, _ = distilled
    out = folder / "general"
    assert (metrics["sentences"], metrics["steps"]) == (90, 36)
    terms = {"loss", "embedding_loss", "hidden_1_loss", "hidden_2_loss"}
    assert metrics["losses"].keys() == terms | {"attention_1_loss", "attention_2_loss"}
    assert metrics["losses"]["loss"]["last"] < metrics["losses"]["loss"]["first"]
    assert json.loads((out / "metrics.json").read_text()) == metrics
    assert names(out) >= FILES | {"projection.safetensors"}
    assert "checkpoints" not in names(out)
    report = (out / "report.md").read_text()
    for words in ("attention_2_loss", "| matches | 0:0,1:2,2:4 |", "projection.safetensors"):
        assert words in report
    assert list((out / "logs" / "general").glob("events.*"))


def test_curves_are_drawn(made, tmp_path):
    general(made, tmp_path, steps=2, log_steps=1)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_written_is_a_plain_bert(distilled, tmp_path):
    folder, *_ = distilled
    config = json.loads((folder / "general" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("bert", ["BertModel"])
    config = json.loads((folder / "task" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "bad", "1": "good"}
    script = (
        "import sys; from transformers import AutoModel, AutoModelForSequenceClassification\n"
        "AutoModel.from_pretrained(sys.argv[1])\n"
        "model, info = AutoModelForSequenceClassification.from_pretrained("
        "sys.argv[2], output_loading_info=True)\n"
        "assert not info['missing_keys'], info\n"
        "assert 'tinybert_fast' not in sys.modules"
    )
    folders = [str(folder / name) for name in ("general", "task")]
    subprocess.run([sys.executable, "-c", script, *folders], check=True, cwd=tmp_path)


def test_corpus_may_be_a_list_of_sentences(made, tmp_path):
    lines = [text for text, _ in sentiment_rows(90, seed=3)]
    for name, corpus in (("file", made / "corpus.txt"), ("list", lines)):
        distill_general(
            made / "encoder",
            STUDENT,
            corpus,
            tmp_path / name,
            steps=3,
            batch_size=16,
            progress=False,
        )
    assert_same_weights(tmp_path / "file", tmp_path / "list")


def test_task_distillation(distilled):
    folder, _, metrics = distilled
    out = folder / "task"
    assert metrics["teacher_dev"]["accuracy"] > 0.9
    assert metrics["dev"]["accuracy"] > 0.9
    assert (metrics["intermediate"]["steps"], metrics["prediction"]["steps"]) == (48, 48)
    losses = metrics["intermediate"]["losses"]
    assert losses["loss"]["last"] < losses["loss"]["first"]
    losses = metrics["prediction"]["losses"]
    assert losses["prediction_loss"]["last"] < losses["prediction_loss"]["first"]
    assert metrics["best_step"] % 4 == 0
    assert names(out) >= FILES
    assert not names(out) & {"checkpoints", "projection.safetensors"}
    assert names(out / "intermediate") >= {"config.json", "projection.safetensors"}
    report = (out / "report.md").read_text()
    assert "| accuracy |" in report
    assert f"| loss |  | {metrics['dev']['loss']:.4g} |" in report  # the teacher's is not taken


def test_the_projection_goes_on_where_it_was(made, distilled, tmp_path):
    folder, *_ = distilled
    still = {"intermediate_lr": 0.0, "weight_decay": 0.0, "intermediate_epochs": 1}
    task(made, tmp_path, folder / "general", accelerate=False, **still)
    assert_same_weights(folder / "general", tmp_path / "intermediate", "projection.safetensors")


def test_dev_score_is_that_of_the_saved_model(made, tmp_path):
    metrics = task(made, tmp_path / "out", intermediate_epochs=0, prediction_epochs=6)
    assert "intermediate" not in metrics
    assert "intermediate" not in names(tmp_path / "out")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    rows = sentiment_rows(DEV, seed=2)
    batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        predicted = model(**batch).logits.argmax(-1)
    right = [model.config.id2label[int(p)] == label for p, (_, label) in zip(predicted, rows)]
    assert metrics["dev"]["accuracy"] == pytest.approx(sum(right) / len(right))


def test_dev_is_looked_at_after_the_last_step_whatever_its_interval(made, tmp_path):
    metrics = task(made, tmp_path, intermediate_epochs=0, eval_steps=500)
    assert metrics["best_step"] == metrics["prediction"]["steps"] == 16
    assert json.loads((tmp_path / "run.json").read_text())["settings"]["eval_steps"] == 500


def test_without_dev_the_second_stage_saves_as_often_as_the_first(made, tmp_path):
    rates, saved = {}, []

    class Seen(TrainerCallback):
        def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
            rates.setdefault(Path(args.output_dir).name, []).append(lr_scheduler.get_last_lr()[0])

        def on_save(self, args, state, control, **kwargs):
            saved.append((Path(args.output_dir).name, state.global_step))

    often = {"intermediate_epochs": 1, "prediction_epochs": 1, "checkpoint_steps": 3}
    options = {"prediction_schedule": "constant", "callbacks": [Seen()], **often}
    task(made, tmp_path, dev=None, **options)
    stages = ("intermediate", "prediction")
    assert saved == [(stage, step) for stage in stages for step in (3, 6, 8)]
    assert set(rates["prediction"]) == {3e-3}


def test_augmented_texts_need_no_labels(made, tmp_path):
    steps = {}
    for name, options in (
        ("both", {}),
        ("first", {"augmented_prediction": False}),
    ):
        options = {"augmented": made / "augmented.csv", "accelerate": False, **options}
        metrics = task(made, tmp_path / name, **options)
        steps[name] = metrics["intermediate"]["steps"], metrics["prediction"]["steps"]
    assert steps == {"both": (24, 24), "first": (24, 16)}  # 12 batches an epoch, or 8


def test_labels_of_the_texts_to_learn_are_not_read(made, tmp_path):
    """Of the training file nor of the augmented one: a class that nobody knows, and none."""
    texts = [text for text, _ in sentiment_rows(TRAIN, seed=1)]
    for name, label in (("odd", "neutral"), ("empty", "")):
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("sentence", "label"), *((text, label) for text in texts)])
    files = tmp_path / "odd.csv", made / "dev.csv", tmp_path / "out"
    options = {"augmented": tmp_path / "empty.csv", "intermediate_epochs": 1, "batch_size": 8}
    options |= {"prediction_epochs": 1, "max_length": 16, "progress": False}
    metrics = distill_task(made / "teacher", STUDENT, *files, **options)
    assert metrics["labels"] == ["bad", "good"]


def test_regression_learns_the_teachers_scores(tmp_path):
    torch.manual_seed(0)
    teacher = tmp_path / "teacher"
    tiny_tokenizer(teacher)
    fields = {"num_labels": 1, "problem_type": "regression", "initializer_range": 0.2}
    BertForSequenceClassification(tiny_config(**TEACHER, **fields)).save_pretrained(teacher)
    for name, seed in (("train", 1), ("dev", 2)):
        pairs = zip(sentiment_rows(40, seed=seed), sentiment_rows(40, seed=seed + 10))
        rows = [(a, b, f"{at % 5}.5") for at, ((a, _), (b, _)) in enumerate(pairs)]
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("sentence1", "sentence2", "score"), *rows])
    metrics = distill_task(
        teacher,
        STUDENT,
        tmp_path / "train.csv",
        tmp_path / "dev.csv",
        tmp_path / "out",
        intermediate_epochs=1,
        prediction_epochs=8,
        prediction_lr=3e-3,
        batch_size=8,
        augmented=tmp_path / "train.csv",
        accelerate=False,
        progress=False,
        max_length=32,
    )
    assert metrics["selected_by"] == "pearson_spearman"
    losses = metrics["prediction"]["losses"]["prediction_loss"]
    assert losses["last"] < 0.7 * losses["first"]


def test_minilm_runs_both_recipes(made, tmp_path):
    """Layer 3 of 4, of 2 heads, teaches a student of 3 heads by 4 relation heads; resumed,
    reported, and no projection anywhere.
    """
    student = tiny_config(num_attention_heads=3, num_hidden_layers=3)
    matched = {"loss": "minilm", "relations": "qk,vv", "relation_heads": 4, "teacher_layer": 3}
    options = {"student": student, "checkpoint_steps": 4, "log_steps": 4, **matched}
    whole = general(made, tmp_path / "general", epochs=4, **options)
    terms = {"loss", "relation_qk_loss", "relation_vv_loss"}
    assert whole["losses"].keys() == terms
    for term in terms:
        assert whole["losses"][term]["last"] < whole["losses"][term]["first"]
    out = tmp_path / "general"
    assert names(out) >= FILES
    assert "projection.safetensors" not in names(out)
    settings = json.loads((out / "run.json").read_text())["settings"]
    assert {name: settings[name] for name in matched} == matched
    assert "matches" not in settings
    assert "shared_projection" not in settings
    report = (out / "report.md").read_text()
    assert "| relations | qk,vv |" in report
    assert "| relation_heads | 4 |" in report
    assert "projection" not in report

    with pytest.raises(KeyboardInterrupt):
        general(made, tmp_path / "parts", epochs=4, callbacks=[StopAt(9)], **options)
    other = {**options, "relation_heads": 2}
    with pytest.raises(ValueError, match=r"other settings \(relation_heads was 4, now 2\)"):
        general(made, tmp_path / "parts", epochs=4, resume=True, **other)
    general(made, tmp_path / "parts", epochs=4, resume=True, **options)
    assert_same_weights(out, tmp_path / "parts")

    metrics = task(made, tmp_path / "task", out, **matched)
    assert metrics["intermediate"]["losses"].keys() == terms
    assert metrics["prediction"]["losses"].keys() == {"loss", "prediction_loss"}
    assert not (tmp_path / "task" / "intermediate" / "projection.safetensors").exists()


def test_official_parity_runs_both_recipes(made, tmp_path):
    """Padded to the full length, the last incomplete batch dropped: 5 of 90 / 16, 7 of 60 / 8."""
    metrics = general(made, tmp_path / "general", parity="official", bf16=True)
    assert metrics["steps"] == 10
    metrics = task(made, tmp_path / "task", tmp_path / "general", parity="official")
    assert (metrics["intermediate"]["steps"], metrics["prediction"]["steps"]) == (14, 14)


def test_official_parity_leaves_no_dev_text_out(made, tmp_path):
    """40 of them in evaluation batches of 64, the training's last batch of 28 left out."""
    recipe = {"parity": "official", "intermediate_epochs": 0, "prediction_epochs": 1}
    metrics = task(made, tmp_path / "task", batch_size=32, **recipe)
    assert metrics["prediction"]["steps"] == 1
    scores = evaluate(tmp_path / "task", made / "dev.csv", max_length=16, progress=False)
    for name in ("accuracy", "f1", "matthews"):
        assert metrics["dev"][name] == pytest.approx(scores[name])


def test_official_batches_are_those_of_all_processes():
    arguments = SimpleNamespace(train_batch_size=8, world_size=3)
    check_batches(24, arguments, "official")
    check_batches(1, arguments, "paper")
    with pytest.raises(ValueError, match=r"23 texts do not fill one of 24 \(batch size x proc"):
        check_batches(23, arguments, "official")


def test_general_resume_ends_with_the_same_bits(made, tmp_path):
    options = {"checkpoint_steps": 4, "init": "pca", "log_steps": 4, "accelerate": False}
    whole = general(made, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        general(made, tmp_path / "parts", callbacks=[StopAt(9)], **options)
    assert not (tmp_path / "parts" / "config.json").exists()
    with pytest.raises(FileExistsError, match="--resume"):
        general(made, tmp_path / "parts", **options)
    with pytest.raises(ValueError, match=r"other settings \(lr was 0.003, now 0.1\)"):
        general(made, tmp_path / "parts", resume=True, **{**options, "lr": 0.1})
    resumed = general(made, tmp_path / "parts", resume=True, **options)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert_same_weights(tmp_path / "whole", tmp_path / "parts", "projection.safetensors")
    assert resumed["losses"] == whole["losses"]
    assert general(made, tmp_path / "parts", resume=True, **options) == resumed  # nothing to do


def test_a_run_that_has_taken_its_last_step_takes_no_other(made, tmp_path, monkeypatch):
    """4 steps of 6 in an epoch; the disk is full when the model is to be written."""
    options = {"steps": 4, "checkpoint_steps": 4, "schedule": "constant"}
    whole = general(made, tmp_path / "whole", **options)

    def full(*arguments, **more):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.RunFolder, "save_model", full)
        with pytest.raises(OSError, match="No space"):
            general(made, tmp_path / "parts", **options)
    resumed = general(made, tmp_path / "parts", resume=True, **options)
    assert resumed["steps"] == whole["steps"] == 4
    assert resumed["losses"] == whole["losses"]
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_resumed_run_logs_and_saves_as_often_as_it_is_told_to_now(made, tmp_path):
    seen = {"log": [], "save": []}

    class Seen(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                seen["log"].append(state.global_step)

        def on_save(self, args, state, control, **kwargs):
            seen["save"].append(state.global_step)

    with pytest.raises(KeyboardInterrupt):
        general(made, tmp_path, checkpoint_steps=4, log_steps=4, callbacks=[StopAt(6)])
    general(made, tmp_path, checkpoint_steps=3, log_steps=2, callbacks=[Seen()], resume=True)
    assert seen == {"log": [6, 8, 10, 12], "save": [6, 9, 12]}


@pytest.mark.parametrize("stop", [10, 16, 24], ids=["stage_a", "between", "stage_b"])
def test_task_resume_ends_with_the_same_bits(made, tmp_path, stop):
    """16 steps in each stage; dropout on; the best student of stage B is kept over the crash."""
    options = {"checkpoint_steps": 4, "eval_steps": 3, "log_steps": 3, "accelerate": False}
    whole = task(made, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        task(made, tmp_path / "parts", callbacks=[StopAt(stop)], **options)
    resumed = task(made, tmp_path / "parts", resume=True, **options)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    assert_same_weights(tmp_path / "whole" / "intermediate", tmp_path / "parts" / "intermediate")
    for name in ("dev", "best_step"):
        assert resumed[name] == whole[name]
    assert resumed["prediction"]["losses"] == whole["prediction"]["losses"]


@pytest.mark.parametrize("recipe", ["general", "task"])
def test_resuming_wants_the_same_weights(made, tmp_path, monkeypatch, recipe):
    """And answers without a model or a text in memory if the run is finished."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"

    def make(seed=0):
        (tiny_classifier if recipe == "task" else tiny_encoder)(teacher, seed=seed, **TEACHER)
        tiny_encoder(student, seed=seed)

    def run(**options):
        options = {"max_length": 16, "progress": False, **options}
        if recipe == "general":
            options |= {"steps": 1}
            return distill_general(
                teacher, student, made / "corpus.txt", tmp_path / "out", **options
            )
        options |= {"intermediate_epochs": 0, "prediction_epochs": 1}
        return distill_task(teacher, student, made / "train.csv", None, tmp_path / "out", **options)

    make()
    metrics = run()
    module = {"general": general_distillation, "task": task_distillation}[recipe]
    with monkeypatch.context() as patch:
        for name in ("load_encoder", "load_classifier", "encode_lines", "encode_examples"):
            patch.delattr(module, name, raising=False)
        assert run(resume=True) == metrics
    with pytest.raises(ValueError, match=r"accelerate was True, now False; impl was 'auto'"):
        run(resume=True, accelerate=False, impl="reference")
    make(seed=1)
    with pytest.raises(ValueError, match=r"teacher_weights was .*; student_weights was "):
        run(resume=True)


def test_cached_lessons_teach_the_same(made, tmp_path, caplog):
    """Augmented texts in both stages; the folder goes with the checkpoints, or stays if named."""
    caplog.set_level("INFO", logger="tinybert_fast")
    live = task(made, tmp_path / "live", augmented=made / "augmented.csv")
    cached = task(made, tmp_path / "cached", augmented=made / "augmented.csv", cache_teacher=True)
    assert "asking the teacher about 90 examples once: " in caplog.text
    assert not (tmp_path / "cached" / "checkpoints").exists()
    for stage in ("intermediate", "prediction"):
        for term, value in live[stage]["losses"].items():
            assert cached[stage]["losses"][term] == pytest.approx(value, rel=1e-4)
    assert cached["dev"] == pytest.approx(live["dev"], rel=1e-4)
    assert "teacher_change" not in cached
    for _ in range(2):
        kept = general(made, tmp_path / "out", cache_teacher=tmp_path / "kept", overwrite=True)
    assert names(tmp_path / "kept" / "general") >= {"lessons.json", "00000.safetensors"}
    assert kept["losses"]["loss"]["last"] == pytest.approx(
        general(made, tmp_path / "again")["losses"]["loss"]["last"], rel=1e-4
    )
    with pytest.raises(ValueError, match=r"max length was 16, now 12\); remove .*kept/general"):
        general(made, tmp_path / "other", cache_teacher=tmp_path / "kept", max_length=12)


@pytest.mark.parametrize(
    ("recipe", "too_fast", "warned"),
    [
        (partial(general, cache_teacher=True), ("cpu",), 1),
        (partial(general, cache_teacher=True), ("cuda",), 0),
        (partial(general), ("cpu",), 0),
        (partial(task, cache_teacher=True, intermediate_epochs=0), ("cpu",), 0),
    ],
    ids=["layers", "slow device", "live", "logits"],
)
def test_lessons_of_layers_are_for_cpus(
    made, tmp_path, monkeypatch, caplog, recipe, too_fast, warned
):
    monkeypatch.setattr(teaching, "TOO_FAST", too_fast)
    recipe(made, tmp_path / "out")
    said = [one for one in caplog.records if "leave cache_teacher out" in one.message]
    assert len(said) == warned


@pytest.mark.parametrize(("recipe", "stop"), [("general", 9), ("task", 10), ("task", 24)])
def test_a_run_with_cached_lessons_resumes_without_its_teacher(
    made, tmp_path, monkeypatch, recipe, stop
):
    """The same bits, whatever the student had started from."""
    options = {"checkpoint_steps": 4, "cache_teacher": True, "init": "pca"}
    options |= {"eval_steps": 3, "accelerate": False} if recipe == "task" else {}
    run, module = {
        "general": (general, general_distillation), "task": (task, task_distillation)
    }[recipe]  # fmt: skip
    whole = run(made, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "parts", callbacks=[StopAt(stop)], **options)
    loaded = []

    def spied(load, path, *task):
        loaded.append(Path(path).name)
        return load(path, *task)

    for name in {"load_encoder", "load_classifier"} & vars(module).keys():
        monkeypatch.setattr(module, name, partial(spied, getattr(module, name)))
    resumed = run(made, tmp_path / "parts", resume=True, **options)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    teacher = "encoder" if recipe == "general" else "teacher"
    assert loaded.count(teacher) == (stop == 10)  # the prediction stage had no lessons yet
    for name in ("teacher_parameters", "teacher_dev"):
        assert resumed.get(name) == whole.get(name)


def test_what_rounding_the_teacher_costs_is_reported(made, tmp_path):
    metrics = task(
        made, tmp_path / "int8", teacher_dtype="int8", cache_teacher=True, cache_dtype="bf16"
    )
    assert metrics["teacher_change"].keys() == {"intermediate", "prediction"}
    changes = metrics["teacher_change"]["intermediate"]
    assert changes.keys() == {
        "embedding", "hidden_1", "hidden_2", "attention_1", "attention_2"
    }  # fmt: skip
    assert all(0 <= value < 0.1 for value in changes.values())
    assert any(changes.values())
    assert json.loads((tmp_path / "int8" / "metrics.json").read_text()) == metrics
    report = (tmp_path / "int8" / "report.md").read_text()
    assert "Loss by the teacher's rounding, intermediate stage" in report
    assert metrics["dev"]["accuracy"] > 0.5
    bf16 = general(made, tmp_path / "bf16", teacher_dtype="bf16", steps=2)
    assert any(bf16["teacher_change"].values())


def test_a_terminal_sees_the_corpus_being_encoded(made, tmp_path, monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, _environ={})
    monkeypatch.setattr("tinybert_fast.data.progress.Console", lambda **_: terminal)
    general(made, tmp_path / "out", steps=1, progress=True)
    for words in ("reading the corpus", "encoding the corpus"):
        assert words in screen.getvalue()


def test_students_may_be_named_in_every_way(made, tmp_path):
    """A config file, a folder with a config alone, a preset that takes over the vocabulary."""
    (tmp_path / "config.json").write_text(STUDENT.to_json_string())
    for at, student in enumerate((tmp_path / "config.json", tmp_path, STUDENT)):
        general(made, tmp_path / f"out{at}", student, steps=1)
        assert_same_weights(tmp_path / "out0", tmp_path / f"out{at}")
    encoder = tiny_encoder(tmp_path / "wide", num_attention_heads=12, num_hidden_layers=4)
    distill_general(
        encoder, "tiny_4l_312", made / "corpus.txt", tmp_path / "tiny", steps=1, progress=False
    )
    config = AutoModel.from_pretrained(tmp_path / "tiny").config
    assert (config.hidden_size, config.vocab_size, config.max_position_embeddings) == (312, 25, 40)


def test_layers_and_explicit_matches(made, tmp_path):
    student = tiny_config(**{**TEACHER, "num_hidden_layers": 3})
    with pytest.raises(ValueError, match=r"3 student layers do not divide 4 .*0:0,1:1,2:3,3:4"):
        general(made, tmp_path / "no", student)
    options = {"matches": "0:0,1:1,2:3,3:4", "init": "layers", "shared_projection": False}
    metrics = general(made, tmp_path / "out", student, lr=1e-6, **options)
    assert metrics["losses"]["embedding_loss"]["first"] < 0.3  # dropout alone
    saved = load_file(tmp_path / "out" / "projection.safetensors")
    assert set(saved) == {f"fit_denses.{m}.{n}" for m in range(4) for n in ("weight", "bias")}


def test_attention_alone(made, tmp_path):
    metrics = general(made, tmp_path, matches="attention=1:2,2:4", steps=2)
    assert metrics["losses"].keys() == {"loss", "attention_1_loss", "attention_2_loss"}
    assert "| matches | hidden= attention=1:2,2:4 |" in (tmp_path / "report.md").read_text()


def test_vocabularies_must_be_the_same(made, tmp_path):
    larger = tiny_encoder(tmp_path / "larger", words=(*WORDS, "extra"))
    complaint = r"larger has 26 word pieces and the teacher .*encoder has 25\. .*the teacher's voc"
    with pytest.raises(ValueError, match=complaint):
        general(made, tmp_path / "out", larger)
    swapped = [*WORDS]
    swapped[7], swapped[9] = swapped[9], swapped[7]
    swapped = tiny_encoder(tmp_path / "swapped", words=tuple(swapped))
    with pytest.raises(ValueError, match=r"different vocabularies .*first difference is at id 7"):
        task(made, tmp_path / "out", swapped)
    config = tiny_config(vocab_size=99)
    with pytest.raises(ValueError, match="config has 99 word pieces"):
        general(made, tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("accelerate", [True, False], ids=["packed", "padded"])
def test_a_student_selected_by_its_loss_on_gold_labels(made, tmp_path, accelerate):
    """Of a student as sure as its teacher and, before and after, one less sure of the same answers:
    accuracy, which cannot tell them apart, would keep the first.
    """
    loss_at, accuracy_at = {}, {}
    surer = {4: 0.25, 8: 4.0, 12: 0.25}  # step -> factor of the logits

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for parameter in model.student.classifier.parameters():
                parameter.data *= surer.get(state.global_step, 1.0)

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            loss_at[state.global_step] = metrics["eval_loss"]
            accuracy_at[state.global_step] = metrics["eval_accuracy"]

    options = {"select_by": "loss", "accelerate": accelerate, "intermediate_epochs": 0}
    metrics = task(
        made, tmp_path / "out", made / "teacher", prediction_lr=0.0, callbacks=[Watch()], **options
    )
    best = min(loss_at, key=loss_at.get)
    assert metrics["selected_by"] == "loss"
    assert metrics["best_step"] == best == 8 < max(loss_at)
    assert max(accuracy_at, key=accuracy_at.get) != best
    assert metrics["dev"]["loss"] == loss_at[best]

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    dev = load_examples(made / "dev.csv")
    batch = tokenizer(list(dev["text"]), padding=True, return_tensors="pt")
    labels = torch.tensor([model.config.label2id[label] for label in dev["label"]])
    with torch.no_grad():
        loss = model(**batch, labels=labels).loss
    assert metrics["dev"]["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("recipe", "options", "kind", "complaint"),
    [
        (general, {"parity": "exact"}, ValueError, "paper, official"),
        (
            general,
            {"student": "5l-100"},
            FileNotFoundError,
            "no student or model 5l-100; .*4l-312, 6l-768",
        ),
        (general, {"student": tiny_config(num_attention_heads=4)}, ValueError, "heads=2"),
        (general, {"teacher_dtype": "fp4"}, ValueError, "fp32, bf16, int8, fp8"),
        (general, {"cache_dtype": "fp16"}, ValueError, "ask for them"),
        (task, {"cache_teacher": True, "cache_dtype": "int8"}, ValueError, "fp32, fp16, bf16"),
        (task, {"cache_teacher": True, "parity": "official"}, ValueError, "counts padding"),
        (general, {"init": "svd"}, ValueError, "random, layers, pca"),
        (general, {"parity": "official", "batch_size": 100}, ValueError, "90 texts do not fill"),
        (general, {"batch_size": 0}, ValueError, "batch_size is 0"),
        (general, {"steps": 0}, ValueError, "steps is 0; expected 1 or more"),
        (general, {"steps": -5}, ValueError, "steps is -5; expected 1 or more"),
        (general, {"checkpoint_steps": 0}, ValueError, "checkpoint_steps is 0"),
        (task, {"eval_steps": -5}, ValueError, "eval_steps is -5; expected 1 or more"),
        (task, {"max_length": 0}, ValueError, "max_length is 0; expected at least 3"),
        (task, {"select_by": "f2"}, ValueError, "this task has accuracy, f1, matthews, loss"),
        (task, {"select_by": "loss", "dev": None}, ValueError, "'loss', but there is no dev file"),
        (task, {"intermediate_epochs": -1}, ValueError, "0 or more"),
        (task, {"temperature": 0.0}, ValueError, "temperature .*more than 0, got 0"),
    ],
)
def test_refusals(made, tmp_path, recipe, options, kind, complaint):
    with pytest.raises(kind, match=complaint):
        recipe(made, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_files_are_held_to_the_teachers_task(made, tmp_path):
    teacher = made / "teacher"
    bad = tmp_path / "bad.csv"
    bad.write_text("sentence,label\nfine film,good\nthe film,neutral\n")
    with pytest.raises(ValueError, match=r"bad.csv.*row 2 .*'neutral'"):
        distill_task(teacher, STUDENT, made / "train.csv", bad, tmp_path / "out")
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("sentence1,sentence2,label\nfine film,the film,good\n")
    with pytest.raises(ValueError, match="single texts"):
        distill_task(teacher, STUDENT, made / "train.csv", None, tmp_path / "out", augmented=pairs)
    with pytest.raises(ValueError, match="no trained classification head"):
        distill_task(made / "encoder", STUDENT, made / "train.csv", None, tmp_path / "out")
    with pytest.raises(FileNotFoundError):
        distill_task(teacher, STUDENT, tmp_path / "absent.csv", None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_trained_students_and_models_in_the_way(made, tmp_path):
    student = tiny_classifier(tmp_path / "student")
    with pytest.raises(ValueError, match="init='pca' is for new students"):
        task(made, tmp_path / "out", student, init="pca")
    with pytest.raises(FileExistsError, match="--overwrite"):
        general(made, student)
    general(made, tmp_path / "out", steps=1)
    task(made, tmp_path / "out", overwrite=True)
    assert "projection.safetensors" not in names(tmp_path / "out")  # it served the old model
    HiddenProjection(8, 32).save(student)
    with pytest.raises(ValueError, match="maps 8 -> 32 channels"):
        task(made, tmp_path / "again", student)
