"""One command in this process, and tiny files for it to work on."""

import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

from tinybert_fast.cli.main import main
from tinybert_fast.testing.tiny_models import (
    sentiment_file,
    sentiment_rows,
    tiny_config,
    tiny_encoder,
)

TEACHER = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64}


@dataclass
class Answer:
    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of a refusal, which is all there is on stderr."""
        assert self.code == 2, self.out + self.err
        assert self.err.startswith("error: "), self.err
        assert self.err.count("\n") == 1, self.err
        return self.err


@pytest.fixture
def cli(capsys, monkeypatch):
    """cli("evaluate", folder, file) -> Answer"""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    log = logging.getLogger("tinybert_fast")
    level = log.level

    def run(*arguments) -> Answer:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return Answer(end.value.code or 0, *capsys.readouterr())

    yield run
    log.setLevel(level)  # main() sets it for its whole process


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """encoder/ (4 layers, 32 wide), train.csv, dev.csv, corpus.txt, student.json (2 layers, 24)."""
    folder = tmp_path_factory.mktemp("files")
    tiny_encoder(folder / "encoder", **TEACHER)
    sentiment_file(folder / "train.csv", 48, seed=1)
    sentiment_file(folder / "dev.csv", 32, seed=2)
    lines = [text for text, _ in sentiment_rows(60, seed=3)]
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n")
    tiny_config().to_json_file(folder / "student.json")
    return folder
