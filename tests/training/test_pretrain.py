"""pretrain(): text to a model that plain Transformers loads; kill -9 and resume; refusals."""

import json
import logging
import os
import random
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoTokenizer,
    BertForMaskedLM,
    BertForPreTraining,
    BertModel,
    TrainerCallback,
)

from tinybert_fast.data import Corpus, PreTrainingCollator
from tinybert_fast.testing.tiny_models import tiny_config, tiny_encoder, tiny_tokenizer
from tinybert_fast.training import pretrain as recipe
from tinybert_fast.training.pretraining import (
    Objectives,
    PreTraining,
    PreTrainingBatches,
    PreTrainingTrainer,
)
from tinybert_fast.training.recipes import Masking, pretrain

QUICK = {
    "steps": 6,
    "max_length": 32,
    "batch_size": 8,
    "lr": 3e-3,
    "log_steps": 2,
    "checkpoint_steps": 3,
    "progress": False,
}


def corpus_of(text: Path) -> Corpus:
    return Corpus.of(text / "text", documents="files")


def run(text: Path, output: Path, **options):
    """Onto the shards that other tests have made."""
    options = {"model": text / "config.json", "data": text / "data", **QUICK, **options}
    return pretrain(corpus_of(text), output, **options)


def weights(folder: Path):
    return load_file(folder / "model.safetensors")


def test_learns_and_loads_in_plain_transformers(text, tmp_path):
    metrics = run(
        text, tmp_path / "out", held_out=0.2, steps=60, lr=1e-2, eval_steps=30, seed=1,
        masking=Masking(0.3, 0.1, "linear", unit="word", weights="idf",
                        direction="important-less"),
    )  # fmt: skip
    losses = metrics["losses"]["mlm_loss"]
    assert losses["last"] < losses["first"] - 0.5
    held_out = metrics["held_out"]
    assert held_out["loss"] == pytest.approx(held_out["mlm_loss"] + held_out["nsp_loss"])
    assert held_out["mlm_accuracy"] > 0.02
    assert 0 <= metrics["waiting_for_data"] < 1
    assert metrics["tokens_per_second"] > 0
    folder = tmp_path / "out"
    model, info = BertForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == metrics["vocabulary"] <= model.config.vocab_size
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert "curves.png" in (folder / "report.md").read_text()
    assert list((folder / "logs").rglob("events.out.tfevents*"))
    assert json.loads((folder / "config.json").read_text())["architectures"] == [
        "BertForPreTraining"
    ]


def test_shards_and_tokenizer_are_made_once(text, tmp_path):
    run(text, tmp_path / "a")
    made = {file: file.stat().st_mtime_ns for file in (text / "data").rglob("*.arrow")}
    run(text, tmp_path / "b", seed=0)
    assert {f: f.stat().st_mtime_ns for f in (text / "data").rglob("*.arrow")} == made
    run(text, tmp_path / "c", max_length=24)
    assert len(list((text / "data").rglob("*.arrow"))) == len(made) + 1
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["encoder", "pretraining"])
def test_goes_on_with_any_bert(text, tmp_path, kind, caplog):
    if kind == "encoder":
        tiny_encoder(tmp_path / "start")
        saved = BertModel.from_pretrained(tmp_path / "start")
    else:
        tiny_tokenizer(tmp_path / "start")
        saved = BertForPreTraining(tiny_config())
        saved.save_pretrained(tmp_path / "start")
    options = {"model": tmp_path / "start", "data": tmp_path / "data", "lr": 0.0}
    metrics = run(text, tmp_path / "out", nsp=False, steps=2, **options)
    assert "nsp_loss" not in metrics["losses"]
    assert ("they start anew" in caplog.text) == (kind == "encoder")
    ours = BertForPreTraining.from_pretrained(tmp_path / "out")
    same = ours.bert if kind == "encoder" else ours
    for name, value in saved.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], value)
    BertForMaskedLM.from_pretrained(tmp_path / "out")


class Watch(TrainerCallback):
    """What is logged and how held-out text is scored, by step."""

    def __init__(self) -> None:
        self.logged, self.scored = {}, []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.setdefault(state.global_step, {}).update(logs)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.scored.append([value for name, value in metrics.items() if "mlm" in name])


def test_held_out_masks_stay_and_the_ratio_moves(text, tmp_path):
    watch = Watch()
    run(
        text, tmp_path / "out", held_out=0.2, lr=0.0, log_steps=1, epochs=2.0, steps=None,
        eval_steps=5, masking=Masking(0.3, 0.1, "linear"), callbacks=[watch],
    )  # fmt: skip
    assert len(watch.scored) > 3  # in two epochs, and at the end
    assert watch.scored == [watch.scored[0]] * len(watch.scored)
    ratios = [logs["masking_ratio"] for logs in watch.logged.values() if "masking_ratio" in logs]
    steps = len(ratios)
    assert ratios == pytest.approx([0.3 - 0.2 * step / steps for step in range(steps)])


def test_evaluations_while_training_read_few_examples(text, tmp_path, monkeypatch, caplog):
    """The same few each time, from everywhere in the text; the last one reads all."""
    read, evaluate = [], PreTrainingTrainer.evaluate

    def watched(trainer, rows=None, **more):
        read.append((trainer.eval_dataset if rows is None else rows)["example_id"][:])
        return evaluate(trainer, rows, **more)

    monkeypatch.setattr(PreTrainingTrainer, "evaluate", watched)
    caplog.set_level(logging.INFO, logger="tinybert_fast")
    metrics = run(text, tmp_path / "out", held_out=0.2, held_out_examples=7, eval_steps=3)
    every = metrics["held_out_examples"]
    assert f"evaluating on 7 of {every} held-out examples every 3 steps" in caplog.text
    assert [len(ids) for ids in read] == [7, 7, every]
    assert read[0] == read[1]
    few = sorted(read[0])
    assert {b - a for a, b in zip(few, [*few[1:], every])} <= {every // 7, every // 7 + 1}
    assert sorted(read[2]) == list(range(every))


@pytest.fixture
def batches(monkeypatch):
    """Those that are trained on, in order."""
    make, made = PreTrainingBatches.__call__, []

    def watched(self, *given):
        made.append(make(self, *given))
        return made[-1]

    monkeypatch.setattr(PreTrainingBatches, "__call__", watched)
    return made


def test_a_loss_is_the_mean_of_all_micro_batches(text, tmp_path, batches):
    """Each masked token of a step weighs the same, and each pair."""
    watch = Watch()
    options = {"lr": 0.0, "accumulation": 3, "batch_size": 4, "log_steps": 1, "callbacks": [watch]}
    run(text, tmp_path / "out", steps=2, masking=Masking(unit="span"), **options)
    assert len(batches) == 6
    model = PreTraining(BertForPreTraining.from_pretrained(tmp_path / "out"), Objectives())
    for step in (1, 2):
        of_step = batches[3 * step - 3 : 3 * step]
        sums = [model(batch)[0] for batch in of_step]
        masked = sum(len(batch["targets"]["mlm"][1]) for batch in of_step)
        for term, count in (("mlm", masked), ("nsp", 12)):
            want = sum(one[term].item() for one in sums) / count
            assert watch.logged[step][f"{term}_loss"] == pytest.approx(want, rel=1e-5)


def test_token_losses_move_the_masks(text, tmp_path, batches):
    for weights in ("uniform", "loss"):
        run(text, tmp_path / weights, masking=Masking(weights=weights))
    places = [batch["targets"]["mlm"][0].tolist() for batch in batches]
    uniform, loss = places[:6], places[6:]
    assert uniform[0] == loss[0]  # nothing has been seen yet
    assert [one != other for one, other in zip(uniform, loss, strict=True)].count(True) > 2


# ---- the next step's batches, made on a thread ---------------------------------------------------

THREADED = {
    "epochs": {"steps": 24, "batch_size": 4, "accumulation": 3,
               "masking": Masking(0.3, 0.1, "linear", unit="word")},
    "reverse": {"bidirectional": "reverse", "masking": Masking(weights="idf", unit="span",
                                                               direction="important-more")},
    "causal": {"bidirectional": "causal", "accumulation": 2},
}  # fmt: skip


@pytest.fixture
def makers(monkeypatch):
    """Names of the threads that make batches to train on, in order."""
    make, names = PreTrainingBatches.__call__, []

    def watched(self, *given):
        names.append(threading.current_thread().name)
        return make(self, *given)

    monkeypatch.setattr(PreTrainingBatches, "__call__", watched)
    return names


@pytest.mark.parametrize("case", THREADED)
def test_a_thread_makes_the_same_batches(text, tmp_path, monkeypatch, case, batches, makers):
    options, watches = {**THREADED[case], "log_steps": 1}, (Watch(), Watch())
    metrics = run(text, tmp_path / "ahead", callbacks=[watches[0]], **options)
    ahead, names = batches[:], makers[:]
    batches.clear()
    monkeypatch.setattr(PreTrainingTrainer, "looks_ahead", False)
    run(text, tmp_path / "serial", callbacks=[watches[1]], **options)
    assert len(ahead) == len(batches)
    for ours, theirs in zip(tree_leaves(ahead), tree_leaves(batches), strict=True):
        assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    logged = [[logs.get("masking_ratio") for logs in one.logged.values()] for one in watches]
    assert logged[0] == logged[1]
    a, b = (weights(tmp_path / name) for name in ("ahead", "serial"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    if case == "epochs":  # an epoch's first step is made here, its last one is incomplete
        of_an_epoch = metrics["train_examples"] // 4
        assert of_an_epoch % 3 > 0
        begun = -(-24 // -(-of_an_epoch // 3))
        assert begun > 1
    else:
        begun = 1
    assert names.count("MainThread") == begun * options.get("accumulation", 1)
    assert set(names) == {"MainThread", "ahead_0"}


def test_losses_weigh_tokens_when_their_step_has_ended(text, tmp_path, makers):
    run(text, tmp_path / "out", masking=Masking(weights="loss"))
    assert set(makers) == {"MainThread"}


@pytest.mark.parametrize(("device", "ahead"), [("cpu", True), ("cuda:1", False)])
def test_batches_masked_on_a_gpu_are_not_made_ahead(device, ahead):
    batches = SimpleNamespace(collator=SimpleNamespace(masking=SimpleNamespace(device=device)))
    trainer = SimpleNamespace(losses=None, batches=batches)
    assert PreTrainingTrainer.looks_ahead.fget(trainer) is ahead


def test_an_error_of_the_thread_ends_the_training(text, tmp_path, monkeypatch, makers):
    class Damaged(Exception):
        pass

    make = PreTrainingCollator.__call__

    def fail(self, examples):
        if len(makers) == 3:
            raise Damaged
        return make(self, examples)

    monkeypatch.setattr(PreTrainingCollator, "__call__", fail)
    with pytest.raises(Damaged):
        run(text, tmp_path / "out")
    assert makers == ["MainThread", "ahead_0", "ahead_0"]
    assert "ahead_0" not in {thread.name for thread in threading.enumerate()}


class Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


class StopEarly(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_the_thread_ends_with_the_training(text, tmp_path, makers):
    run(text, tmp_path / "whole")
    run(text, tmp_path / "early", callbacks=[StopEarly()])
    with pytest.raises(KeyboardInterrupt):
        run(text, tmp_path / "interrupted", callbacks=[Interrupt()])
    assert makers.count("ahead_0") >= 5
    assert "ahead_0" not in {thread.name for thread in threading.enumerate()}


# ---- kill -9 -------------------------------------------------------------------------------------

DROPPING = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
LONG = {"steps": 18, "checkpoint_steps": 4, "accumulation": 2, "batch_size": 4, "log_steps": 7}
KINDS = {
    "uniform": {},
    "loss": {"masking": Masking(0.3, 0.1, "cosine", weights="loss")},
    "reverse": {"bidirectional": "reverse", "masking": Masking(unit="span")},
}


class Kill(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_and_whole(text: str, folder: str, kind: str, step: str) -> None:
    """A run that is killed, one that is not, and the first again: each in a process of its own."""
    options = {"model": Path(text, "dropping.json"), "data": Path(folder, "data"), **LONG}
    for name, code, more in (
        ("killed", -signal.SIGKILL, {"callbacks": [Kill(int(step))]}),
        ("whole", 0, {}),
        ("killed", 0, {"resume": True}),
    ):
        child = os.fork()
        if child == 0:
            run(Path(text), Path(folder, name), **{**options, **KINDS[kind], **more})
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
        if code:
            assert not Path(folder, name, "config.json").exists()


def test_kill_9_and_resume_give_the_same_bits(text, tmp_path, apart):
    """At a random step, in the middle of it, three times: bit-equal final weights on the CPU."""
    tiny_config(vocab_size=200, **DROPPING).to_json_file(text / "dropping.json")
    calls = []
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        first = (
            LONG["checkpoint_steps"] + 1 if kind == "loss" else 0
        )  # else there is nothing to load
        step = str(random.randint(first, LONG["steps"] - 1))
        calls.append(("killed_and_whole", [str(text), str(tmp_path / kind), kind, step], {}))
    for call, process in zip(calls, apart(__file__, calls)):
        assert process.code == 0, (call, process.errors)
        whole, resumed = (weights(Path(call[1][1], name)) for name in ("whole", "killed"))
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), call


def test_resume_wants_the_same_masks(text, tmp_path):
    run(text, tmp_path / "out", keep_checkpoints=True)
    with pytest.raises(ValueError, match=r"other settings \(masking_ratio was 0.15, now 0.2\)"):
        run(text, tmp_path / "out", resume=True, masking=Masking(0.2))
    assert run(text, tmp_path / "out", resume=True)["steps"] == 6  # has ended: its metrics


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bidirectional": "causal", "masking": Masking(0.2)}, "masks nothing"),
        ({"batch_size": 4000}, r"examples and one step reads 4000 .*smaller batch size"),
        ({"held_out": 0.9}, "expected a share above 0, at most 0.5"),
        ({"held_out": 0.1}, "is one document.*; hold out a larger share, or a text of its own"),
        ({"held_out": 0.01}, "holds no text; .*; hold out a larger share"),
        ({"eval_steps": 3}, "eval_steps is for held-out text, and there is none"),
        ({"vocab_size": 8}, "vocab_size is 8; expected 32 or more"),
        ({"model": "5l-100"}, "no student or model 5l-100"),
        ({"steps": 0}, "steps is 0"),
        ({"held_out": 0.2, "held_out_examples": 0}, "held_out_examples is 0; expected 1"),
    ],
)
def test_refusals(text, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(text, tmp_path / "out", **options)


@pytest.mark.parametrize(
    ("devices", "message"),
    [((), "over GPUs, and this run is on "), (("cpu", "cuda"), "this is one: use torchrun")],
)
def test_sharding_where_it_cannot_be(text, tmp_path, monkeypatch, devices, message):
    monkeypatch.setattr(recipe, "SHARDED_ON", devices)
    with pytest.raises(ValueError, match=message):
        run(text, tmp_path / "out", fsdp=True)


def test_a_vocabulary_does_not_say_whether_case_counts(text, tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(
        ValueError, match=r"holds vocab\.txt alone.*tokenizer_config\.json beside it"
    ):
        run(text, tmp_path / "out", tokenizer=tmp_path)


def test_two_vocabularies_are_refused(text, tmp_path):
    tiny_encoder(tmp_path / "start")
    tiny_tokenizer(tmp_path / "other", ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"))
    with pytest.raises(ValueError, match="was trained with another tokenizer"):
        run(text, tmp_path / "out", model=tmp_path / "start", tokenizer=tmp_path / "other")
    for options in ({"vocab_size": 100}, {"lowercase": True}):
        with pytest.raises(ValueError, match="are for a tokenizer trained on the corpus"):
            run(text, tmp_path / "out", model=tmp_path / "start", **options)
    tiny_config(vocab_size=20).to_json_file(tmp_path / "small.json")
    with pytest.raises(ValueError, match=r"small\.json has 20 word pieces; .* needs 32 or more"):
        run(text, tmp_path / "out", model=tmp_path / "small.json", vocab_size=60)
    tiny_tokenizer(tmp_path / "words")
    with pytest.raises(ValueError, match="20 word pieces and the tokenizer 25"):
        run(text, tmp_path / "out", model=tmp_path / "small.json", tokenizer=tmp_path / "words")
