"""LessonCache: what the live teacher says, of any examples in any order; whole or refused."""

import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from transformers import BertForSequenceClassification

import tinybert_fast as tbf
from tinybert_fast.data import LengthCollator
from tinybert_fast.data.atomic import partial_of
from tinybert_fast.testing.tiny_models import sentiment_rows, tiny_config, tiny_tokenizer
from tinybert_fast.training import lessons
from tinybert_fast.training.lessons import INDEX, MANIFEST, RECORDS, LessonCache, in_words
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.teacher import classify, record

MADE_FROM = {"teacher": "a1", "examples": "b2", "states": {"hidden_states": (0, 2)}}
MATCHES = LayerMatches.parse("hidden=0:0,1:2 attention=1:3,2:4")
STATES = {"hidden.0", "hidden.2", "queries.3", "queries.4", "keys.3", "keys.4"}
BATCH = 4


class Taught:
    """18 examples, and a teacher that counts how often it is asked."""

    def __init__(self, folder: Path, stage: str, packed: bool = True) -> None:
        tokenizer = tiny_tokenizer(folder)
        encoded = dict(tokenizer([text for text, _ in sentiment_rows(18)]))
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        self.examples = Dataset.from_dict(encoded)
        self.collate = LengthCollator(tokenizer, lengths=True)
        torch.manual_seed(0)
        config = tiny_config(num_hidden_layers=4, initializer_range=0.2, num_labels=3)
        self.model = BertForSequenceClassification(config).eval().requires_grad_(False)
        if packed:
            tbf.accelerate(self.model)
        self.stage, self.asked = stage, 0

    def teach(self, batch):
        self.asked += 1
        inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "token_type_ids")}
        if self.stage == "logits":
            return classify(self.model, inputs).logits
        capture = MATCHES.teacher_capture()
        record(self.model, inputs, capture)
        return capture

    def live(self, examples):
        return self.teach(self.collate([self.examples[i] for i in examples]))

    def build(self, folder, **options):
        sources = self.teach, self.examples, self.collate, MADE_FROM
        return LessonCache.build(folder, *sources, **{"batch_size": BATCH, **options})


@pytest.fixture
def taught(tmp_path):
    return Taught(tmp_path / "tokenizer", "states")


def tensors(lesson, lengths=None):
    """{name: tensor} of a lesson, rows of padding left out."""
    if isinstance(lesson, torch.Tensor):
        return {"logits": lesson}
    found = {f"{kind}.{m}": x for kind in RECORDS for m, x in getattr(lesson, kind).items()}
    if lesson.layout is None:
        layout = tbf.SequenceLayout.from_lengths(lengths, next(iter(found.values())).shape[1])
        found = {name: layout.pack(x) for name, x in found.items()}
    return found


@pytest.mark.parametrize("shards", [1, 5], ids=["one_shard", "five_shards"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("stage", ["states", "logits"])
def test_the_same_lesson_as_from_the_live_teacher(tmp_path, monkeypatch, stage, packed, shards):
    """Of the batches that were asked, the same bits; of any other ones, equal but for rounding."""
    taught = Taught(tmp_path / "tokenizer", stage, packed)
    if shards > 1:
        monkeypatch.setattr(lessons, "SHARD_BYTES", 1)  # each batch is one
    cache = taught.build(tmp_path / "cache")
    assert len(cache.shards) == shards
    lengths = taught.examples["length"]
    order = sorted(range(18), key=lambda i: -lengths[i])
    batches = [order[at : at + BATCH] for at in range(0, 18, BATCH)]
    random.Random(0).shuffle(order)
    others = [order[:7], order[7:], [3], [5, 5, 0]]
    for exactly, examples in [(True, b) for b in batches] + [(False, b) for b in others]:
        said = cache.lesson(examples)
        got = tensors(said)
        want = tensors(taught.live(examples), [lengths[i] for i in examples])
        assert got.keys() == want.keys() == (STATES if stage == "states" else {"logits"})
        for name, x in got.items():
            assert x.dtype == want[name].dtype
            if exactly:
                assert torch.equal(x, want[name]), name
            else:
                torch.testing.assert_close(x, want[name], rtol=1e-4, atol=1e-5)
        if stage == "states":
            assert list(said.layout.lengths) == [lengths[i] for i in examples]


def test_a_teacher_is_asked_once_about_each_example_and_then_no_more(taught, tmp_path):
    cache = taught.build(tmp_path / "cache")
    assert taught.asked == 1 + 5  # one for the sizes, 18 / 4
    again = LessonCache.open(tmp_path / "cache", MADE_FROM)
    assert taught.asked == 6
    ours, theirs = (tensors(one.lesson([7, 2])) for one in (cache, again))
    assert all(torch.equal(x, theirs[name]) for name, x in ours.items())


def test_shards_are_mapped(taught, tmp_path):
    taught.build(tmp_path / "cache")
    cache = LessonCache.open(tmp_path / "cache", MADE_FROM)
    with safe_open(tmp_path / "cache" / "00000.safetensors", framework="pt") as file:
        stored = file.get_tensor("hidden.2")
    mapped = cache.shards[0]["hidden.2"]
    assert torch.equal(stored, mapped)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(tmp_path / "cache" / "00000.safetensors") in maps.read_text()
    cache.lesson([0]).hidden[2].zero_()
    assert torch.equal(stored, mapped)  # a lesson is a copy


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_narrow_lessons_come_back_in_the_teachers_dtype(taught, tmp_path, name):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    whole, narrow = taught.build(tmp_path / "whole"), taught.build(tmp_path / name, dtype=name)
    assert narrow.shards[0]["keys.4"].dtype == dtype
    for got, want in zip(
        tensors(narrow.lesson(range(18))).values(), tensors(whole.lesson(range(18))).values()
    ):
        assert got.dtype == torch.float32
        assert torch.equal(got, want.to(dtype).float())
    sizes = [(tmp_path / f / "00000.safetensors").stat().st_size for f in ("whole", name)]
    assert sizes[1] < 0.6 * sizes[0]


def test_numbers_too_large_for_fp16(taught, tmp_path):
    with torch.no_grad():
        taught.model.bert.embeddings.LayerNorm.bias[3] = 1e5
    with pytest.raises(ValueError, match=r"hidden\.0 holds 1e\+05, more than fp16 can; .*in bf16"):
        taught.build(tmp_path / "cache", dtype="fp16")
    assert {p.name for p in tmp_path.iterdir()} == {"tokenizer"}


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"teacher": "c3"}, r"teacher was 'a1', now 'c3'"),
        ({"examples": "d4"}, r"examples was 'b2', now 'd4'"),
        ({"states": "logits"}, r"states was \{'hidden_states': \[0, 2\]\}, now 'logits'"),
        ({"cache_dtype": "fp16"}, r"cache dtype was None, now 'fp16'"),
    ],
    ids=str,
)
def test_made_from_something_else(taught, tmp_path, changes, complaint):
    taught.build(tmp_path / "cache")
    with pytest.raises(ValueError, match=rf"{complaint}\); remove .*cache to have them made again"):
        LessonCache.open(tmp_path / "cache", {**MADE_FROM, **changes})


def test_cut_short_or_absent(taught, tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "SHARD_BYTES", 1)
    folder = tmp_path / "cache"
    with pytest.raises(FileNotFoundError, match=r"no lessons of a teacher in .*cache"):
        LessonCache.open(folder, MADE_FROM)
    assert LessonCache.found(folder, MADE_FROM) is None
    taught.build(folder)
    for name in (INDEX, "00002.safetensors"):
        file = folder / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=rf"{name} has {len(whole) - 1} bytes and should"):
            LessonCache.found(folder, MADE_FROM)
        file.unlink()
        with pytest.raises(ValueError, match=f"{name} has 0 bytes .*the lessons are cut short"):
            LessonCache.open(folder, MADE_FROM)
        file.write_bytes(b"x" * len(whole))
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            LessonCache.open(folder, MADE_FROM)
        file.write_bytes(whole)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(ValueError, match=r"lessons\.json is damaged"):
        LessonCache.open(folder, MADE_FROM)


def test_no_room_is_said_before_anything_is_written(taught, tmp_path, monkeypatch):
    wide = {"hidden": 24, "queries": 24, "keys": 24}  # numbers of a token
    size = 4 * sum(wide.values()) * 2 * sum(taught.examples["length"])

    def free(count):
        monkeypatch.setattr(lessons.shutil, "disk_usage", lambda path: SimpleNamespace(free=count))

    free(size - 1)
    with pytest.raises(ValueError, match=rf"would take {in_words(size)} and .* has .* free; make"):
        taught.build(tmp_path / "deep" / "cache")
    assert taught.asked == 1
    assert not (tmp_path / "deep").exists()
    free(size)
    cache = taught.build(tmp_path / "deep" / "cache")
    assert sum(x.nbytes for shard in cache.shards for x in shard.values()) == size
    free(size // 2)
    taught.build(tmp_path / "half", dtype="bf16")


def test_an_interrupted_build_leaves_nothing(taught, tmp_path):
    teach = taught.teach

    def stop(batch):
        if taught.asked == 3:
            raise KeyboardInterrupt
        return teach(batch)

    taught.teach = stop
    with pytest.raises(KeyboardInterrupt):
        taught.build(tmp_path / "cache")
    assert {p.name for p in tmp_path.iterdir()} == {"tokenizer"}


def test_leftovers_make_room_or_are_named(taught, tmp_path, monkeypatch):
    """Those of a killed run are removed before the room is measured."""
    left = killed_while_writing(tmp_path / "lessons" / "general")
    there = []

    def free(path):
        there.append(left.exists())
        return SimpleNamespace(free=1)

    monkeypatch.setattr(lessons.shutil, "disk_usage", free)
    other = left.with_name(".general.0123abcd.7.partial")
    other.mkdir()
    with pytest.raises(ValueError, match=rf"make room \({other} is of a run that goes on, or was"):
        taught.build(tmp_path / "lessons" / "general")
    assert there == [False]
    assert other.exists()


def killed_while_writing(folder):
    folder.parent.mkdir()
    child = os.fork()
    if child == 0:
        partial_of(folder).mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (left,) = folder.parent.iterdir()
    return left


def test_lessons_of_other_texts(taught, tmp_path):
    cache = taught.build(tmp_path / "cache")
    lengths = taught.examples["length"][:2]
    layout = tbf.SequenceLayout.from_lengths([lengths[0], lengths[1] + 1])
    with pytest.raises(ValueError, match=rf"example 1 has {lengths[1] + 1} tokens in the batch"):
        cache.lesson([0, 1], layout)


def test_what_is_in_the_way_is_left_alone(taught, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "precious").write_text("kept")
    with pytest.raises(FileExistsError, match="is there already"):
        taught.build(tmp_path / "cache")
    assert (tmp_path / "cache" / "precious").read_text() == "kept"
    assert taught.asked == 1


def test_the_manifest_says_what_is_there(taught, tmp_path):
    taught.build(tmp_path / "cache")
    manifest = json.loads((tmp_path / "cache" / MANIFEST).read_text())
    assert manifest["made_from"]["teacher"] == "a1"
    assert manifest["kept"]["queries.3"] == [[2, 12], "float32", "float32"]


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1.5e9, "1.5 GB"), (2.34e13, "23.4 TB")]
)
def test_sizes_in_words(size, words):
    assert in_words(size) == words
