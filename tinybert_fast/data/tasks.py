"""Sentence and sentence-pair tasks: a file or a `datasets` folder -> examples -> token ids.

Examples always have the columns `text`, `text_pair` (pairs only) and `label` (a string is a class,
a float is a regression target), whatever the file calls them. Rows are counted from 1, without the
header.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value, concatenate_datasets
from datasets import List as ListOf

from tinybert_fast.data.columns import LABELS, label_column, labels_of, text_columns, texts_of
from tinybert_fast.data.files import class_names, read_columns, some

log = logging.getLogger(__name__)

KINDS = ("auto", "classification", "regression")
ENCODE_ROWS = 10_000  # rows tokenised at a time: bounds the Python lists alive at once


@dataclass(frozen=True)
class Task:
    """The columns of the examples, and the classes in id order (`labels=None`: regression)."""

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] | None = None

    @classmethod
    def of(cls, examples: Dataset, model: Sequence[str] = (), order: Sequence[str] = ()) -> "Task":
        """The task that loaded training examples pose. If the classes of the `model` to train hold
        theirs, it keeps them, and its head, whatever is missing here. Else theirs come in this
        `order`, if it has them all, or sorted.
        """
        pair = "text_pair" if "text_pair" in examples.column_names else None
        if examples.features["label"].dtype != "string":
            return cls(text_pair=pair)
        found = set(examples.unique("label"))
        if len(found) < 2:
            raise ValueError(
                f"the training examples hold one class only, {next(iter(found))!r}; "
                "expected two or more: check the label column, or pass kind='regression' "
                "(--kind regression)"
            )
        if found <= set(model):
            return cls(text_pair=pair, labels=tuple(model))
        ranked = order if found <= set(order) else sorted(found, key=_natural)
        return cls(text_pair=pair, labels=tuple(name for name in ranked if name in found))

    @classmethod
    def of_model(cls, config, text_pair: bool = False) -> "Task":
        """The task a saved sequence classification model was trained for; ValueError if a text may
        have several of its labels.
        """
        pair = "text_pair" if text_pair else None
        if config.problem_type == "multi_label_classification":
            raise ValueError(
                f"{config.name_or_path or 'the model'} gives a text any number of "
                f"{config.num_labels} labels (multi_label_classification); expected one that gives "
                "it one label, or a score"
            )
        if config.problem_type == "regression" or config.num_labels == 1:
            return cls(text_pair=pair)
        names = [config.id2label[i] for i in range(config.num_labels)]
        if names == [f"LABEL_{i}" for i in range(len(names))]:  # nobody named them
            names = [str(i) for i in range(len(names))]
        return cls(text_pair=pair, labels=tuple(names))

    @property
    def regression(self) -> bool:
        return self.labels is None

    @property
    def num_labels(self) -> int:
        return 1 if self.labels is None else len(self.labels)

    def config_fields(self) -> dict[str, Any]:
        """What a Transformers config must say: num_labels, problem_type, names of the classes."""
        if self.labels is None:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "num_labels": self.num_labels,
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(self.labels)),
            "label2id": {name: i for i, name in enumerate(self.labels)},
        }

    def label_ids(
        self, values: Iterable[Any], row: int = 1, name: str = ""
    ) -> list[int] | list[float]:
        """Class ids (regression: floats). `row`: number of the first value, for the error."""
        if self.labels is None:
            return [float(value) for value in values]
        ids = {name: i for i, name in enumerate(self.labels)}
        out = []
        for at, value in enumerate(values, row):
            if value not in ids:
                raise ValueError(
                    f"{_prefix(name)}row {at} has the label {value!r}, never seen in training; "
                    f"expected one of {some(self.labels)}"
                )
            out.append(ids[value])
        return out


def load_examples(
    path: str | Path,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    *,
    kind: str = "auto",
    labelled: bool = True,
) -> Dataset:
    """Labelled texts from a .csv, .tsv or .jsonl file or a `datasets.save_to_disk` folder.

    Columns that are not named are looked for under the names GLUE uses. `kind="auto"` takes floats
    (3.8) for regression targets and anything else for class names. .tsv is read without quoting, as
    GLUE's files are. `labelled=False` reads no label. Raises FileNotFoundError or ValueError that
    names the file, the column or the row at fault.
    """
    path = Path(path)
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    columns = read_columns(path)
    text, text_pair = text_columns(path, columns, text, text_pair)
    rows = len(columns[text])
    if rows == 0:
        raise ValueError(f"{path} holds no examples")
    data: dict[str, list] = {"text": texts_of(path, columns, text)}
    features: dict[str, Any] = {"text": Value("string")}
    if text_pair is not None:
        data["text_pair"] = texts_of(path, columns, text_pair)
        features["text_pair"] = Value("string")
    if labelled:
        label = label_column(path, columns, label)
        data["label"], dtype = labels_of(path, label, columns[label], kind)
        features["label"] = Value(dtype)
    return Dataset.from_dict(data, features=Features(features))


def class_order(path: str | Path, label: str | None = None) -> tuple[str, ...]:
    """The classes of a `datasets` folder in the order of their ids, which F1 depends on (id 1 is
    its positive class); () for other files, which keep no order.
    """
    names = class_names(Path(path))
    return names.get(label or next((name for name in LABELS if name in names), ""), ())


def usable_length(max_length: int, config) -> int:
    """`max_length`, cut to the positions the model has (with a line in the log that says so)."""
    if max_length < 3:
        raise ValueError(
            f"max_length is {max_length}; expected at least 3 ([CLS], one token, [SEP])"
        )
    if max_length > config.max_position_embeddings:
        log.warning(
            "max_length %d is more than the model's %d positions; using %d",
            max_length,
            config.max_position_embeddings,
            config.max_position_embeddings,
        )
    return min(max_length, config.max_position_embeddings)


def encode_examples(
    examples: Dataset, tokenizer, task: Task, max_length: int, name: str = ""
) -> Dataset:
    """input_ids, token_type_ids, attention_mask, length, and label where the examples have one.

    Texts of more than `max_length` tokens are cut (pairs: the longer one first); one log line says
    how many. `name`: what the log and an error call the examples, such as their file.
    """
    has_label = task.label in examples.column_names
    features: dict[str, Any] = {
        "input_ids": ListOf(Value("int32")),
        "token_type_ids": ListOf(Value("int8")),
        "attention_mask": ListOf(Value("int8")),
        "length": Value("int32"),
    }
    if has_label:
        features["label"] = Value("float32" if task.regression else "int32")
    encoded, truncated = [], 0
    for start in range(0, len(examples), ENCODE_ROWS):
        rows = examples[start : start + ENCODE_ROWS]
        texts = [rows[name] for name in (task.text, task.text_pair) if name is not None]
        ids, types, cut = _tokenise(tokenizer, texts, max_length)
        truncated += cut
        lengths = [len(row) for row in ids]
        block: dict[str, list] = {"input_ids": ids, "token_type_ids": types, "length": lengths}
        block["attention_mask"] = [[1] * n for n in lengths]
        if has_label:
            block["label"] = task.label_ids(rows[task.label], start + 1, name)
        encoded.append(Dataset.from_dict(block, features=Features(features)))
    if truncated:
        count = (truncated, len(examples), max_length)
        log.warning("%struncated %d of %d texts to %d tokens", _prefix(name), *count)
    return concatenate_datasets(encoded)


def _tokenise(tokenizer, texts: list[list[str]], max_length: int):
    """Whole first, then again with truncation where that was too long: the count is exact, most
    rows pay once.
    """
    options = {
        "add_special_tokens": True,
        "return_token_type_ids": True,
        "return_attention_mask": False,
    }
    whole = tokenizer(*texts, verbose=False, **options)
    ids, types = whole["input_ids"], whole["token_type_ids"]
    long = [i for i, row in enumerate(ids) if len(row) > max_length]
    if long:
        cut = [[column[i] for i in long] for column in texts]
        short = tokenizer(*cut, truncation="longest_first", max_length=max_length, **options)
        for at, i in enumerate(long):
            ids[i], types[i] = short["input_ids"][at], short["token_type_ids"][at]
    return ids, types, len(long)


def _natural(label: str):
    """Sort key: whole numbers by value before everything else."""
    return (0, int(label), label) if re.fullmatch(r"-?\d+", label) else (1, 0, label)


def _prefix(name: str) -> str:
    return f"{name}: " if name else ""
