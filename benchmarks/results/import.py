"""Files what benchmarks/gpu.sh left in OUT beside this script, one file per suite and GPU:

    python benchmarks/results/import.py OUT [--commit COMMIT]

    <suite>-<gpu>.csv         the rows, behind those that are there
    profile-<gpu>.json        in place of an older one
    <figure>-<gpu>.png        of all rows of that GPU, of several runs of a case the newest

Refuses, before it writes anything: rows that no GPU measured (a dry run), other columns than the
table's, rows that are there already, whatever commit they were filed under. A copy of the checkout
without its history does not know its commit; ``--commit`` is what was copied.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from pathlib import Path

from tinybert_fast.benchmarks.plots import draw
from tinybert_fast.benchmarks.suites import SUITES
from tinybert_fast.benchmarks.table import COLUMNS, CsvFile, Row, newest
from tinybert_fast.benchmarks.table import read as read_numbers
from tinybert_fast.data.atomic import atomic_write

RESULTS = Path(__file__).resolve().parent
# What one measurement is told by. Its commit is not: where the checkout did not know it, whoever
# files the rows says it.
IDENTITY = (
    "date", "gpu", "case", "provider", "pass", "dtype", "batch", "width", "valid_tokens", "dropout",
)  # fmt: skip


def file_results(out: Path, results: Path = RESULTS, commit: str | None = None) -> list[Path]:
    """The files written. ValueError, with nothing written, says what cannot be filed."""
    source = out / "rows.csv"
    if not source.is_file():
        raise ValueError(
            f"{out} has no rows.csv; expected the folder of a run of benchmarks/gpu.sh"
        )
    rows = read(source)
    for row in rows:
        if row["gpu"] in ("", "none"):
            raise ValueError(f"{source}: a row of {row['case']} has no GPU; a dry run is not filed")
        if row["commit"] == "none":
            if commit is None:
                raise ValueError(f"{source}: rows without a commit; say it with --commit")
            row["commit"] = commit
    gpu = re.sub(r"[^a-z0-9]+", "-", rows[0]["gpu"].lower()).strip("-")
    by_suite: dict[str, list[Row]] = {}
    for row in rows:
        by_suite.setdefault(row["suite"], []).append(row)
    targets = {results / f"{suite}-{gpu}.csv": group for suite, group in by_suite.items()}
    files = {target: CsvFile(target) for target in targets}  # other columns there are refused
    for target, group in targets.items():
        there = {identity(row): row for row in read(target)} if target.exists() else {}
        again = [row for row in group if identity(row) in there]
        if again:
            first = there[identity(again[0])]
            raise ValueError(
                f"{target} already has {len(again)} of these rows, the first of {first['case']}, "
                f"{first['provider']}, {first['date']}, filed under commit {first['commit']}"
            )
    for target, file in files.items():
        file.write(targets[target])
    written = list(files)
    profile = out / "profile.json"
    if profile.is_file():
        found = json.loads(profile.read_text(encoding="utf-8"))
        found["commit"] = rows[0]["commit"]
        written.append(results / f"profile-{gpu}.json")
        atomic_write(written[-1], json.dumps(found, indent=1) + "\n")
    tables = (results / f"{suite}-{gpu}.csv" for suite in SUITES)
    filed = [row for table in tables if table.exists() for row in newest(read_numbers(table))]
    return written + draw(filed, results, gpu)


def read(path: Path) -> list[Row]:
    """Cells as they are written. ValueError for no rows, or other columns than the table's."""
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames != list(COLUMNS):
        other = sorted({*(reader.fieldnames or ())} ^ {*COLUMNS})
        raise ValueError(f"{path} has other columns than the table: {', '.join(other) or 'order'}")
    if not rows:
        raise ValueError(f"{path} has no rows")
    if len({row["gpu"] for row in rows}) > 1:
        raise ValueError(f"{path} has rows of several GPUs: file each by itself")
    return rows


def identity(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in IDENTITY)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--commit", help="of rows that have none")
    given = parser.parse_args()
    try:
        for file in file_results(given.out, commit=given.commit):
            print(file)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
