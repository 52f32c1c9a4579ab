"""The output folder: what it refuses, what a resumed run finds, what a damaged checkpoint says."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tinybert_fast.testing.tiny_models import tiny_classifier, tiny_tokenizer
from tinybert_fast.training import run_folder
from tinybert_fast.training.loading import load_classifier
from tinybert_fast.training.projection import HiddenProjection
from tinybert_fast.training.report import panels_of, plot, table
from tinybert_fast.training.run_folder import RunFolder, examples_digest, weights_digest

SETTINGS = {"lr": 1e-4, "labels": ("a", "b")}


def begun(path, **settings):
    run = RunFolder(path)
    run.begin({**SETTINGS, **settings})
    return run


def checkpoint(run, step, stage="train"):
    folder = run.checkpoints(stage) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(100)}, folder / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"state": torch.arange(100)}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return folder


def test_opening_touches_nothing(tmp_path):
    for options in ({}, {"resume": True}, {"overwrite": True}):
        RunFolder(tmp_path / "new", **options)
    assert not (tmp_path / "new").exists()


def test_refuses_what_it_would_destroy(tmp_path):
    model = tiny_classifier(tmp_path / "model")
    with pytest.raises(FileExistsError, match=r"already holds a model; .*--overwrite"):
        RunFolder(model)
    with pytest.raises(FileExistsError, match="did not train, so there is nothing to resume"):
        RunFolder(model, resume=True)
    for name in ("logs", "checkpoints", "report.md"):
        theirs = tmp_path / f"project-{name}" / name / "best.pt"
        theirs.mkdir(parents=True)
        with pytest.raises(FileExistsError, match=rf"holds {name}, which no run left there"):
            RunFolder(theirs.parents[1], resume=True)
    begun(tmp_path / "run")
    with pytest.raises(FileExistsError, match=r"unfinished run; .*--resume.*--overwrite"):
        RunFolder(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="is a file"):
        RunFolder(tmp_path / "file", overwrite=True)
    with pytest.raises(ValueError, match="exclude each other"):
        RunFolder(tmp_path / "x", overwrite=True, resume=True)


def test_overwriting_keeps_the_old_model_until_the_new_one_is_written(tmp_path):
    path = tiny_classifier(tmp_path / "run")
    before = (path / "model.safetensors").read_bytes()
    first = RunFolder(path, overwrite=True)
    first.begin(SETTINGS)
    old = checkpoint(first, 5)
    first.write_metrics({"accuracy": 1})
    run = RunFolder(path, overwrite=True)
    assert old.exists()
    run.begin(SETTINGS)
    assert not old.exists()
    assert not (path / "metrics.json").exists()
    assert (path / "model.safetensors").read_bytes() == before
    other = load_classifier(tiny_classifier(tmp_path / "other", seed=1))
    run.save_model(other)
    assert (path / "model.safetensors").read_bytes() != before
    assert not list(path.glob(".*"))


def test_an_interrupted_save_leaves_the_old_model(tmp_path, monkeypatch):
    path = tiny_classifier(tmp_path / "run")
    files = {file: file.read_bytes() for file in path.iterdir() if file.is_file()}
    run = RunFolder(path, overwrite=True)
    run.begin(SETTINGS)
    model = load_classifier(path)
    model.classifier.bias.data += 1

    def out_of_disk(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(model, "save_pretrained", out_of_disk)
    with pytest.raises(OSError, match="No space"):
        run.save_model(model)
    assert all(file.read_bytes() == content for file, content in files.items())


def test_a_crash_between_two_files_leaves_no_model(tmp_path, monkeypatch):
    path = tiny_classifier(tmp_path / "run")
    model = load_classifier(path)
    run = RunFolder(path, overwrite=True)
    run.begin(SETTINGS)
    replace = os.replace

    def pull_the_plug(source, target):
        if Path(target).name == "config.json":
            raise OSError("gone")
        replace(source, target)

    monkeypatch.setattr(os, "replace", pull_the_plug)
    with pytest.raises(OSError, match="gone"):
        run.save_model(model)
    assert not (path / "config.json").exists()  # the old one, beside new weights


def test_what_the_old_model_alone_had_goes(tmp_path):
    path = tiny_classifier(tmp_path / "run")
    projection = HiddenProjection(2, 3)
    for folder in (path, path / "intermediate"):
        projection.save(folder)
    run = RunFolder(path, overwrite=True)
    run.begin(SETTINGS)
    assert not (path / "intermediate").exists()
    assert (path / "projection.safetensors").exists()  # the old model is whole so far
    run.save_model(load_classifier(path))
    assert not (path / "projection.safetensors").exists()
    run.save_model(load_classifier(path), projection=projection)
    assert (path / "projection.safetensors").exists()


def test_resume_finds_the_last_checkpoint_of_its_stage(tmp_path):
    run = begun(tmp_path / "run")
    for step in (9, 10, 100):
        checkpoint(run, step)
    checkpoint(run, 7, "stage_b")
    run.record(stage_a={"steps": 100})
    assert run.last_checkpoint() is None  # not resuming
    again = RunFolder(tmp_path / "run", resume=True)
    again.begin(SETTINGS)
    assert again.last_checkpoint() == str(
        tmp_path / "run" / "checkpoints" / "train" / "checkpoint-100"
    )
    assert again.last_checkpoint("stage_b").endswith("checkpoint-7")
    assert again.last_checkpoint("stage_c") is None
    assert again.recorded("stage_a") == {"steps": 100}
    assert not again.finished(SETTINGS)


def test_resume_wants_the_same_settings(tmp_path):
    begun(tmp_path / "run")
    with pytest.raises(ValueError, match=r"other settings \(lr was 0.0001, now 0.1\)"):
        RunFolder(tmp_path / "run", resume=True).begin({**SETTINGS, "lr": 0.1})
    with pytest.raises(ValueError, match=r"other settings \(lr was 0.0001, now 0.1\)"):
        RunFolder(tmp_path / "run", resume=True).finished({**SETTINGS, "lr": 0.1})


def test_a_steps_examples_may_be_shared_out_anew(tmp_path, caplog):
    run = begun(tmp_path / "run", processes=8, batch_size=4)
    checkpoint(run, 5)
    for rank in range(8):
        torch.save({}, run.checkpoints() / "checkpoint-5" / f"rng_state_{rank}.pth")
    moved = {**SETTINGS, "processes": 2, "batch_size": 8, "accumulation": 2}
    for _ in range(2):  # the second time before there is a checkpoint of two processes
        again = RunFolder(tmp_path / "run", resume=True)
        assert not again.finished(moved)
        again.begin(moved)
        assert again.last_checkpoint().endswith("checkpoint-5")
    assert caplog.messages == [
        "going on with 2 processes x 8 batch_size x 2 accumulation, after 8 processes x 4 "
        "batch_size x 1 accumulation: the same steps, other dropout"
    ]
    with pytest.raises(ValueError, match=r"\(examples of a step was 32, now 64\)"):
        RunFolder(tmp_path / "run", resume=True).finished({**moved, "batch_size": 16})
    (run.checkpoints() / "checkpoint-5" / "rng_state_1.pth").unlink()
    with pytest.raises(ValueError, match=r"rng_state_1\.pth is missing"):
        again.last_checkpoint()


def test_processes_agree_before_they_go_on(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run_folder, "agree", asked.append)
    RunFolder(tmp_path / "run").finished(SETTINGS)
    assert asked == [SETTINGS]


def test_a_finished_run_says_so(tmp_path):
    run = begun(tmp_path / "run")
    checkpoint(run, 5)
    run.write_metrics({"accuracy": 0.5})
    run.finish()
    assert not run.checkpoints().exists()
    again = RunFolder(tmp_path / "run", resume=True)
    assert again.finished(SETTINGS)
    assert again.metrics() == {"accuracy": 0.5}


FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in FILES
        for damage in ("truncated", "empty", "missing")
        if (name, damage) != (run_folder.LAST_FILE, "missing")
    ],
)
def test_damaged_checkpoint_is_named(tmp_path, name, damage):
    run = begun(tmp_path / "run")
    checkpoint(run, 5)
    file = checkpoint(run, 10) / name
    if damage == "missing":
        file.unlink()
    else:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
    again = RunFolder(tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=rf"{name} is .*resume from checkpoint-5"):
        again.last_checkpoint()


def test_every_process_keeps_its_generators(tmp_path):
    run = begun(tmp_path / "run", processes=2)
    folder = checkpoint(run, 10)
    (folder / "rng_state.pth").rename(folder / "rng_state_0.pth")
    again = RunFolder(tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"rng_state_1.pth is missing"):
        again.last_checkpoint()
    shutil.copy(folder / "rng_state_0.pth", folder / "rng_state_1.pth")
    assert again.last_checkpoint() == str(folder)


def test_an_unfinished_checkpoint_is_passed_over(tmp_path, caplog):
    run = begun(tmp_path / "run")
    for step in (5, 10):
        folder = checkpoint(run, step)
    (folder / run_folder.LAST_FILE).unlink()
    again = RunFolder(tmp_path / "run", resume=True)
    assert again.last_checkpoint().endswith("checkpoint-5")
    assert "checkpoint-10 was not finished" in caplog.text


def test_a_flipped_byte_is_found(tmp_path):
    run = begun(tmp_path / "run")
    file = checkpoint(run, 10) / "optimizer.pt"
    content = bytearray(file.read_bytes())
    at = content.index(torch.arange(100).numpy().tobytes())
    content[at + 8] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"optimizer.pt is truncated or damaged .*start from the"):
        RunFolder(tmp_path / "run", resume=True).last_checkpoint()


def test_damaged_run_file(tmp_path):
    begun(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run.json is damaged .*start again \(--overwrite\)"):
        RunFolder(tmp_path / "run", resume=True)
    RunFolder(tmp_path / "run", overwrite=True).begin(SETTINGS)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["finished"] is False


def test_other_ranks_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run = begun(tmp_path / "run")
    run.record(step=1)
    run.write_metrics({})
    run.write_report("x", {}, {})
    run.save_model(None, tiny_tokenizer(tmp_path / "tokenizer"))
    run.finish()
    assert not (tmp_path / "run").exists()


def test_digest_sees_texts_labels_and_order():
    import datasets

    def digest(**columns):
        return examples_digest(datasets.Dataset.from_dict(columns))

    one = digest(text=["a", "b"], label=["x", "y"])
    assert one == digest(label=["x", "y"], text=["a", "b"])
    assert len({one, digest(text=["b", "a"], label=["x", "y"]), digest(text=["a", "b"])}) == 3


def test_digest_sees_weights_and_projection(tmp_path):
    model = tiny_classifier(tmp_path / "model")
    digest = weights_digest(model)
    copy = shutil.copytree(model, tmp_path / "copy")
    assert weights_digest(copy) == digest
    HiddenProjection(2, 3).save(copy)
    other = weights_digest(tiny_classifier(tmp_path / "other", seed=1))
    assert len({digest, weights_digest(copy), other}) == 3
    assert weights_digest("google-bert/bert-base-uncased") is None


# ---- the report ----------------------------------------------------------------------------------

HISTORY = [
    {
        "loss": 2.0,
        "attention_loss": 1.5,
        "learning_rate": 1e-4,
        "grad_norm": 1.0,
        "epoch": 1,
        "step": 10,
    },
    {"eval_loss": 1.0, "eval_accuracy": 0.5, "eval_runtime": 3.0, "epoch": 1, "step": 10},
    {"loss": 1.0, "attention_loss": 0.5, "learning_rate": 0.0, "epoch": 2, "step": 20},
    {"train_loss": 1.5, "train_runtime": 9.0, "epoch": 2, "step": 20},
]


def test_panels():
    assert panels_of(HISTORY) == {
        "training loss": {"loss": [(10, 2.0), (20, 1.0)], "attention_loss": [(10, 1.5), (20, 0.5)]},
        "dev loss": {"loss": [(10, 1.0)]},
        "dev metrics": {"accuracy": [(10, 0.5)]},
        "learning rate": {"learning_rate": [(10, 1e-4), (20, 0.0)]},
    }


def test_report_and_plot(tmp_path):
    run = begun(tmp_path / "run")
    rows = [("a|b", 0.123456), ("c", 12345)]
    run.write_report("Title", {"Result": table(("what", "value"), rows)}, panels_of(HISTORY))
    report = (tmp_path / "run" / "report.md").read_text()
    assert report.startswith("# Title\n\n## Result\n\n| what | value |\n| --- | --- |\n")
    assert "| a\\|b | 0.1235 |\n| c | 12,345 |" in report
    assert "(curves.png)" in report
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert plot({}) is None
