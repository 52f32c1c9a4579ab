"""Reading labelled texts, posing the task, encoding: what is understood and what is refused."""

import json
import logging

import datasets
import pytest

from tinybert_fast.data import Task, encode_examples, load_examples, usable_length
from tinybert_fast.data.tasks import class_order
from tinybert_fast.testing.tiny_models import WORDS, tiny_config, tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write(path, content: str):
    path.write_text(content, encoding="utf-8")
    return path


GLUE_HEADERS = [
    ("sentence", None, "label"),
    ("text", None, "labels"),
    ("sentence1", "sentence2", "score"),
    ("question", "sentence", "label"),
    ("question1", "question2", "is_duplicate"),
    ("premise", "hypothesis", "gold_label"),
]


@pytest.mark.parametrize(("first", "second", "label"), GLUE_HEADERS)
def test_glue_columns(tmp_path, first, second, label):
    names = [name for name in ("idx", first, second, label) if name]
    row = ["7", "the film"] + (["the story"] if second else []) + ["no"]
    file = write(tmp_path / "dev.tsv", "\t".join(names) + "\n" + "\t".join(row) + "\n")
    expected = {"text": ["the film"], "label": ["no"]} | (
        {"text_pair": ["the story"]} if second else {}
    )
    assert load_examples(file).to_dict() == expected


def test_csv_quoting_bom_and_blank_lines(tmp_path):
    file = write(
        tmp_path / "a.csv",
        '\ufefftext,label,source\n"a ""fine"", long\nfilm",good,x\n\nthe end,bad,y\n',
    )
    assert load_examples(file).to_dict() == {
        "text": ['a "fine", long\nfilm', "the end"],
        "label": ["good", "bad"],
    }


def test_tsv_keeps_quotes(tmp_path):
    file = write(tmp_path / "a.tsv", 'sentence\tlabel\n"good film\t1\nsaid "no"\t0\n')
    assert load_examples(file)["text"][:] == ['"good film', 'said "no"']


def test_jsonl_with_a_column_that_comes_late(tmp_path):
    lines = [{"body": "a film", "stars": 2}, {"body": "a story", "stars": 1, "note": "late"}]
    file = write(tmp_path / "a.jsonl", "\n".join(json.dumps(line) for line in lines))
    examples = load_examples(file, text="body", label="stars")
    assert examples.to_dict() == {"text": ["a film", "a story"], "label": ["2", "1"]}


def test_datasets_folder(tmp_path):
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])}
    )
    split = datasets.Dataset.from_dict({"sentence": ["a", "b"], "label": [1, 0]}, features=features)
    datasets.DatasetDict({"train": split}).save_to_disk(tmp_path / "all")
    with pytest.raises(ValueError, match=r"holds the splits 'train'; name one"):
        load_examples(tmp_path / "all")
    assert load_examples(tmp_path / "all" / "train").to_dict() == {
        "text": ["a", "b"],
        "label": ["pos", "neg"],
    }


@pytest.mark.parametrize(
    ("labels", "kind", "dtype"),
    [
        (["0", "1"], "auto", "string"),  # whole numbers are classes
        (["5.000", "3.8"], "auto", "float64"),  # one float makes targets
        (["5", "3.8"], "auto", "float64"),
        (["1", "5"], "regression", "float64"),  # unless said otherwise
        (["1.0", "0.0"], "classification", "string"),
        (["1.0", "none"], "auto", "string"),
    ],
)
def test_kind_of_label(tmp_path, labels, kind, dtype):
    file = write(
        tmp_path / "a.csv", "text,label\n" + "".join(f"a film,{label}\n" for label in labels)
    )
    assert load_examples(file, kind=kind).features["label"].dtype == dtype


REFUSALS = {
    "no file": ("missing.csv", None, {}, FileNotFoundError, "does not exist"),
    "unknown format": ("a.xlsx", "x", {}, ValueError, r"\.csv, \.tsv, \.jsonl"),
    "no content": ("a.csv", "", {}, ValueError, "is empty"),
    "header alone": ("a.csv", "text,label\n", {}, ValueError, "no examples"),
    "no such column": (
        "a.csv",
        "text,label\na,b\n",
        {"text": "body"},
        ValueError,
        "no column 'body'; it has 'text'",
    ),
    "no text column": (
        "a.csv",
        "body,label\na,b\n",
        {},
        ValueError,
        "say which one holds the text",
    ),
    "no label column": (
        "a.csv",
        "text,stars\na,b\n",
        {},
        ValueError,
        "say which one holds the label",
    ),
    "pair alone": ("a.csv", "text,label\na,b\n", {"text_pair": "text"}, ValueError, "name both"),
    "empty text": (
        "a.csv",
        "text,label\na,b\n  ,b\n",
        {},
        ValueError,
        "row 2: column 'text' is empty",
    ),
    "text that is a number": (
        "a.jsonl",
        '{"text": 3, "label": 1}',
        {},
        ValueError,
        "is a int, not text",
    ),
    "empty label": (
        "a.csv",
        "text,label\na,b\nc,\n",
        {},
        ValueError,
        "row 2: column 'label' has no label",
    ),
    "NaN target": ("a.jsonl", '{"text": "a", "label": NaN}', {}, ValueError, "row 1: .* no label"),
    "no number": (
        "a.csv",
        "text,label\na,b\n",
        {"kind": "regression"},
        ValueError,
        "row 1: .*'b'; regression",
    ),
    "unknown kind": (
        "a.csv",
        "text,label\na,b\n",
        {"kind": "ranking"},
        ValueError,
        "'ranking'; expected",
    ),
    "a field too many": ("a.csv", "text,label\na,b\na,b,c\n", {}, ValueError, "row 2 .* 3 fields"),
    "open quote": ("a.csv", 'text,label\n"a,b\n', {}, ValueError, "line 2"),
    "twice a column": ("a.csv", "text,text,label\na,b,c\n", {}, ValueError, "twice"),
    "broken json": (
        "a.jsonl",
        '{"text": "a", "label": 1}\n{"text"\n',
        {},
        ValueError,
        "line 2 is not JSON",
    ),
    "json of a list": ("a.jsonl", "[1]\n", {}, ValueError, "holds a list"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(tmp_path, case):
    name, content, options, error, message = REFUSALS[case]
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(error, match=message):
        load_examples(tmp_path / name, **options)


def test_other_encoding_and_folder_are_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes("text,label\ncafé,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        load_examples(tmp_path / "a.csv")
    with pytest.raises(ValueError, match="save_to_disk"):
        load_examples(tmp_path)


def test_labels_may_be_left_unread(tmp_path):
    file = write(tmp_path / "a.csv", "text,label\na film,\n")
    assert load_examples(file, labelled=False).column_names == ["text"]


# ---- the task ------------------------------------------------------------------------------------


def examples_of(labels, **columns):
    return datasets.Dataset.from_dict({"text": ["a"] * len(labels), "label": labels, **columns})


def test_task_orders_its_classes():
    assert Task.of(examples_of(["10", "9", "no", "9"])).labels == ("9", "10", "no")
    assert Task.of(examples_of(["a", "b"]), ("b", "a")).labels == ("b", "a")
    assert Task.of(examples_of(["a", "b"]), ("LABEL_0", "LABEL_1")).labels == ("a", "b")
    assert Task.of(examples_of(["a", "b"]), ("b", "c"), ("c", "b", "a")).labels == ("b", "a")
    assert Task.of(examples_of(["a", "b"]), ("b", "c", "a"), ("a", "b")).labels == ("b", "c", "a")
    assert Task.of(examples_of([0.5, 1.0], text_pair=["b", "b"])) == Task(text_pair="text_pair")
    with pytest.raises(ValueError, match="one class only, 'a'"):
        Task.of(examples_of(["a", "a"]))


def test_a_folder_orders_its_classes(tmp_path):
    """MRPC's names: sorted, the positive class would come first and F1 be of the other one."""
    names = ("not_equivalent", "equivalent")
    columns = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [1, 0]}
    features = {name: datasets.Value("string") for name in ("sentence1", "sentence2")}
    features["label"] = datasets.ClassLabel(names=list(names))
    made = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    made.save_to_disk(tmp_path / "mrpc")
    task = Task.of(load_examples(tmp_path / "mrpc"), class_order(tmp_path / "mrpc"))
    assert task.labels == names
    assert class_order(tmp_path / "mrpc", "label") == names
    assert class_order(write(tmp_path / "a.csv", "text,label\na,b\n")) == ()


@pytest.mark.parametrize("task", [Task(labels=("b", "a", "c")), Task()])
def test_task_survives_a_config(task):
    config = tiny_config(**task.config_fields())
    assert Task.of_model(type(config).from_dict(config.to_dict())) == task


def test_model_without_names_counts_its_classes():
    assert Task.of_model(tiny_config(num_labels=3)).labels == ("0", "1", "2")


def test_a_model_of_many_labels_is_refused():
    config = tiny_config(num_labels=3, problem_type="multi_label_classification")
    with pytest.raises(ValueError, match=r"any number of 3 labels .*expected one that gives"):
        Task.of_model(config)


def test_unseen_label_names_the_row(tokenizer):
    with pytest.raises(ValueError, match="row 2 has the label 'ok', never seen in training"):
        encode_examples(examples_of(["bad", "ok"]), tokenizer, Task(labels=("bad", "good")), 8)


# ---- encoding ------------------------------------------------------------------------------------


def test_encoding_equals_the_tokenizer(tokenizer):
    examples = datasets.Dataset.from_dict(
        {"text": ["the film", "good"], "text_pair": ["a story", "was bad ."], "label": ["y", "n"]}
    )
    encoded = encode_examples(examples, tokenizer, Task.of(examples), 16)
    expected = tokenizer(examples["text"][:], examples["text_pair"][:])
    for name in ("input_ids", "token_type_ids", "attention_mask"):
        assert encoded[name][:] == expected[name]
    assert encoded["label"][:] == [1, 0]
    assert encoded["length"][:] == [len(row) for row in expected["input_ids"]]


def test_truncation_is_counted(tokenizer, caplog):
    examples = datasets.Dataset.from_dict({"text": ["the film was good", "a film", "very " * 50]})
    with caplog.at_level(logging.WARNING):
        encoded = encode_examples(examples, tokenizer, Task(), 5)
    assert caplog.messages == ["truncated 2 of 3 texts to 5 tokens"]
    assert encoded["length"][:] == [5, 4, 5]
    assert encoded["input_ids"][0] == tokenizer("the film was").input_ids


def test_rows_keep_their_numbers_over_blocks(tokenizer, monkeypatch):
    monkeypatch.setattr("tinybert_fast.data.tasks.ENCODE_ROWS", 2)
    examples = examples_of(["a", "b", "b", "a", "c"])
    assert len(encode_examples(examples, tokenizer, Task(labels=("a", "b", "c")), 8)) == 5
    with pytest.raises(ValueError, match="row 5 has the label 'c'"):
        encode_examples(examples, tokenizer, Task(labels=("a", "b")), 8)


def test_length_is_cut_to_the_positions(caplog):
    config = tiny_config(vocab_size=len(WORDS))
    assert usable_length(12, config) == 12
    with caplog.at_level(logging.WARNING):
        assert usable_length(128, config) == config.max_position_embeddings
    assert "more than the model's 40 positions" in caplog.text
    with pytest.raises(ValueError, match="at least 3"):
        usable_length(2, config)
