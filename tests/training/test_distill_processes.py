"""Distillation in two gloo processes: one asks the teacher, and official batches after a resume."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tinybert_fast.testing.tiny_models import sentiment_rows, tiny_config, tiny_encoder
from tinybert_fast.training.lessons import MANIFEST, LessonCache
from tinybert_fast.training.recipes import distill_general

EXAMPLES, GLOBAL_BATCH = 48, 8

# ---- in the processes ----------------------------------------------------------------------------


def distilled(folder: Path, name: str, ranks: int = 2, **options):
    files = [folder / "encoder", folder / "student.json", folder / "corpus.txt"]
    return distill_general(
        *files, folder / name, batch_size=GLOBAL_BATCH // ranks, epochs=2, lr=3e-3,
        max_length=16, log_steps=1, progress=False, **options,
    )  # fmt: skip


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 9:
            raise KeyboardInterrupt


def two(where: str) -> None:
    folder = Path(where)
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            patch.setattr(LessonCache, "found", staticmethod(late(LessonCache.found)))
        distilled(folder, "cached", cache_teacher=folder / "lessons")
    official = {"parity": "official", "checkpoint_steps": 4}
    distilled(folder, "whole", **official)
    with pytest.raises(KeyboardInterrupt):
        distilled(folder, "parts", callbacks=[Stop()], **official)
    distilled(folder, "parts", resume=True, **official)


def late(found):
    """A process that looks for lessons when the first one has made them."""

    def wait(folder, made_from):
        while not (folder / MANIFEST).exists():
            time.sleep(0.05)
        return found(folder, made_from)

    return wait


# ---- what came of it -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, apart, ranks_of):
    """encoder/, student.json (dropout 0), corpus.txt, and what two processes made of them."""
    folder = tmp_path_factory.mktemp("distilled")
    tiny_encoder(folder / "encoder", hidden_size=32, num_hidden_layers=4, intermediate_size=64)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tiny_config(**still).to_json_file(folder / "student.json")
    lines = [text for text, _ in sentiment_rows(EXAMPLES)]
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n")
    for process in apart(__file__, ranks_of("two", folder)):
        assert process.code == 0, process.errors
    return folder


def test_two_processes_share_the_lessons_and_take_the_steps_of_one(folder):
    two = json.loads((folder / "cached" / "metrics.json").read_text())
    one = distilled(folder, "one", ranks=1)
    assert two["steps"] == one["steps"] == 2 * EXAMPLES // GLOBAL_BATCH
    for term, values in one["losses"].items():
        assert two["losses"][term] == pytest.approx(values, rel=1e-4), term
    weights = [load_file(folder / name / "model.safetensors") for name in ("cached", "one")]
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, atol=1e-4, rtol=0, msg=name)
    manifest = json.loads((folder / "lessons" / "general" / MANIFEST).read_text())
    assert sum(manifest["files"].values()) > 0
    assert not list(folder.rglob("*.partial"))


def test_official_batches_go_on_where_they_were(folder):
    """Resumed in the second epoch: the same bits."""
    whole, parts = (load_file(folder / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
