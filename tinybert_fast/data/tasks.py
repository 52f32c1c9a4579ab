"""Sentence and sentence-pair tasks: a file or a `datasets` folder -> examples -> token ids.

Examples always have the columns `text`, `text_pair` (pairs only) and `label` (a string is a class,
a float is a regression target), whatever the file calls them. Rows are counted from 1, without the
header.
"""

import csv
import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets, load_from_disk
from datasets import List as ListOf

log = logging.getLogger(__name__)

PAIRS = (
    ("sentence1", "sentence2"),  # MRPC, RTE, STS-B, WNLI
    ("question1", "question2"),  # QQP
    ("premise", "hypothesis"),  # MNLI
    ("question", "sentence"),  # QNLI
    ("text", "text_pair"),
)
SINGLES = ("sentence", "text")  # CoLA, SST-2
LABELS = ("label", "labels", "gold_label", "is_duplicate", "score")
KINDS = ("auto", "classification", "regression")
ENCODE_ROWS = 10_000  # rows tokenised at a time: bounds the Python lists alive at once
CSV_FIELD_CHARS = 1 << 24


@dataclass(frozen=True)
class Task:
    """The columns of the examples, and the classes in id order (`labels=None`: regression)."""

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] | None = None

    @classmethod
    def of(cls, examples: Dataset, known: Sequence[str] = ()) -> "Task":
        """The task that loaded training examples pose. `known` keeps its order if it is the same
        set of classes.
        """
        pair = "text_pair" if "text_pair" in examples.column_names else None
        if examples.features["label"].dtype != "string":
            return cls(text_pair=pair)
        found = set(examples.unique("label"))
        if len(found) < 2:
            raise ValueError(
                f"the training examples hold one class only, {next(iter(found))!r}; "
                "expected two or more: check the label column, or pass kind='regression'"
            )
        labels = tuple(known) if found == set(known) else tuple(sorted(found, key=_natural))
        return cls(text_pair=pair, labels=labels)

    @classmethod
    def of_model(cls, config, text_pair: bool = False) -> "Task":
        """The task a saved sequence classification model was trained for."""
        pair = "text_pair" if text_pair else None
        if config.problem_type == "regression" or config.num_labels == 1:
            return cls(text_pair=pair)
        names = [config.id2label[i] for i in range(config.num_labels)]
        if all(
            name == f"LABEL_{i}" for i, name in enumerate(names)
        ):  # no names were ever given: ids are the names
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
                    f"expected one of {_some(self.labels)}"
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
    require_label: bool = True,
) -> Dataset:
    """Labelled texts from a .csv, .tsv or .jsonl file or a `datasets.save_to_disk` folder.

    Columns that are not named are looked for under the names GLUE uses. `kind="auto"` takes floats
    (3.8) for regression targets and anything else for class names. .tsv is read without quoting, as
    GLUE's files are. `require_label=False` leaves the column out where the file has none. Raises
    FileNotFoundError or ValueError that names the file, the column or the row at fault.
    """
    path = Path(path)
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    columns = _read(path)
    text, text_pair = _text_columns(path, columns, text, text_pair)
    rows = len(columns[text])
    if rows == 0:
        raise ValueError(f"{path} holds no examples")
    data: dict[str, list] = {"text": _texts(path, columns, text)}
    features: dict[str, Any] = {"text": Value("string")}
    if text_pair is not None:
        data["text_pair"] = _texts(path, columns, text_pair)
        features["text_pair"] = Value("string")
    label = _label_column(path, columns, label, require_label)
    if label is not None:
        data["label"], dtype = _labels(path, label, columns[label], kind)
        features["label"] = Value(dtype)
    return Dataset.from_dict(data, features=Features(features))


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


# ---- files ---------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, list]:
    """Every column as read: strings from csv and tsv, typed values from jsonl and folders."""
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; expected a .csv, .tsv or .jsonl file or a datasets folder"
        )
    readers: dict[str, Callable[[Path], dict[str, list]]] = {
        ".csv": lambda p: _read_table(p, ",", csv.QUOTE_MINIMAL),
        ".tsv": lambda p: _read_table(p, "\t", csv.QUOTE_NONE),
        ".jsonl": _read_jsonl,
    }
    if path.is_dir():
        return _read_folder(path)
    if path.suffix.lower() not in readers:
        raise ValueError(
            f"{path}: cannot read {path.suffix or 'a file without extension'!r}; "
            "expected .csv, .tsv, .jsonl or a folder written by datasets.save_to_disk"
        )
    try:
        return readers[path.suffix.lower()](path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def _read_table(path: Path, delimiter: str, quoting: Literal[0, 3]) -> dict[str, list]:
    csv.field_size_limit(CSV_FIELD_CHARS)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(
            file, delimiter=delimiter, quoting=quoting, strict=quoting != csv.QUOTE_NONE
        )
        try:
            header = next(reader, None)
            if header is None:
                raise ValueError(f"{path} is empty; expected a header line and rows")
            columns: dict[str, list] = {name.strip(): [] for name in header}
            if len(columns) != len(header):
                raise ValueError(
                    f"{path}: a column name stands twice in the header: {_some(header)}"
                )
            row = 0
            for fields in reader:
                if not fields:  # a blank line
                    continue
                row += 1
                if len(fields) != len(header):
                    hint = " (.tsv is read without quoting)" if quoting == csv.QUOTE_NONE else ""
                    raise ValueError(
                        f"{path}: row {row} (line {reader.line_num}) has {len(fields)} fields, "
                        f"the header has {len(header)}{hint}"
                    )
                for name, field in zip(columns, fields, strict=True):
                    columns[name].append(field)
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num}: {error}") from None
    return columns


def _read_jsonl(path: Path) -> dict[str, list]:
    columns: dict[str, list] = {}
    row = 0
    with path.open(encoding="utf-8-sig") as file:
        for line, content in enumerate(file, 1):
            if not content.strip():
                continue
            try:
                record = json.loads(content)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: line {line} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(
                    f"{path}: line {line} holds a {type(record).__name__}; expected an object"
                )
            for name in record.keys() - columns.keys():
                columns[name] = [None] * row
            row += 1
            for name, column in columns.items():
                column.append(record.get(name))
    return columns


def _read_folder(path: Path) -> dict[str, list]:
    try:
        data = load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(f"{path} is not a folder written by datasets.save_to_disk") from None
    if not isinstance(data, Dataset):
        raise ValueError(
            f"{path} holds the splits {_some(list(data))}; "
            f"name one, such as {path / next(iter(data))}"
        )
    columns = {}
    for name, feature in data.features.items():
        columns[name] = list(data[name])
        if isinstance(feature, ClassLabel):  # -1: no label given, as in GLUE's test sets
            columns[name] = [
                None if i is None or i < 0 else feature.names[i] for i in columns[name]
            ]
    return columns


# ---- columns -------------------------------------------------------------------------------------


def _text_columns(
    path: Path, columns: dict, text: str | None, pair: str | None
) -> tuple[str, str | None]:
    if pair is not None and text is None:
        raise ValueError(f"text_pair is {pair!r} but text was not named; name both columns")
    for name in (text, pair):
        if name is not None and name not in columns:
            raise ValueError(f"{path} has no column {name!r}; it has {_some(list(columns))}")
    if text is not None:
        return text, pair
    for first, second in PAIRS:
        if first in columns and second in columns:
            return first, second
    for name in SINGLES:
        if name in columns:
            return name, None
    raise ValueError(
        f"{path} has no text column known by name ({', '.join(SINGLES)} or a GLUE pair); "
        f"it has {_some(list(columns))}: say which one holds the text"
    )


def _label_column(path: Path, columns: dict, label: str | None, required: bool) -> str | None:
    if label is not None and label in columns:
        return label
    if label is None:
        label = next((name for name in LABELS if name in columns), None)
        if label is not None or not required:
            return label
    missing = (
        f"no column {label!r}" if label else f"no label column known by name ({', '.join(LABELS)})"
    )
    raise ValueError(
        f"{path} has {missing}; it has {_some(list(columns))}: say which one holds the label"
    )


def _texts(path: Path, columns: dict, name: str) -> list[str]:
    values = columns[name]
    bad = [
        row
        for row, value in enumerate(values, 1)
        if not isinstance(value, str) or not value.strip()
    ]
    if bad:
        value = values[bad[0] - 1]
        what = (
            "is empty"
            if value is None or isinstance(value, str)
            else f"is a {type(value).__name__}, not text"
        )
        more = f" ({len(bad)} such rows)" if len(bad) > 1 else ""
        raise ValueError(f"{path}: row {bad[0]}: column {name!r} {what}{more}; fill or remove it")
    return values


def _labels(path: Path, name: str, values: list, kind: str) -> tuple[list, str]:
    """Class names as strings, or targets as floats; and the dtype of the column."""
    for row, value in enumerate(values, 1):
        if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{path}: row {row}: column {name!r} has no label; fill or remove it")
    if kind == "regression" or (kind == "auto" and _look_like_targets(values)):
        numbers = [_number(value) for value in values]
        if None in numbers:
            row = numbers.index(None) + 1
            raise ValueError(
                f"{path}: row {row}: column {name!r} holds {values[row - 1]!r}; "
                "regression expects a number"
            )
        return numbers, "float64"
    return [str(value) for value in values], "string"


def _look_like_targets(values: list) -> bool:
    """True for numbers of which one at least is written as a float: 3.8, 5.000; not 0, 1, 2."""
    if any(_number(value) is None for value in values):
        return False
    return any(
        isinstance(v, float) or (isinstance(v, str) and not re.fullmatch(r"\s*[+-]?\d+\s*", v))
        for v in values
    )


def _number(value) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _natural(label: str):
    """Sort key: whole numbers by value before everything else."""
    return (0, int(label), label) if re.fullmatch(r"-?\d+", label) else (1, 0, label)


def _prefix(name: str) -> str:
    return f"{name}: " if name else ""


def _some(names: Sequence[str], limit: int = 12) -> str:
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
