"""Pre-training in two gloo processes: the steps of one, and an end when the other one dies."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tinybert_fast.data import Corpus
from tinybert_fast.training.recipes import Masking, pretrain

GLOBAL_BATCH = 16
CASES = {
    "uniform": {"accumulation": 2, "duplicates": 3},  # three shards for two processes
    "reverse": {"bidirectional": "reverse"},
    "causal": {"bidirectional": "causal", "nsp": False},
    "loss": {"masking": Masking(weights="loss")},
    "pairs": {"mlm": False},
    "fsdp": {},
}
SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_pretrain_processes as tests
tests.{call}(Path(sys.argv[2]), Path(sys.argv[3]), ranks=2)
"""
DEADLINE = 60.0  # seconds in which a process has to notice that the other one is gone


def train_all(text: Path, output: Path, ranks: int) -> None:
    for name, more in CASES.items():
        train(text, output / name, ranks, fsdp=name == "fsdp" and ranks > 1, **more)


def train(text: Path, output: Path, ranks: int, accumulation: int = 1, **more):
    return pretrain(
        Corpus.of(text / "text", documents="files"),
        output,
        model=text / "config.json",
        data=output.parent / "data",
        held_out=0.2,
        steps=3,
        max_length=32,
        batch_size=GLOBAL_BATCH // ranks // accumulation,
        accumulation=accumulation,
        lr=3e-3,
        log_steps=1,
        eval_steps=3,
        checkpoint_steps=2,
        progress=False,
        **more,
    )


def die_at_step_2(text: Path, output: Path, ranks: int) -> None:
    from transformers import TrainerCallback

    class Die(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if args.process_index == 1 and state.global_step == 2:
                os._exit(7)

    train(text, output / "out", ranks, callbacks=[Die()])


def launch(call: str, text: Path, output: Path) -> list[subprocess.Popen]:
    """What torchrun starts, without its agent, which ends the others when one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-P", "-W", "ignore", "-c", SCRIPT.format(call=call),
             str(Path(__file__).parent), str(text), str(output)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """Folders of one process and of two."""
    folder = tmp_path_factory.mktemp("processes")
    started = launch("train_all", text, folder / "two")
    train_all(text, folder / "one", ranks=1)
    for process in started:
        _, errors = process.communicate(timeout=150)
        assert process.returncode == 0, errors
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_steps_of_one(trained, case):
    """The same losses, held-out scores and weights at the same global batch, dropout 0."""
    import json

    one, two = (load_file(trained / n / case / "model.safetensors") for n in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0, msg=name)
    before, after = (
        json.loads((trained / n / case / "metrics.json").read_text()) for n in ("one", "two")
    )
    assert after["held_out"] == pytest.approx(before["held_out"], abs=1e-5)
    for term, values in before["losses"].items():
        assert after["losses"][term] == pytest.approx(values, abs=1e-5)


def test_a_dead_process_ends_the_other(text, tmp_path):
    first, second = launch("die_at_step_2", text, tmp_path)
    second.communicate(timeout=120)
    assert second.returncode == 7
    start = time.monotonic()
    _, errors = first.communicate(timeout=DEADLINE)
    assert time.monotonic() - start < DEADLINE
    assert first.returncode == 1
    assert "another process of this run has ended or does not answer" in errors
