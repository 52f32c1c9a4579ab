"""Tables of README.md, RESULTS.md and BASELINES.md: written from the newest committed rows."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "results" / "readme.py"
spec = importlib.util.spec_from_file_location("results_readme", SCRIPT)
readme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme)


def row(date, provider, role, **cells):
    same = {"case": "mlm_step", "batch": 2, "width": 4, "pass": "both", "dtype": "fp32"}
    return {**same, "valid_fraction": 0.6, "threads": 2, "date": date, "provider": provider, "role": role, **cells}


def test_pages_and_rows_agree():
    done = subprocess.run(
        [sys.executable, "-P", SCRIPT, "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_table_is_on_a_page():
    shown = {name for page in readme.PAGES for name in readme.BLOCK.findall(page.read_text())}
    assert shown == set(readme.TABLES)


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


@pytest.mark.parametrize(
    ("change", "names"),
    [(("84.1", "99.9"), ["demo"]), (("prose", "Prose"), [])],
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
