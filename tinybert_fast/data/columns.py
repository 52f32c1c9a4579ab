"""Which columns of a table hold the texts and the label, and whether they hold what they should."""

import math
import re
from pathlib import Path

from tinybert_fast.data.files import some

PAIRS = (
    ("sentence1", "sentence2"),  # MRPC, RTE, STS-B, WNLI
    ("question1", "question2"),  # QQP
    ("premise", "hypothesis"),  # MNLI
    ("question", "sentence"),  # QNLI
    ("text", "text_pair"),
)
SINGLES = ("sentence", "text")  # CoLA, SST-2
LABELS = ("label", "labels", "gold_label", "is_duplicate", "score")


def text_columns(
    path: Path, columns: dict, text: str | None, pair: str | None
) -> tuple[str, str | None]:
    if pair is not None and text is None:
        raise ValueError(f"text_pair is {pair!r} but text was not named; name both columns")
    for name in (text, pair):
        if name is not None and name not in columns:
            raise ValueError(f"{path} has no column {name!r}; it has {some(list(columns))}")
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
        f"it has {some(list(columns))}: say which one holds the text"
    )


def label_column(path: Path, columns: dict, label: str | None) -> str:
    found = [name for name in (LABELS if label is None else (label,)) if name in columns]
    if found:
        return found[0]
    missing = (
        f"no column {label!r}" if label else f"no label column known by name ({', '.join(LABELS)})"
    )
    raise ValueError(
        f"{path} has {missing}; it has {some(list(columns))}: say which one holds the label"
    )


def texts_of(path: Path, columns: dict, name: str) -> list[str]:
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


def labels_of(path: Path, name: str, values: list, kind: str) -> tuple[list, str]:
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
