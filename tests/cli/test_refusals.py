"""Bad input: one line on stderr, exit code 2, nothing left behind."""

import re
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from tinybert_fast.testing.tiny_models import WORDS, tiny_classifier, tiny_encoder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_classifier(tmp_path_factory.mktemp("teacher"), num_hidden_layers=4)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_missing_file(cli, files, out):
    answer = cli("finetune", files / "encoder", "--train", "nowhere.csv", "-o", out)
    assert "nowhere.csv does not exist" in answer.line
    assert not out.exists()


def test_missing_model(cli, files, out):
    answer = cli("finetune", out / "bert", "--train", files / "train.csv", "-o", out)
    assert "expected a Transformers model folder" in answer.line


def test_missing_corpus(cli, files, out):
    answer = cli(
        "distill", files / "encoder", "--corpus", out / "no.txt", "--student",
        files / "student.json", "-o", out,
    )  # fmt: skip
    assert "no.txt" in answer.line
    assert not out.exists()


def test_missing_column(cli, files, out):
    answer = cli(
        "finetune", files / "encoder", "--train", files / "train.csv", "--text", "body", "-o", out
    )
    assert "no column 'body'; it has 'sentence', 'label'" in answer.line
    assert not out.exists()


def test_empty_text(cli, files, out, tmp_path):
    bad = csv(tmp_path / "bad.csv", "text,label\na film,good\n ,bad\n")
    answer = cli("finetune", files / "encoder", "--train", bad, "-o", out)
    assert "bad.csv: row 2" in answer.line
    assert "is empty" in answer.line


def test_label_never_seen_in_training(cli, files, teacher, out, tmp_path):
    odd = csv(tmp_path / "odd.csv", "text,label\na film,good\na film,so-so\n")
    train = ("finetune", files / "encoder", "--train", files / "train.csv", "-o", out)
    for answer in (cli("evaluate", teacher, odd), cli(*train, "--dev", odd)):
        assert "row 2 has the label 'so-so', never seen in training" in answer.line
        assert "'bad', 'good'" in answer.line


def test_different_vocabularies(cli, files, teacher, out, tmp_path):
    task = ("distill", teacher, "--train", files / "train.csv", "-o", out)
    fewer = tiny_encoder(tmp_path / "fewer", words=WORDS[:-1])
    other = tiny_encoder(tmp_path / "other", words=(*WORDS[:-1], "!"))
    for student in (fewer, other):
        answer = cli(*task, "--student", student)
        assert "word pieces" in answer.line
        assert "give the student the teacher's vocabulary" in answer.line


def commands(files, encoder, classifier, out):
    """What reads texts with a model."""
    student = ("--student", files / "student.json", "-o", out)
    yield "finetune", encoder, "--train", files / "train.csv", "-o", out
    yield "evaluate", classifier, files / "dev.csv"
    yield "distill", encoder, "--corpus", files / "corpus.txt", *student
    yield "distill", classifier, "--train", files / "train.csv", *student


def test_no_tokenizer(cli, files, teacher, out, tmp_path):
    """Transformers makes one of no words, to which every word is unknown."""
    bare = [
        shutil.copytree(folder, tmp_path / name, ignore=shutil.ignore_patterns("*vocab*", "token*"))
        for name, folder in (("encoder", files / "encoder"), ("classifier", teacher))
    ]
    for command in commands(files, *bare, out):
        assert "holds no tokenizer (tokenizer.json or vocab.txt)" in cli(*command).line
    assert not out.exists()


def test_more_word_pieces_than_embeddings(cli, files, out, tmp_path):
    models = tiny_encoder(tmp_path / "a"), tiny_classifier(tmp_path / "b")
    for folder in models:
        tiny_encoder(tmp_path / "c", words=(*WORDS, "!")).joinpath("tokenizer.json").replace(
            folder / "tokenizer.json"
        )
    for command in commands(files, *models, out):
        assert "knows 25 word pieces and the tokenizer has 26" in cli(*command).line


@pytest.mark.parametrize("how", ["finetune", "evaluate", "corpus", "train"])
def test_other_architectures(cli, files, out, tmp_path, how):
    shutil.copytree(files / "encoder", tmp_path, dirs_exist_ok=True)  # its tokenizer
    sizes = {"dim": 24, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "vocab_size": len(WORDS)}
    DistilBertForSequenceClassification(DistilBertConfig(**sizes)).save_pretrained(tmp_path)
    command = {
        "finetune": ("finetune", tmp_path, "--train", files / "train.csv", "-o", out),
        "evaluate": (
            "evaluate",
            tmp_path,
            csv(tmp_path / "a.csv", "text,label\na film,0\na film,1\n"),
        ),
        "corpus": ("distill", tmp_path, "--corpus", files / "corpus.txt", "-o", out),
        "train": ("distill", tmp_path, "--train", files / "train.csv", "-o", out),
    }[how]
    if how in ("corpus", "train"):
        assert "is a distilbert model; expected BERT" in cli(*command).line
        return
    said = "is a distilbert model, and only BERTs are accelerated; run it as Transformers does"
    assert said in cli(*command).line
    assert cli(*command, "--plain", *(["--epochs", 1] if how == "finetune" else [])).code == 0


def test_different_head_counts(cli, files, out, tmp_path):
    student = tiny_encoder(tmp_path / "student", num_attention_heads=4)
    answer = cli(
        "distill", files / "encoder", "--corpus", files / "corpus.txt", "--student", student,
        "-o", out,
    )  # fmt: skip
    assert "give the student num_attention_heads=2" in answer.line


def test_layers_that_do_not_divide(cli, files, out, tmp_path):
    teacher = tiny_encoder(tmp_path / "teacher", num_hidden_layers=3)
    answer = cli(
        "distill", teacher, "--corpus", files / "corpus.txt", "--student", files / "student.json",
        "-o", out,
    )  # fmt: skip
    assert "for instance 0:0,1:2,2:3" in answer.line


@pytest.mark.parametrize("how", ["finetune", "distill"])
def test_nan_loss_names_the_step(cli, files, teacher, out, how):
    data = ("--train", files / "train.csv", "-o", out, "--batch-size", 8, "--warmup", 0)
    if how == "finetune":
        answer = cli(how, files / "encoder", *data, "--lr", 1e30)
    else:
        answer = cli(how, teacher, *data, "--student", files / "student.json",
                     "--intermediate-lr", 1e30)  # fmt: skip
    assert "NaN or infinite" in answer.line
    assert "step " in answer.line
    assert not (out / "config.json").exists()


def test_nan_loss_keeps_the_last_good_checkpoint(cli, files, out, monkeypatch):
    from tinybert_fast.training.common import RunTrainer

    step = RunTrainer.compute_loss

    def spoilt(self, *arguments, **more):
        loss = step(self, *arguments, **more)
        return loss * float("nan") if self.state.global_step == 5 else loss

    monkeypatch.setattr(RunTrainer, "compute_loss", spoilt)
    answer = cli(
        "finetune", files / "encoder", "--train", files / "train.csv", "--dev", files / "dev.csv",
        "-o", out, "--batch-size", 8, "--eval-steps", 2,
    )  # fmt: skip
    assert "at step 6 of" in answer.line
    assert "checkpoint-4" in answer.line
    assert (out / "checkpoints" / "train" / "checkpoint-4" / "model.safetensors").exists()


def test_a_model_is_not_overwritten_unasked(cli, files, teacher, tmp_path):
    held = tmp_path / "held"
    shutil.copytree(teacher, held)
    run = ("finetune", files / "encoder", "--train", files / "train.csv", "-o", held,
           "--epochs", 1, "--batch-size", 16)  # fmt: skip
    assert "already holds a model" in cli(*run).line
    assert "--overwrite" in cli(*run).line
    assert "--overwrite" in cli(*run, "--resume").line
    assert "exclude each other" in cli(*run, "--resume", "--overwrite").line
    assert cli(*run, "--overwrite").code == 0


class Interrupted(BaseException):
    pass


def test_interrupted_run_resumes_to_the_same_weights(cli, files, tmp_path, monkeypatch):
    run = ("finetune", files / "encoder", "--train", files / "train.csv", "--dev",
           files / "dev.csv", "--epochs", 2, "--batch-size", 8, "--eval-steps", 4)  # fmt: skip
    assert cli(*run, "-o", tmp_path / "whole").code == 0

    from tinybert_fast.training.common import RunTrainer

    step = RunTrainer.training_step

    def stop(self, *arguments, **more):
        if self.state.global_step == 9:
            raise Interrupted
        return step(self, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "training_step", stop)
        with pytest.raises(Interrupted):
            cli(*run, "-o", tmp_path / "cut")
    assert "--resume" in cli(*run, "-o", tmp_path / "cut").line
    other = cli(*run, "-o", tmp_path / "cut", "--resume", "--seed", 1)
    assert "seed was 0, now 1" in other.line

    last = tmp_path / "cut" / "checkpoints" / "train" / "checkpoint-8"
    weights = (last / "model.safetensors").read_bytes()
    (last / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    truncated = cli(*run, "-o", tmp_path / "cut", "--resume")
    assert "model.safetensors is truncated" in truncated.line
    assert "checkpoint-4" in truncated.line

    (last / "model.safetensors").write_bytes(weights)
    assert cli(*run, "-o", tmp_path / "cut", "--resume").code == 0
    same = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert same[0] == same[1]


def test_truncated_model(cli, files, teacher, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(teacher, cut)
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "truncated or damaged" in cli("evaluate", cut, files / "dev.csv").line


def test_longer_text_than_positions_is_cut_and_counted(cli, teacher, tmp_path, caplog):
    long = csv(tmp_path / "long.csv", f"text,label\n{'film ' * 80},good\na film,bad\n")
    answer = cli("evaluate", teacher, long)
    assert answer.code == 0, answer.err
    assert "truncated 1 of 2 texts to 40 tokens" in caplog.text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), "got neither"),
        (("--corpus", "a.txt", "--train", "b.csv"), "got both"),
        (("--corpus", "a.txt", "--temperature", 2), "--temperature belongs to task distillation"),
        (("--train", "b.csv", "--steps", 2), "--steps belongs to general distillation"),
    ],
    ids=["neither", "both", "task-option", "general-option"],
)
def test_general_or_task(cli, files, out, more, words):
    assert words in cli("distill", files / "encoder", "-o", out, *more).line


def test_lessons_of_another_teacher_or_without_room(cli, files, out, tmp_path, monkeypatch):
    run = ("distill", files / "encoder", "--corpus", files / "corpus.txt", "--student",
           files / "student.json", "--steps", 1, "--cache-folder", tmp_path / "kept")  # fmt: skip
    assert "ask for them" in cli(*run[:-2], "--cache-dtype", "fp16", "-o", out).line
    taken = cli(*run[:-1], files / "train.csv", "-o", out)
    assert "train.csv is a file; expected a folder for cached lessons" in taken.line
    assert "'int4'" in cli(*run, "--teacher-dtype", "int4", "-o", out).line
    assert not out.exists()
    assert cli(*run, "-o", out).code == 0
    other = tiny_encoder(tmp_path / "other", seed=1, num_hidden_layers=4)
    again = cli(run[0], other, *run[2:], "-o", tmp_path / "again")
    assert "made from something else (teacher was" in again.line
    last = tmp_path / "kept" / "general" / "00000.safetensors"
    last.write_bytes(last.read_bytes()[:100])
    assert "the lessons are cut short; remove" in cli(*run, "-o", tmp_path / "cut").line
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    full = cli(*run[:-1], tmp_path / "full", "-o", tmp_path / "out2")
    assert re.search(r"would take [\d.]+ .B and .*full/general has 1 kB free; make room", full.line)
    assert not (tmp_path / "full").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch-size", 0), ("--epochs", 0), ("--seed", -1), ("--select-by", "bleu"),
        ("--kind", "ranking"), ("--impl", "cuda"), ("--max-length", 1), ("--accumulation", 0),
        ("--eval-steps", 0), ("--lr", -1), ("--lr", "nan"), ("--weight-decay", -1),
    ],
)  # fmt: skip
def test_values_without_a_meaning(cli, files, out, option, value):
    answer = cli(
        "finetune", files / "encoder", "--train", files / "train.csv", "--dev", files / "dev.csv",
        "-o", out, option, value,
    )  # fmt: skip
    named = option[2:].replace("-", "[_ -]")
    assert re.search(rf"{named}\b.*{value}|{value}.*{named}\b", answer.line), answer.line
    assert not out.exists()


def test_parity_and_init_must_be_known(cli, files, out):
    run = ("distill", files / "encoder", "--corpus", files / "corpus.txt", "--student",
           files / "student.json", "-o", out)  # fmt: skip
    assert "'exact'" in cli(*run, "--parity", "exact").line
    assert "'svd'" in cli(*run, "--init", "svd").line
    assert "'5-6'" in cli(*run, "--matches", "5-6").line


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU for them")
@pytest.mark.parametrize("job", ["finetune", "distill", "distill a task", "pretrain"])
def test_cuda_graphs_need_a_gpu(cli, files, teacher, out, job):
    encoder, student = files / "encoder", files / "student.json"
    arguments = {
        "finetune": ("finetune", encoder, "--train", files / "train.csv"),
        "distill": ("distill", encoder, "--corpus", files / "corpus.txt", "--student", student),
        "distill a task": ("distill", teacher, "--train", files / "train.csv",
                           "--student", student),
        "pretrain": ("pretrain", files / "corpus.txt", "--no-nsp"),
    }[job]  # fmt: skip
    answer = cli(*arguments, "-o", out, "--cuda-graphs")
    assert "cuda_graphs cannot serve this run: this run is on cpu" in answer.line, answer.line
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--loss", "distilbert"), "loss is 'distilbert'; expected one of tinybert, minilm"),
        (("--relations", "qq"), "relations belongs to loss='minilm'"),
        (("--loss", "minilm", "--matches", "0:0,1:2,2:4"), "matches belongs to loss='tinybert'"),
        (("--loss", "minilm", "--projection-per-layer"), "projection_per_layer belongs to"),
        (("--loss", "minilm", "--parity", "official"), "parity='official' is the code that"),
        (("--loss", "minilm", "--relations", "qq,vq"), "relation 'vq' is not one of qk, qq, kk"),
        (("--loss", "minilm", "--relation-heads", 3), "relation_heads among 1, 2, 4, 8"),
        (("--loss", "minilm", "--teacher-layer", 5), "the teacher has layers 1..4"),
    ],
)
def test_options_of_a_loss(cli, files, out, options, complaint):
    answer = cli(
        "distill", files / "encoder", "--corpus", files / "corpus.txt", "--student",
        files / "student.json", "-o", out, *options,
    )  # fmt: skip
    assert complaint in answer.line
    assert not out.exists()


@pytest.mark.parametrize("option", ["--json", "--predictions"])
def test_a_file_to_write_that_is_a_folder(cli, files, teacher, tmp_path, option):
    answer = cli("evaluate", teacher, files / "dev.csv", option, tmp_path)
    assert f"{option} {tmp_path} is a folder" in answer.line


def test_disk_errors_leave_no_half_file(cli, files, teacher, tmp_path, monkeypatch):
    (tmp_path / "result.json").write_text("old")

    def full(*arguments):
        raise PermissionError("no space for you")

    monkeypatch.setattr("os.replace", full)
    answer = cli("evaluate", teacher, files / "dev.csv", "--json", tmp_path / "result.json")
    assert "no space" in answer.line
    assert (tmp_path / "result.json").read_text() == "old"


def test_verbose_shows_where_an_error_came_from(cli):
    with pytest.raises(FileNotFoundError):
        cli("--verbose", "evaluate", "nowhere", "no.csv")
    assert "config.json" in cli("evaluate", ".", "no.csv").line


def test_a_bug_is_not_bad_input(cli, files, teacher, monkeypatch):
    def broken(*arguments, **more):
        raise TypeError("a bug")

    monkeypatch.setattr("tinybert_fast.training.evaluate.predict", broken)
    with pytest.raises(TypeError, match="a bug"):
        cli("evaluate", teacher, files / "dev.csv")


def save_safely(tensors, path):
    from safetensors.torch import save_file

    save_file(tensors, path)


@pytest.mark.parametrize("save", [torch.save, save_safely])
def test_a_disk_that_fills_up_under_a_checkpoint(cli, tmp_path, monkeypatch, save):
    """Said in a line, though neither writer raises an OSError."""

    def command(args, standalone_mode):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        try:
            save({"x": torch.ones(1_000_000)}, tmp_path / "checkpoint")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr("tinybert_fast.cli.app.app", command)
    assert "is the disk full?" in cli("pretrain").line
