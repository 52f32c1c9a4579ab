"""Tables of README.md, RESULTS.md and BASELINES.md: written from the newest committed rows."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tinybert_fast.benchmarks.table import COLUMNS, CsvFile

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "results" / "readme.py"
spec = importlib.util.spec_from_file_location("results_readme", SCRIPT)
readme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme)


def row(date, provider, role, **cells):
    same = {"case": "mlm_step", "batch": 2, "width": 4, "pass": "both", "dtype": "fp32"}
    return {
        **same,
        "valid_fraction": 0.6,
        "threads": 2,
        "date": date,
        "provider": provider,
        "role": role,
        **cells,
    }


def test_pages_and_rows_agree():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_table_that_has_rows_is_on_a_page():
    shown = {name for page in readme.PAGES for name in readme.BLOCK.findall(page.read_text())}
    assert shown <= set(readme.TABLES)
    for name in readme.TABLES.keys() - shown:
        with pytest.raises(readme.NoRows):
            readme.TABLES[name](readme.PAGES[0])


def test_the_newest_run_counts():
    """Unless it left a baseline out; of other sizes, dtypes and threads each has its own."""
    old = [row("2026-01-01", who, role) for who, role in (("slow", "a"), ("ours", "ours"))]
    new = [row("2026-01-02", who, role) for who, role in (("slow", "a"), ("ours", "ours"))]
    alone = [row("2026-01-03", "ours", "ours")]
    apart = [row("2025-01-01", "ours", "ours", **cell) for cell in
             ({"dtype": "bf16"}, {"threads": 1}, {"width": 8})]  # fmt: skip
    assert readme.newest([*alone, *new, *old, *apart]) == [*new, *apart]
    assert readme.newest(alone) == alone


def test_a_case_without_ours_is_refused():
    with pytest.raises(ValueError, match=r"mlm_step, 2, 4, 0.6, both, fp32, 2: .*none of ours"):
        readme.groups([row("2026-01-01", "slow", "a")])


def test_the_graph_of_a_baseline_gets_a_column():
    cells = {"median_ms": 10.0, "speedup_a": 2.0, "speedup_b": 1.5, "tokens_per_s": 9e5,
             "bound_ms": 1.0, "peak_mib": 5.0}  # fmt: skip
    rows = [row("2026-01-01", who, role, **cells) for who, role in
            (("slow", "a"), ("careful", "b"), ("ours", "ours"))]  # fmt: skip
    assert "(b) as a CUDA graph" not in readme.gpu_steps(rows)
    graph = row("2026-01-01", "careful graph", "careful graph", **{**cells, "median_ms": 7.0})
    head, _, line = readme.gpu_steps([*rows, graph]).splitlines()
    at = head.split("|").index(" (b) as a CUDA graph, ms ")
    assert line.split("|")[at] == " 7.00 (1.50x) "


def cells_of(table, *heads):
    """Of each line, the cells under these heads."""
    names, _, *lines = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    return [tuple(line[names.index(head)] for head in heads) for line in lines]


def test_textbrewer_stands_beside_the_steps_that_it_takes():
    cells = {"median_ms": 10.0, "speedup_a": 2.0, "speedup_b": 1.5, "tokens_per_s": 9e5,
             "bound_ms": 1.0, "peak_mib": 5.0, "p20_ms": 9.0, "p80_ms": 11.0,
             "setting": None}  # fmt: skip
    rows = [row("2026-01-01", who, role, case=case, **cells)
            for case in ("mlm_step", "distill_step")
            for who, role in (("slow", "a"), ("careful", "b"), ("ours", "ours"))]  # fmt: skip
    assert "TextBrewer" not in readme.cpu_steps(rows)
    theirs = {**cells, "median_ms": 25.0}
    rows.append(row("2026-01-01", "textbrewer", "textbrewer", case="distill_step", **theirs))
    table = readme.cpu_steps(rows)
    assert cells_of(table, "TextBrewer, ms", "careful (b), ms") == [("", "10.0"), ("25.0", "10.0")]
    every = cells_of(readme.providers(rows, graphs=False), "provider", "ms")
    assert every[-1] == ("textbrewer", "25.0")


def test_students_stand_beside_their_teacher():
    rows = [
        row("2026-01-01", who, role, suite="inference", case=f"inference_{model}_b32_full",
            batch=32, width=128, median_ms=ms * slower, speedup_a=2 / slower, speedup_b=None)
        for model, ms in (("12l_768", 640.0), ("4l_312", 64.0))
        for who, role, slower in (("transformers", "a", 2), ("ours", "ours", 1))
    ]  # fmt: skip
    rows[2]["median_ms"] = 160.0  # the student, as it comes
    heads = ("encoder", "B, N", "tinybert_fast, sentences/s", "against (a)")
    table = readme.inference(rows)
    assert cells_of(table, *heads) == [
        ("answers, 12L-768 (teacher), no padding", "32, 128", "50.0", "2.00x"),
        ("answers, 4L-312, no padding", "32, 128", "500", "2.00x"),
    ]
    assert cells_of(table, "over its teacher: (a)", "(b)", "ours", "as published") == [
        ("", "", "", ""), ("8.00x", "", "10.00x", "9.4x"),
    ]  # fmt: skip


def test_each_point_of_a_grid_has_its_line():
    """Also those that differ in nothing but the share of real positions."""
    rows = [
        row("2026-01-01", who, role, suite="scaling", valid_fraction=real, tokens_per_s=rate,
            speedup_a=None, speedup_b=2.0, peak_mib=5.0)
        for real, rate in ((0.6, 700.0), (0.301, 650.0), (1.0, 800.0))
        for who, role in (("careful", "b"), ("ours", "ours"))
    ]  # fmt: skip
    heads = ("real positions", "as it comes (a), tokens/s", "tinybert_fast, tokens/s")
    assert cells_of(readme.scaling(readme.newest(rows)), *heads) == [
        ("60 %", "", "700"), ("30 %", "", "650"), ("100 %", "", "800"),
    ]  # fmt: skip


def test_references_have_rows_and_no_line():
    peaks = [
        row("2026-01-01", who, role, case="attention_score_mse_memory", width=width,
            peak_mib=width / 10, growth=1.0, median_ms=5.0)
        for width in (128, 256)
        for who, role in (("autograd", "a"), ("ours", "ours"), ("reference", "reference"))
    ]  # fmt: skip
    lines = cells_of(readme.memory(peaks), "who", "N=256, MiB")
    assert lines == [("official formula", "25.6"), ("tinybert_fast", "25.6")]


def test_a_gpu_step_says_its_share_of_real_positions():
    rows = [
        row("2026-01-01", who, role, case="finetune_step_b256_n128", valid_fraction=0.3,
            median_ms=5.0, speedup_a=2.0, speedup_b=1.5, tokens_per_s=9e5, bound_ms=1.0,
            peak_mib=5.0)
        for who, role in (("slow", "a"), ("ours", "ours"))
    ]  # fmt: skip
    (said,) = cells_of(readme.gpu_steps(rows), "step")
    assert said == ("classifier, TinyBERT-4L-312, 30 % real",)


def slower_of(tmp_path, monkeypatch, *rows):
    same = {"cpu": "c", "gpu": "none"}
    CsvFile(tmp_path / "step-epyc-avx512.csv").write(
        [dict.fromkeys(COLUMNS) | same | one for one in rows]
    )
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    table = readme.slower(tmp_path / "README.md").partition("\n\n")[0]
    heads = ("fastest other", "ours beside it", "fastest other graph", "our graph beside it")
    return cells_of(table, *heads)


@pytest.mark.parametrize(
    ("launched", "replayed", "line"),
    [(2.0, 3.0, []), (0.5, 3.0, [("compiled", "0.50x", "careful graph", "3.00x")]),
     (2.0, 0.9, [("compiled", "2.00x", "careful graph", "0.90x")])],
)  # fmt: skip
def test_steps_are_compared_launched_with_launched_and_graph_with_graph(
    tmp_path, monkeypatch, launched, replayed, line
):
    """Ours as a graph took 1 ms, launched 10 ms."""
    lanes = (("slow", "a", 90.0), ("compiled", "compiled", 10 * launched),
             ("careful graph", "careful graph", 77.0), ("ours", "ours", 10.0),
             ("ours graph", "ours graph", 1.0))  # fmt: skip
    gains = {"ours": {"speedup_a": 9.0}, "ours graph": {"speedup_graph": replayed}}
    rows = [
        row("2026-01-01", who, role, suite="step", median_ms=ms, **gains.get(who, {}))
        for who, role, ms in lanes
    ]
    assert slower_of(tmp_path, monkeypatch, *rows) == line


@pytest.mark.parametrize(
    ("graph_ms", "line"),
    [(0.5, [("b", "2.00x", "a", "0.50x")]), (3.0, []), (None, [])],
)
def test_an_op_that_loses_as_a_graph_alone_is_listed(tmp_path, monkeypatch, graph_ms, line):
    same = {"suite": "ops", "case": "layer_norm_d312"}
    rows = [
        row("2026-01-01", who, role, **same, median_ms=ms, graph_ms=graph)
        for who, role, ms, graph in (("a", "x", 9.0, graph_ms), ("b", "y", 6.0, 2.0),
                                     ("ours", "ours", 3.0, graph_ms and 1.0))
    ]  # fmt: skip
    assert slower_of(tmp_path, monkeypatch, *rows) == line


def test_who_has_rows_is_listed_by_machine():
    page = readme.provided(readme.PAGES[2]).partition("\n\n")[0]
    found = cells_of(page, "machine", "provider", "of")
    assert ("NVIDIA H100 80GB HBM3", "careful compile", "`mlm_step`") in found
    assert not {"ours", "ours graph", "reference"} & {who for _, who, _ in found}


def test_repeated_suites_say_how_far_apart_they_lie(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    with pytest.raises(readme.NoRows, match="run twice by one commit"):
        readme.agreement(tmp_path / "RESULTS.md")

    def run(date, gain, commit="c1"):
        same = {"suite": "step", "dropout": 0.1, "device": "cpu", "gpu": "none", "rounds": 4}
        found = [
            row(date, who, role, commit=commit, **same)
            for who, role in (("slow", "a"), ("ours", "ours"))
        ]
        return [dict.fromkeys(COLUMNS) | one | {"speedup_a": gain} for one in found]

    file = tmp_path / "step-epyc-avx512.csv"
    rows = [*run("2026-01-01", 1.0, "c0"), *run("2026-01-02", 2.0), *run("2026-01-03", 2.3)]
    CsvFile(file).write(rows)
    page = readme.agreement(tmp_path / "RESULTS.md")
    heads = ("suite", "runs of", "commit", "furthest apart", "ratios", "largest difference")
    assert cells_of(page.partition("\n\n")[0], *heads, "above 10 %") == [
        ("step", "2026-01-02 and 2026-01-03", "c1",
         "mlm_step B=2 N=4, ours, fp32, x (a): 2.00x and 2.30x", "1", "15.0 %", "1"),
    ]  # fmt: skip
    assert "`tinybert-fast bench --suite step --threads 2 --rounds 4`, each twice" in page
    assert "(step-epyc-avx512.csv)" in page


@pytest.mark.parametrize(
    ("change", "names"),
    [(("14.4", "99.9"), ["demo"]), (("prose", "Prose"), [])],
)
def test_a_changed_figure_is_found_and_written_back(tmp_path, change, names):
    page = tmp_path / "README.md"
    page.write_text("prose\n<!-- results: demo -->\n<!-- end -->\n")
    page.write_text(readme.rewritten(page))
    assert readme.drifted(page) == []
    page.write_text(page.read_text().replace(*change))
    assert readme.drifted(page) == names
    page.write_text(readme.rewritten(page))
    assert readme.drifted(page) == []


def test_a_demo_of_both_losses_shows_both(tmp_path, monkeypatch):
    name = f"demo-full-{readme.CPU}.json"
    found = json.loads((readme.RESULTS / name).read_text())
    student = found["models"]["student"]
    found["models"]["student-minilm"] = {**student, "name": "by MiniLM's", "mean": 0.8}
    found |= {"gap_recovered_minilm": 0.5, "gap_recovered_minilm_by_seed": [0.4, 0.6]}
    (tmp_path / name).write_text(json.dumps(found))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    shown = readme.demo("demo-full", tmp_path / "README.md")
    assert "| by MiniLM's | 14.4 M | 3 | 80.0 % ± " in shown
    assert "the one distilled by MiniLM's loss 50 % of it (40 %, 60 % by seed); " in shown
    assert "ARGS='--seeds 3 --loss tinybert --loss minilm'`" in shown


def test_an_unknown_table_is_refused(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("<!-- results: gpu -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=r"no table 'gpu'; there are cpu-steps, .*demo"):
        readme.rewritten(page)


@pytest.mark.parametrize(
    ("number", "words"),
    [(None, ""), (0.04714, "0.0471"), (42.38, "42.4"), (649.4, "649"), (13310.0, "13,310"),
     (99.96, "100"), (3083000.0, "3.08 M"), (168200000.0, "168 M")],
)  # fmt: skip
def test_numbers_in_words(number, words):
    assert readme.three(number) == words
