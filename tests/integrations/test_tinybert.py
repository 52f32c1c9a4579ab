"""TinyBert*: Transformers' BERT in TinyBERT's sizes, accelerated, saved as plain BERT."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import BertConfig, BertTokenizer
from transformers.utils import output_capturing

import tinybert_fast as tbf
from tinybert_fast import integrations

HEADS = (
    "Model",
    "ForPreTraining",
    "ForMaskedLM",
    "ForNextSentencePrediction",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
# Loads each folder where importing tinybert_fast fails, and keeps what the model gives.
ELSEWHERE = """
import sys
sys.modules["tinybert_fast"] = None
import torch
from transformers import BertForPreTraining
inputs = torch.load("inputs.pt")
for folder in sys.argv[1:]:
    model, report = BertForPreTraining.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        output = model.eval()(**inputs)
    torch.save(dict(output), folder + ".pt")
"""


def tiny(**changes):
    sizes = {"vocab_size": 97, "num_hidden_layers": 2, "max_position_embeddings": 32}
    return tbf.TinyBertConfig.tiny_4l_312(**{**sizes, **changes})


def test_presets():
    small, large = tbf.TinyBertConfig.tiny_4l_312(), tbf.TinyBertConfig.tiny_6l_768()
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
    assert [getattr(small, n) for n in names] == [4, 312, 1200, 12]
    assert [getattr(large, n) for n in names] == [6, 768, 3072, 12]
    assert small.to_dict() == tbf.TinyBertConfig().to_dict()
    changed = tbf.TinyBertConfig.tiny_6l_768(num_labels=5, num_hidden_layers=3)
    assert (changed.num_labels, changed.num_hidden_layers, changed.hidden_size) == (5, 3, 768)
    with torch.device("meta"):
        assert 14.3e6 < tbf.TinyBertModel(small).num_parameters() < 14.6e6  # 14.5 M in the paper
        assert 66e6 < tbf.TinyBertModel(large).num_parameters() < 67.5e6  # 67.0 M


@pytest.mark.parametrize("preset", ["tiny_4l_312", "tiny_6l_768"])
def test_config_reads_as_plain_bert(tmp_path, preset):
    config = getattr(tbf.TinyBertConfig, preset)(vocab_size=97)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "bert"
    assert "Tiny" not in json.dumps(written)
    plain = BertConfig.from_pretrained(tmp_path)
    assert type(transformers.AutoConfig.from_pretrained(tmp_path)) is BertConfig
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"):
        assert getattr(plain, name) == getattr(config, name)
    assert tbf.TinyBertConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("head", HEADS)
def test_is_accelerated_and_saves_as_plain_bert(tmp_path, head):
    model = getattr(tbf, f"TinyBert{head}")(tiny())
    plain = getattr(transformers, f"Bert{head}")
    assert isinstance(model, plain)
    assert tbf.is_accelerated(model)
    assert list(model.state_dict()) == list(plain(tiny()).state_dict())
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "bert"
    assert written["architectures"] == [f"Bert{head}"]
    assert "tinybert_fast" not in json.dumps(written)
    for again in (type(model).from_pretrained(tmp_path), plain.from_pretrained(tmp_path)):
        for name, weight in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], weight), name
    assert type(type(model).from_pretrained(tmp_path)) is type(model)
    assert not tbf.is_accelerated(plain.from_pretrained(tmp_path))
    assert tbf.is_accelerated(type(model).from_pretrained(tmp_path))


def test_loads_in_a_process_without_tinybert_fast(tmp_path, cases):
    torch.manual_seed(0)
    models = {
        "tiny": tbf.TinyBertForPreTraining(tiny()),
        "accelerated": tbf.accelerate(transformers.BertForPreTraining(cases.config())),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    batch = cases.batch("right")
    torch.save(batch, tmp_path / "inputs.pt")
    command = [sys.executable, "-c", ELSEWHERE, *models]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300)
    mask = batch["attention_mask"].bool()
    for name, model in models.items():
        ours, theirs = model.eval()(**batch), torch.load(tmp_path / f"{name}.pt")
        for key, rows in (("prediction_logits", mask), ("seq_relationship_logits", slice(None))):
            torch.testing.assert_close(ours[key][rows], theirs[key][rows], atol=1e-5, rtol=1e-5)


def test_loads_a_checkpoint_of_another_head(tmp_path):
    """The step from a general student to a task: encoder weights taken over, the head new."""
    student = tbf.TinyBertForPreTraining(tiny())
    student.save_pretrained(tmp_path)
    task = tbf.TinyBertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert task.classifier.out_features == 5
    assert torch.equal(
        task.bert.encoder.layer[1].output.dense.weight,
        student.bert.encoder.layer[1].output.dense.weight,
    )


@pytest.mark.parametrize("head", HEADS)
def test_restore_and_accelerate_again(cases, head, monkeypatch):
    model = getattr(tbf, f"TinyBert{head}")(tiny()).eval()
    batch = cases.batch("right")
    ours = model(**batch)[0]
    # As in a process that has built no plain BertModel.
    registry = type(output_capturing._CAN_RECORD_REGISTRY)()
    monkeypatch.setattr(output_capturing, "_CAN_RECORD_REGISTRY", registry)
    assert not tbf.is_accelerated(tbf.restore(model))
    theirs = model(**batch, output_hidden_states=True)
    assert len(theirs.hidden_states) == 3
    assert tbf.is_accelerated(tbf.accelerate(model))
    assert torch.equal(model(**batch)[0], ours)


@pytest.mark.parametrize("head", HEADS)
def test_auto_classes_take_the_config(tmp_path, head):
    """And what is saved is read as BERT."""
    auto = getattr(transformers, f"Auto{head}" if head == "Model" else f"AutoModel{head}")
    model = auto.from_config(tiny())
    assert type(model) is getattr(tbf, f"TinyBert{head}")
    assert tbf.is_accelerated(model)
    model.save_pretrained(tmp_path)
    assert type(auto.from_pretrained(tmp_path)) is getattr(transformers, f"Bert{head}")
    again = auto.from_pretrained(tmp_path, config=tiny())
    assert type(again) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))


def test_takes_a_plain_config():
    assert tbf.is_accelerated(tbf.TinyBertModel(BertConfig(**tiny().to_dict())))


def test_tokenizer_is_berts(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = tbf.TinyBertTokenizer.from_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path / "saved")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved", config=tiny())
    assert isinstance(again, BertTokenizer)
    assert again("a film")["input_ids"] == tokenizer("a film")["input_ids"] == [2, 5, 6, 3]


def test_every_name_is_exported():
    for name in integrations.__all__:
        assert getattr(tbf, name) is getattr(integrations, name)
