"""The command line driven as a user would: in a process of its own, on tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tinybert_fast.testing.tiny_models import (
    sentiment_file,
    sentiment_rows,
    tiny_config,
    tiny_encoder,
)

TEACHER = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64}
FAST = ["--epochs", "1", "--batch-size", "16", "--max-length", "16"]


def cli(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-P", "-m", "tinybert_fast.cli", *map(str, arguments)]
        if sys.version_info >= (3, 11)
        else [str(Path(sys.executable).with_name("tinybert-fast")), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"},
        timeout=300,
        check=False,
    )


def refused(result, *words):
    assert result.returncode == 2, result.stderr
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: "), result.stderr
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in line


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tiny_encoder(folder / "encoder", **TEACHER)
    sentiment_file(folder / "train.csv", 48, seed=1)
    sentiment_file(folder / "dev.csv", 32, seed=2)
    (folder / "corpus.txt").write_text("\n".join(text for text, _ in sentiment_rows(40, seed=3)))
    tiny_config().save_pretrained(folder / "student-config")
    result = cli(
        "finetune", folder / "encoder", "--train", folder / "train.csv", "--dev",
        folder / "dev.csv", "-o", folder / "teacher", "--lr", "3e-3", "--json",
        folder / "teacher.json", *FAST,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return folder


def test_from_teacher_to_student(made):
    assert json.loads((made / "teacher.json").read_text())["dev"]["accuracy"] >= 0
    general = cli(
        "distill", made / "encoder", "--corpus", made / "corpus.txt", "--student",
        made / "student-config", "-o", made / "general", "--steps", "2", "--batch-size", "8",
        "--max-length", "16", "--init", "pca",
    )  # fmt: skip
    assert general.returncode == 0, general.stderr
    task = cli(
        "distill", made / "teacher", "--train", made / "train.csv", "--dev", made / "dev.csv",
        "--student", made / "general", "-o", made / "student", "--intermediate-epochs", "1",
        "--prediction-epochs", "1", "--batch-size", "16", "--max-length", "16",
    )  # fmt: skip
    assert task.returncode == 0, task.stderr
    result = cli("evaluate", made / "student", made / "dev.csv", "--json", made / "scores.json")
    assert result.returncode == 0, result.stderr
    scores = json.loads((made / "scores.json").read_text())
    assert {"accuracy", "f1", "matthews", "examples", "examples_per_second"} <= scores.keys()
    assert scores["examples"] == 32
    for name in ("config.json", "model.safetensors", "metrics.json", "report.md"):
        assert (made / "student" / name).is_file()


def test_student_loads_without_this_package(made):
    code = (
        "import sys; sys.modules['tinybert_fast'] = None\n"
        "from transformers import AutoModelForSequenceClassification as M\n"
        f"print(type(M.from_pretrained({str(made / 'teacher')!r})).__name__)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert out.stdout.strip() == "BertForSequenceClassification", out.stderr


def test_info_names_what_cannot_run(tmp_path):
    result = cli("info", "--json", tmp_path / "info.json")
    assert result.returncode == 0, result.stderr
    facts = json.loads((tmp_path / "info.json").read_text())
    assert facts["ops"]["attention"]["torch"]["runs"]
    assert facts["ops"]["attention"]["native"]["why_not"]
    assert facts["ops"]["attention"]["auto"] == "torch"


def test_help_is_quick_and_names_every_command():
    result = cli("--help")
    assert result.returncode == 0
    for command in ("info", "finetune", "evaluate", "distill", "bench", "demo"):
        assert command in result.stdout


def test_missing_file(made, tmp_path):
    result = cli("finetune", made / "encoder", "--train", "nowhere.csv", "-o", tmp_path / "out")
    refused(result, "nowhere.csv")
    assert not (tmp_path / "out").exists()


def test_missing_column(made, tmp_path):
    result = cli(
        "finetune", made / "encoder", "--train", made / "train.csv", "--text", "body",
        "-o", tmp_path / "out",
    )  # fmt: skip
    refused(result, "body", "sentence")


def test_empty_text(made, tmp_path):
    (tmp_path / "bad.csv").write_text("sentence,label\nfine film,good\n,bad\n")
    result = cli(
        "finetune", made / "encoder", "--train", tmp_path / "bad.csv", "-o", tmp_path / "out"
    )
    refused(result, "bad.csv")


def test_label_never_seen(made, tmp_path):
    (tmp_path / "odd.csv").write_text("sentence,label\nfine film,sideways\n")
    refused(cli("evaluate", made / "teacher", tmp_path / "odd.csv"), "sideways")


def test_output_that_holds_a_model(made):
    result = cli(
        "finetune", made / "encoder", "--train", made / "train.csv", "-o", made / "teacher"
    )
    refused(result, "--overwrite")


def test_neither_corpus_nor_task(made, tmp_path):
    refused(cli("distill", made / "teacher", "-o", tmp_path / "out"), "--corpus", "--train")


def test_different_vocabularies(made, tmp_path):
    tiny_encoder(tmp_path / "other", words=("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "film"))
    result = cli(
        "distill", made / "teacher", "--train", made / "train.csv", "--student",
        tmp_path / "other", "-o", tmp_path / "out",
    )  # fmt: skip
    refused(result, "vocabular")


def test_bench_suite_unknown():
    refused(cli("bench", "--suite", "everything"), "everything")


def test_demo_names_missing_data(monkeypatch):
    from tinybert_fast.training.demo import texts

    monkeypatch.setattr(texts, "TEACHERS", (("no_such_package", "model"),))
    with pytest.raises(FileNotFoundError, match="pip install"):
        texts.teacher_folder()


def test_demo_refuses_an_unknown_phase(tmp_path):
    refused(cli("demo", "--only", "everything", "-o", tmp_path / "demo"), "everything", "teacher")
