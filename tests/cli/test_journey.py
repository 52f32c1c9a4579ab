"""What a user does, in order: a teacher, its scores, a general student, a task student."""

import json

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
)

EPOCHS = 6
FAST = ("--batch-size", 8, "--max-length", 16)


@pytest.fixture(scope="module")
def made(files, tmp_path_factory):
    return tmp_path_factory.mktemp("made")


def read(path):
    return json.loads(path.read_text())


def curves_and_report(folder):
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "curves.png" in (folder / "report.md").read_text()
    assert read(folder / "metrics.json")


def test_1_finetune(cli, files, made):
    answer = cli(
        "finetune", files / "encoder", "--train", files / "train.csv", "--dev", files / "dev.csv",
        "-o", made / "teacher", "--epochs", 12, "--lr", 3e-3, *FAST,
        "--json", made / "teacher.json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "accuracy" in answer.out
    assert str(made / "teacher" / "report.md") in answer.out
    result = read(made / "teacher.json")
    assert result["command"] == "finetune"
    assert result["output"] == str(made / "teacher")
    assert {"tinybert_fast", "task", "labels", "parameters", "steps", "train_seconds"} <= set(
        result
    )
    assert result["dev"]["accuracy"] > 0.9
    curves_and_report(made / "teacher")


def test_2_evaluate(cli, files, made):
    answer = cli(
        "evaluate", made / "teacher", files / "dev.csv", "--json", made / "scores.json",
        "--predictions", made / "answers.jsonl",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    result = read(made / "scores.json")
    assert result["command"] == "evaluate"
    assert result["accuracy"] == read(made / "teacher.json")["dev"]["accuracy"]
    assert {"f1", "matthews", "examples", "seconds", "examples_per_second"} <= set(result)
    assert len((made / "answers.jsonl").read_text().splitlines()) == 32


def test_3_general_distillation(cli, files, made):
    answer = cli(
        "distill", files / "encoder", "--corpus", files / "corpus.txt", "--student",
        files / "student.json", "--init", "pca", "--steps", 12, "--lr", 3e-3, "-o",
        made / "general", *FAST, "--json", made / "general.json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    result = read(made / "general.json")
    assert result["command"] == "distill"
    assert result["steps"] == 12
    assert result["losses"]["loss"]["last"] > 0
    assert (made / "general" / "projection.safetensors").exists()
    curves_and_report(made / "general")


def test_4_task_distillation_loads_in_plain_transformers(cli, files, made):
    answer = cli(
        "distill", made / "teacher", "--student", made / "general", "--train", files / "train.csv",
        "--dev", files / "dev.csv", "--intermediate-epochs", EPOCHS, "--intermediate-lr", 3e-3,
        "--prediction-epochs", EPOCHS, "--prediction-lr", 3e-3, "--eval-steps", 6, "-o",
        made / "student", *FAST, "--json", made / "student.json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    result = read(made / "student.json")
    assert {"intermediate", "prediction", "dev", "teacher_dev", "best_step"} <= set(result)
    assert result["prediction"]["steps"] == EPOCHS * 48 // 8
    curves_and_report(made / "student")
    assert cli("evaluate", made / "student", files / "dev.csv").code == 0

    model = AutoModelForSequenceClassification.from_pretrained(made / "student")
    assert type(model) is BertForSequenceClassification
    tokens = AutoTokenizer.from_pretrained(made / "student")("a great film", return_tensors="pt")
    assert model(**tokens).logits.shape == (1, 2)
    assert model.config.id2label == {0: "bad", 1: "good"}


def test_5_resume_of_a_finished_run_answers_at_once(cli, files, made):
    before = (made / "general" / "model.safetensors").stat().st_mtime_ns
    answer = cli(
        "distill", files / "encoder", "--corpus", files / "corpus.txt", "--student",
        files / "student.json", "--init", "pca", "--steps", 12, "--lr", 3e-3, "-o",
        made / "general", *FAST, "--resume",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert (made / "general" / "model.safetensors").stat().st_mtime_ns == before


def test_official_parity(cli, files, made):
    answer = cli(
        "distill", files / "encoder", "--corpus", files / "corpus.txt", "--student",
        files / "student.json", "--parity", "official", "--steps", 2, "-o", made / "official",
        *FAST,
    )  # fmt: skip
    assert answer.code == 0, answer.err


def test_augmented_file_and_own_matches(cli, files, made, tmp_path):
    rows = [f'"{line}"' for line in (files / "corpus.txt").read_text().splitlines()]
    (tmp_path / "more.csv").write_text("\n".join(["sentence", *rows]) + "\n")
    answer = cli(
        "distill", made / "teacher", "--student", files / "student.json", "--train",
        files / "train.csv", "--augmented", tmp_path / "more.csv", "--matches", "0:0,1:1,2:4",
        "--projection-per-layer", "--intermediate-epochs", 1, "--prediction-epochs", 1, "-o",
        tmp_path / "out", *FAST, "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    result = read(tmp_path / "out.json")
    assert result["intermediate"]["steps"] == result["prediction"]["steps"] == -(-60 // 8)
    assert "0:0,1:1,2:4" in (tmp_path / "out" / "report.md").read_text()


def test_regression_of_pairs(cli, files, tmp_path):
    rows = [f"a film\tthe film\t{i % 5 + 0.5}" for i in range(16)]
    (tmp_path / "pairs.tsv").write_text("sentence1\tsentence2\tscore\n" + "\n".join(rows) + "\n")
    answer = cli(
        "finetune", files / "encoder", "--train", tmp_path / "pairs.tsv", "--dev",
        tmp_path / "pairs.tsv", "-o", tmp_path / "out", "--epochs", 1, *FAST, "--bf16",
        "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "pearson" in read(tmp_path / "out.json")["dev"]


def test_threads_are_left_alone(cli, files, made):
    before = torch.get_num_threads()
    assert cli("evaluate", made / "teacher", files / "dev.csv", "--plain").code == 0
    assert torch.get_num_threads() == before
