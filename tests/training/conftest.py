"""A corpus of made-up words, a small model's config beside it; functions in their own processes."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from tinybert_fast.testing.tiny_models import tiny_config

DOCUMENTS, SENTENCES = 12, 30
PATIENCE = 150  # seconds that all phases of a test may take
# One interpreter imports, which takes longer than what these tests train, and its forks train: it
# has not worked with tensors yet. Half of the time of a run would be its picture.
FORKS = """
import gc, importlib, json, os, sys
from tinybert_fast.training import run_folder
run_folder.plot = lambda panels: None
folder, module, errors, phases = *sys.argv[1:4], json.loads(sys.argv[4])
sys.path.insert(0, folder)
tests = importlib.import_module(module)
gc.freeze()
codes = []
for phase in phases:
    children = []
    for number, (name, arguments, variables) in enumerate(phase, len(codes)):
        child = os.fork()
        if child == 0:
            os.environ.update(variables)
            os.dup2(os.open(f"{errors}/{number}", os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
            getattr(tests, name)(*arguments)
            sys.exit()
        children.append(child)
    codes += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(json.dumps(codes))
"""


class Ended(NamedTuple):
    code: int  # of the process; -9 after a kill
    errors: str  # its stderr


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """text/0.txt ... 11.txt, one document each, and config.json (dropout 0)."""
    folder = tmp_path_factory.mktemp("pretraining")
    (folder / "text").mkdir()
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=draw.randint(2, 6))) for _ in range(60)]
    for number in range(DOCUMENTS):
        lines = [" ".join(draw.choices(words, k=draw.randint(4, 10))) for _ in range(SENTENCES)]
        (folder / "text" / f"{number}.txt").write_text(".\n".join(lines) + ".\n")
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tiny_config(vocab_size=200, **none).to_json_file(folder / "config.json")
    return folder


@pytest.fixture(scope="session")
def apart(tmp_path_factory) -> Callable[..., list[Ended]]:
    """apart(__file__, phase, ...): a phase is calls at the same time, each in a process of its own.

    A call is the name of a function of that file, its arguments (strings), and variables of its
    environment. No GPU, one thread.
    """

    def run(file: str, *phases: list[tuple[str, list[str], dict[str, str]]]) -> list[Ended]:
        errors, module = tmp_path_factory.mktemp("errors"), Path(file)
        command = [sys.executable, "-W", "ignore", "-c", FORKS, str(module.parent)]
        process = subprocess.Popen(
            [*command, module.stem, str(errors), json.dumps(phases)],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(timeout=PATIENCE)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        codes = json.loads(out.splitlines()[-1])
        return [Ended(code, (errors / str(n)).read_text()) for n, code in enumerate(codes)]

    return run


@pytest.fixture(scope="session")
def ranks_of() -> Callable[..., list[tuple[str, list[str], dict[str, str]]]]:
    """ranks_of(name, *arguments): calls of a phase for `apart`, what torchrun starts without its
    agent, which ends the others when one dies: two processes.
    """

    def calls(name: str, *arguments: Path) -> list[tuple[str, list[str], dict[str, str]]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                  "MASTER_PORT": port}  # fmt: skip
        own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [(name, list(map(str, arguments)), {**common, **more}) for more in own]

    return calls
