"""Examples run as their docstrings say."""

import runpy
import sys
from pathlib import Path

import pytest

from tinybert_fast.testing.tiny_models import sentiment_rows, tiny_encoder

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_long_documents(tmp_path, monkeypatch, capsys):
    tokenizer, text = tiny_encoder(tmp_path / "bert"), tmp_path / "text"
    options = ("--length", 64, "--window", 32, "--steps", 2, "--tokenizer", tokenizer)
    with pytest.raises(SystemExit):
        run(monkeypatch, "long_documents.py", *options, "--text", text)
    assert "No such file or directory" in capsys.readouterr().err
    text.write_text(" ".join(words for words, _ in sentiment_rows(40)))
    run(monkeypatch, "long_documents.py", *options, "--text", text)
    assert len(capsys.readouterr().out.splitlines()) == 2
