"""Distillation from cached lessons in two gloo processes: rank 0 asks the teacher, both learn."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tinybert_fast.testing.tiny_models import sentiment_rows, tiny_config, tiny_encoder
from tinybert_fast.training.recipes import distill_general

EXAMPLES, GLOBAL_BATCH = 48, 8
SCRIPT = """
import sys
from tinybert_fast.training.recipes import distill_general
folder = sys.argv[1]
distill_general(f"{folder}/encoder", f"{folder}/student.json", f"{folder}/corpus.txt",
    f"{folder}/two", batch_size=4, cache_teacher=f"{folder}/lessons", epochs=2, lr=3e-3,
    max_length=16, log_steps=1, progress=False)
"""


def test_two_processes_share_the_lessons_and_take_the_steps_of_one(tmp_path):
    tiny_encoder(tmp_path / "encoder", hidden_size=32, num_hidden_layers=4, intermediate_size=64)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    student = tmp_path / "student.json"
    tiny_config(**still).to_json_file(student)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(text for text, _ in sentiment_rows(EXAMPLES)) + "\n")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}  # fmt: skip
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=tmp_path,
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(120) for process in running] == [0, 0]
    finally:
        for process in running:
            process.kill()
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    one = distill_general(
        tmp_path / "encoder", student, corpus, tmp_path / "one", batch_size=GLOBAL_BATCH, epochs=2,
        lr=3e-3, max_length=16, log_steps=1, progress=False,
    )  # fmt: skip
    assert two["steps"] == one["steps"] == 2 * EXAMPLES // GLOBAL_BATCH
    # A mean over tokens of each process, then of both: near the mean over the tokens of a step.
    for term, values in one["losses"].items():
        assert two["losses"][term] == pytest.approx(values, rel=0.02), term
    manifest = json.loads((tmp_path / "lessons" / "general" / "lessons.json").read_text())
    assert sum(manifest["files"].values()) > 0
    assert not list(tmp_path.rglob("*.partial"))
