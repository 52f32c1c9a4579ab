"""Folders as the TinyBERT authors released them: loaded, run, distilled further, saved anew."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertForPreTraining,
    BertForSequenceClassification,
)

import tinybert_fast as tbf
from tinybert_fast.data import Task
from tinybert_fast.integrations import bert
from tinybert_fast.testing.tiny_models import (
    sentiment_file,
    sentiment_rows,
    tiny_classifier,
    tiny_config,
    tiny_encoder,
    tiny_tokenizer,
)
from tinybert_fast.training.evaluate import evaluate
from tinybert_fast.training.loading import (
    load_classifier,
    load_config,
    load_encoder,
    load_pretraining,
    load_saved,
    load_tokenizer,
)
from tinybert_fast.training.recipes import distill_general, distill_task

FIELDS = (
    "attention_probs_dropout_prob", "hidden_act", "hidden_dropout_prob", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads",
    "num_hidden_layers", "type_vocab_size", "vocab_size",
)  # fmt: skip
TEACHER = {"hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64}


def release(folder: Path, kind, *, maps=("fit_dense",), safetensors=False) -> nn.Module:
    """Write a folder as they are: old config, old names, vocabulary alone; returns its model."""
    tiny_tokenizer(folder)
    for file in folder.iterdir():
        if file.name != "vocab.txt":
            file.unlink()
    torch.manual_seed(0)
    model = kind(tiny_config(initializer_range=0.3)).eval()
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): value.clone()
        for name, value in model.state_dict().items()
    }
    for at, name in enumerate(maps):
        state[f"{name}.weight"] = torch.full((32, 24), at + 1.0)
        state[f"{name}.bias"] = torch.full((32,), at + 0.5)
    if safetensors:
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    config = {name: getattr(model.config, name) for name in FIELDS}
    config |= {"cell": {}, "emb_size": 24, "pre_trained": "", "structure": []}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def batch(tokenizer):
    texts = [text for text, _ in sentiment_rows(6)]
    return tokenizer(texts, padding=True, return_tensors="pt")


def by_hand(model, inputs):
    """The authors' class: logits = classifier(relu(pooler))."""
    with torch.no_grad():
        return model.classifier(torch.relu(model.bert(**inputs).pooler_output))


@pytest.mark.parametrize("safetensors", [False, True], ids=["bin", "safetensors"])
def test_general_folders_load_as_encoder_and_with_their_heads(tmp_path, safetensors):
    folder = tmp_path / "General"
    model = release(folder, BertForPreTraining, safetensors=safetensors)
    assert load_config(folder).model_type == "bert"
    inputs = batch(load_tokenizer(folder))
    assert inputs["input_ids"][0, 0] == 2  # [CLS]
    pretrained, new = load_pretraining(folder)
    assert not new
    with torch.no_grad():
        want = model(**inputs)
        assert torch.equal(
            load_encoder(folder).eval()(**inputs).last_hidden_state,
            model.bert(**inputs).last_hidden_state,
        )
        got = pretrained.eval()(**inputs)
    assert torch.equal(got.prediction_logits, want.prediction_logits)
    assert torch.equal(got.seq_relationship_logits, want.seq_relationship_logits)
    with pytest.raises(ValueError, match="no trained classification head"):
        load_classifier(folder)


def test_classifiers_get_their_relu_and_keep_it(tmp_path, caplog):
    folder, saved = tmp_path / "official", tmp_path / "saved"
    model = release(folder, BertForSequenceClassification)
    inputs = batch(load_tokenizer(folder))
    want = by_hand(model, inputs)
    with torch.no_grad():
        assert not torch.allclose(model(**inputs).logits, want, atol=1e-2)
        loaded = load_classifier(folder).eval()
        torch.testing.assert_close(loaded(**inputs).logits, want)
        fast = tbf.accelerate(load_classifier(folder).eval())
        torch.testing.assert_close(fast(**inputs).logits, want, rtol=1e-4, atol=1e-5)
        options = {"pooled_relu": True}
        tiny = tbf.TinyBertForSequenceClassification.from_pretrained(folder, **options).eval()
        torch.testing.assert_close(tiny(**inputs).logits, want, rtol=1e-4, atol=1e-5)
        bert._warn.cache_clear()
        for one in (loaded, tiny):
            one.save_pretrained(saved)
            written = json.loads((saved / "config.json").read_text())
            assert written["architectures"] == ["BertForSequenceClassification"]
            assert (written["model_type"], written["pooled_relu"]) == ("bert", True)
            assert not any("fit_dense" in name for name in load_file(saved / "model.safetensors"))
            for load in (
                load_classifier,
                load_saved,
                tbf.TinyBertForSequenceClassification.from_pretrained,
            ):
                again = load(saved).eval()
                torch.testing.assert_close(again(**inputs).logits, want, rtol=1e-4, atol=1e-5)
        assert caplog.text.count("plain Transformers leaves out") == 1
        plain = AutoModelForSequenceClassification.from_pretrained(saved).eval()
        assert torch.equal(plain(**inputs).logits, model(**inputs).logits)  # as the docs say


def test_the_relu_is_there_in_training_too(tmp_path):
    model = release(tmp_path / "official", BertForSequenceClassification)
    trained = load_classifier(tmp_path / "official").train()
    assert trained.dropout.p == model.dropout.p == 0.1
    pooled = torch.tensor([[-1.0, 2.0]])
    trained.dropout.p = 0.0
    assert trained.dropout(pooled).tolist() == [[0.0, 2.0]]


def test_a_config_that_says_no_and_a_new_head_have_none(tmp_path):
    folder = tmp_path / "official"
    release(folder, BertForSequenceClassification)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pooled_relu": False}))
    assert type(load_classifier(folder).dropout) is nn.Dropout
    release(folder, BertForPreTraining)
    new = load_classifier(folder, Task(labels=("bad", "good")))
    assert type(new.dropout) is nn.Dropout
    tiny_classifier(tmp_path / "ours")
    ours = load_classifier(tmp_path / "ours")
    assert type(ours) is BertForSequenceClassification
    assert not hasattr(ours.config, "pooled_relu")


def test_they_go_on_as_students(tmp_path):
    """General, then task distillation, with the projection that was among the weights; a released
    task student too, whose ReLU stays.
    """
    encoder = tiny_encoder(tmp_path / "encoder", **TEACHER)
    teacher = tiny_classifier(tmp_path / "teacher", **TEACHER)
    (tmp_path / "corpus.txt").write_text("\n".join(t for t, _ in sentiment_rows(20)) + "\n")
    sentiment_file(tmp_path / "train.csv", 20)
    release(tmp_path / "General", BertForPreTraining, maps=[f"fit_denses.{m}" for m in range(3)])
    common = {"progress": False, "batch_size": 10, "max_length": 16}
    options = {**common, "shared_projection": False, "lr": 0.0, "steps": 1}
    distill_general(
        encoder, tmp_path / "General", tmp_path / "corpus.txt", tmp_path / "a", **options
    )
    projection = load_file(tmp_path / "a" / "projection.safetensors")
    assert [projection[f"fit_denses.{m}.weight"].mean() for m in range(3)] == [1.0, 2.0, 3.0]

    release(tmp_path / "task", BertForSequenceClassification)
    options = {**common, "intermediate_epochs": 1, "prediction_epochs": 1}
    files = tmp_path / "train.csv", tmp_path / "train.csv"
    metrics = distill_task(teacher, tmp_path / "task", *files, tmp_path / "b", **options)
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["pooled_relu"] is True
    names = load_file(tmp_path / "b" / "model.safetensors").keys()
    assert names == BertForSequenceClassification(tiny_config()).state_dict().keys()
    scores = evaluate(tmp_path / "b", tmp_path / "train.csv", progress=False)
    assert scores["accuracy"] == metrics["dev"]["accuracy"]


def test_a_folder_that_is_no_bert_is_not_taken_for_one(tmp_path):
    release(tmp_path / "official", BertForPreTraining)
    (tmp_path / "official" / "config.json").write_text('{"n_layer": 12}')
    with pytest.raises(ValueError, match="model_type"):
        load_config(tmp_path / "official")
