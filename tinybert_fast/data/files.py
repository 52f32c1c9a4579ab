"""Tables on disk as columns: .csv, .tsv, .jsonl and folders of the `datasets` library."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from datasets import ClassLabel, Dataset, load_from_disk

CSV_FIELD_CHARS = 1 << 24  # the module's own limit is 128 KiB


def read_columns(path: Path) -> dict[str, list]:
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
                    f"{path}: a column name stands twice in the header: {some(header)}"
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


def class_names(path: Path) -> dict[str, tuple[str, ...]]:
    """Column -> its classes in the order of their ids, where a `datasets` folder says so."""
    features = _load_folder(path).features if path.is_dir() else {}
    return {name: tuple(f.names) for name, f in features.items() if isinstance(f, ClassLabel)}


def _load_folder(path: Path) -> Dataset:
    try:
        data = load_from_disk(str(path))
    except FileNotFoundError:
        raise ValueError(f"{path} is not a folder written by datasets.save_to_disk") from None
    if not isinstance(data, Dataset):
        raise ValueError(
            f"{path} holds the splits {some(list(data))}; "
            f"name one, such as {path / next(iter(data))}"
        )
    return data


def _read_folder(path: Path) -> dict[str, list]:
    data = _load_folder(path)
    columns = {}
    for name, feature in data.features.items():
        columns[name] = list(data[name])
        if isinstance(feature, ClassLabel):  # -1: no label given, as in GLUE's test sets
            columns[name] = [
                None if i is None or i < 0 else feature.names[i] for i in columns[name]
            ]
    return columns


def some(names: Sequence[str], limit: int = 12) -> str:
    """The names in quotes, for an error message."""
    shown = ", ".join(repr(name) for name in names[:limit])
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
