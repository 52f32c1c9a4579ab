"""Scoring a saved model: against a plain loop over Transformers, and what it refuses."""

import json

import numpy as np
import pytest
import torch

from tinybert_fast.data import Task, encode_examples, load_examples
from tinybert_fast.ops.layout import SequenceLayout
from tinybert_fast.testing.tiny_models import sentiment_file, tiny_classifier, tiny_encoder
from tinybert_fast.training.evaluate import evaluate, predict
from tinybert_fast.training.loading import load_classifier, load_encoder, load_tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    tiny_classifier(folder / "model")
    sentiment_file(folder / "test.csv", 30)
    return folder


def one_by_one(folder, texts):
    """Logits without padding, batches or any of our code."""
    model, tokenizer = load_classifier(folder).eval(), load_tokenizer(folder)
    with torch.no_grad():
        rows = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return torch.stack(rows).numpy()


@pytest.mark.parametrize("accelerate", [False, True], ids=["padded", "packed"])
def test_equals_a_plain_loop(made, tmp_path, accelerate):
    examples = load_examples(made / "test.csv")
    logits = one_by_one(made / "model", examples["text"])
    metrics = evaluate(
        made / "model",
        made / "test.csv",
        batch_size=7,
        accelerate=accelerate,
        predictions=tmp_path / "p.jsonl",
        progress=False,
    )
    truth = np.array([name == "good" for name in examples["label"]])
    assert metrics["accuracy"] == pytest.approx(np.mean((logits.argmax(-1) == 1) == truth))
    assert metrics["examples"] == 30
    assert metrics["examples_per_second"] > 0
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [line["label"] for line in lines] == examples["label"][:]
    assert [line["prediction"] == "good" for line in lines] == (logits.argmax(-1) == 1).tolist()
    probability = torch.tensor(logits).softmax(-1).amax(-1)
    assert [line["probability"] for line in lines] == pytest.approx(probability.tolist(), abs=1e-5)


def test_predictions_come_in_the_order_of_the_rows(made):
    examples = load_examples(made / "test.csv")
    model, tokenizer = load_classifier(made / "model"), load_tokenizer(made / "model")
    encoded = encode_examples(examples, tokenizer, Task.of(examples), 40)
    assert encoded["length"][:] != sorted(encoded["length"][:], reverse=True)
    logits = predict(model, encoded, tokenizer, batch_size=4)
    np.testing.assert_allclose(logits, one_by_one(made / "model", examples["text"]), atol=1e-5)


def test_the_device_is_not_asked_for_lengths(made, monkeypatch):
    """Which a GPU would be waited for in each batch."""
    monkeypatch.delattr(SequenceLayout, "from_mask")
    assert evaluate(made / "model", made / "test.csv", progress=False)["examples"] == 30


def test_bf16_is_close(made):
    exact = evaluate(made / "model", made / "test.csv", accelerate=False, progress=False)
    rough = evaluate(made / "model", made / "test.csv", accelerate=False, bf16=True, progress=False)
    assert rough["accuracy"] == pytest.approx(exact["accuracy"], abs=0.2)


def test_regression(tmp_path):
    model = tiny_classifier(tmp_path / "model", ("score",))
    (tmp_path / "a.csv").write_text("text,label\nthe film,1\na good story,2\nbad,3\n")
    metrics = evaluate(model, tmp_path / "a.csv", accelerate=False, progress=False)
    assert {"pearson", "spearman"} <= metrics.keys()


def test_refusals(made, tmp_path):
    with pytest.raises(FileNotFoundError, match="model folder"):
        evaluate(tmp_path / "none", made / "test.csv")
    with pytest.raises(ValueError, match="no trained classification head; fine-tune it first"):
        evaluate(tiny_encoder(tmp_path / "encoder"), made / "test.csv")
    (tmp_path / "a.csv").write_text("text,label\na film,fair\n")
    with pytest.raises(ValueError, match=r"a.csv: row 1 has the label 'fair', never seen"):
        evaluate(made / "model", tmp_path / "a.csv")
    with pytest.raises(ValueError, match="batch_size is 0"):
        evaluate(made / "model", made / "test.csv", batch_size=0, accelerate=False)


def test_long_texts_are_cut_to_the_positions(made, tmp_path, caplog):
    (tmp_path / "a.csv").write_text(f"text,label\n{'very ' * 60},good\ngood,good\n")
    evaluate(made / "model", tmp_path / "a.csv", accelerate=False, progress=False)
    assert "truncated 1 of 2 texts to 40 tokens" in caplog.text


@pytest.mark.parametrize("load", [load_classifier, load_encoder])
def test_a_checkpoint_in_bf16_loads_as_fp32(tmp_path, load):
    folder = tiny_classifier(tmp_path / "model")
    load_classifier(folder).bfloat16().save_pretrained(folder)
    assert {p.dtype for p in load(folder).parameters()} == {torch.float32}
