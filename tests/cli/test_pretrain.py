"""tinybert-fast pretrain: text to a model and on to a classifier; Chinese; bad input."""

import errno
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import BertForPreTraining

from tinybert_fast.data import shards
from tinybert_fast.testing.tiny_models import sentiment_file, sentiment_rows, tiny_config

QUICK = ("--steps", 6, "--max-length", 24, "--batch-size", 4, "--lr", 3e-3)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """english.txt, 12 documents with a blank line between, and config.json."""
    folder = tmp_path_factory.mktemp("pretrain")
    texts = [text for text, _ in sentiment_rows(120, seed=3)]
    parts = ["\n".join(f"{t}." for t in texts[i : i + 10]) for i in range(0, 120, 10)]
    (folder / "english.txt").write_text("\n\n".join(parts))
    tiny_config(vocab_size=200).to_json_file(folder / "config.json")
    return folder


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def test_text_to_classifier(cli, made, out, tmp_path):
    answer = cli(
        "pretrain", made / "english.txt", "-o", out, "--model", made / "config.json", "--held-out",
        "0.25", "--weights", "loss", "--ratio-end", 0.3, "--ratio-schedule", "linear", *QUICK,
        "--json", tmp_path / "r.json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "held out: mlm accuracy" in answer.out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["command"] == "pretrain"
    assert result["steps"] == 6
    assert {"mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy"} <= set(result["held_out"])
    assert BertForPreTraining.from_pretrained(out).config.hidden_size == 24
    train = sentiment_file(tmp_path / "train.csv", 24)
    answer = cli(
        "finetune", out, "--train", train, "-o", tmp_path / "classifier", "--epochs", 1,
        "--max-length", 16,
    )  # fmt: skip
    assert answer.code == 0, answer.err


def test_goes_on_with_its_own_model(cli, made, out, tmp_path):
    first = ("pretrain", made / "english.txt", "--model", made / "config.json", "--no-nsp", *QUICK)
    assert cli(*first, "-o", out).code == 0
    again = ("pretrain", made / "english.txt", "--model", out, "--bidirectional", "reverse")
    answer = cli(*again, *QUICK, "-o", tmp_path / "further", "--bf16")
    assert answer.code == 0, answer.err


CHINESE = (
    "春天来了，花园里的花都开了。孩子们在草地上奔跑，老人坐在长椅上晒太阳。\n小猫睡在窗台上。\n"
)
MORE = "机器学习需要大量的数据。研究人员训练了一个语言模型。\n这个模型可以回答很多问题。\n"


def test_chinese(cli, out, tmp_path):
    """Whole words by jieba, a tokenizer of the text's own, and a classifier on top."""
    pytest.importorskip("jieba")
    (tmp_path / "zh").mkdir()
    for i in range(6):
        for name, text in (("a", CHINESE), ("b", MORE)):
            (tmp_path / "zh" / f"{name}{i}.txt").write_text(text * 3, encoding="utf-8")
    tiny_config(vocab_size=300).to_json_file(tmp_path / "config.json")
    answer = cli(
        "pretrain", tmp_path / "zh", "-o", out, "--documents", "files", "--words", "jieba",
        "--mask", "word", "--model", tmp_path / "config.json", "--held-out", "0.25", *QUICK,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    tokens = (out / "tokenizer.json").read_text(encoding="utf-8")
    assert "花" in tokens
    for folder in (out / "data").glob("shards-*"):
        assert "word_starts" in Dataset.from_file(str(folder / "shard-00000.arrow")).column_names
    rows = [
        "sentence,label",
        *(f"{t},{n}" for t, n in [("花都开了", "花"), ("语言模型", "机")] * 8),
    ]
    (tmp_path / "zh.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    answer = cli(
        "finetune", out, "--train", tmp_path / "zh.csv", "-o", tmp_path / "classifier",
        "--epochs", 1, "--max-length", 16,
    )  # fmt: skip
    assert answer.code == 0, answer.err


# ---- bad input: one line, exit code 2, no model --------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", "holds no text; expected sentences"),
        (b"One sentence. Another one.\n", "is one document.*--no-nsp"),
        (b"good\nbad \xff\n", r"is not UTF-8 \(byte 9: "),
    ],
    ids=["empty", "one document", "undecodable"],
)
def test_text_that_does_not_serve(cli, made, out, tmp_path, content, message):
    import re

    (tmp_path / "a.txt").write_bytes(content)
    answer = cli("pretrain", tmp_path / "a.txt", "-o", out, "--model", made / "config.json")
    assert re.search(message, answer.line)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--weights", "count"), "needs a direction"),
        (("--bidirectional", "causal", "--ratio", 0.3), "masks nothing"),
        (("--no-nsp", "--no-mlm"), "nothing is left to learn"),
        (("--held-out", "nowhere"), "no text file nowhere"),
        (("--tokenizer", "nowhere"), "nowhere"),
        (("--data", __file__), "is a file; expected a folder for tokenizer and shards"),
        (("--steps", 0), "steps is 0"),
        (("--plain", "--bidirectional", "causal"), "no --plain"),
    ],
)
def test_options_that_do_not_serve(cli, made, out, options, message):
    answer = cli(
        "pretrain", made / "english.txt", "-o", out, "--model", made / "config.json", *options
    )
    assert message in answer.line
    assert not out.exists()


def test_a_refused_run_is_no_unfinished_one(cli, made, out, tmp_path):
    """What is found out from the text itself: with the remedy, the same command runs."""
    (tmp_path / "weights.tsv").write_text("nowhere\t2\n")
    common = ("pretrain", made / "english.txt", "-o", out, "--model", made / "config.json", *QUICK)
    for wrong, message in (
        (("--batch-size", 999), "one step reads 999"),
        (("--weights", tmp_path / "weights.tsv"), "'nowhere' is not in the vocabulary"),
    ):
        answer = cli(*common, *wrong)
        assert answer.code == 2
        assert message in answer.err
    assert cli(*common).code == 0


class KilledEncoder:
    """Of a process that the system ends, as where memory runs out."""

    def __init__(self, *setup):
        pass

    def __call__(self, block):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker(cli, made, out, monkeypatch):
    monkeypatch.setattr(shards, "BlockEncoder", KilledEncoder)
    answer = cli(
        "pretrain", made / "english.txt", "-o", out, "--model", made / "config.json",
        "--processes", 2,
    )  # fmt: skip
    assert answer.code == 1
    assert answer.err.splitlines()[-1].startswith("error: a worker process was ended from outside")
    assert not list(out.rglob("*partial*"))


def test_missing_text(cli, out):
    assert "no text file nowhere.txt" in cli("pretrain", "nowhere.txt", "-o", out).line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_full_disk(cli, made, out, monkeypatch, number):
    def full(*arguments, **more):
        raise OSError(number, "no")

    monkeypatch.setattr(shards, "TokenWriter", full)
    answer = cli("pretrain", made / "english.txt", "-o", out, "--model", made / "config.json")
    assert "no room for the shards" in answer.line
    assert "Errno" not in answer.line
    assert not list(out.rglob("*.arrow"))
    assert not list(out.rglob("*partial*"))


def test_missing_jieba(cli, made, out, monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    answer = cli(
        "pretrain", made / "english.txt", "-o", out, "--model", made / "config.json", "--words",
        "jieba",
    )  # fmt: skip
    assert "pip install '.[chinese]'" in answer.line
