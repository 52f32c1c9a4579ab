"""How far two runs lie apart: what is compared, which rows repeat each other, what is said."""

import pytest
from rich.console import Console

from tinybert_fast.benchmarks import agreement, runner, table
from tinybert_fast.benchmarks.agreement import repeats, spreads

ROLES = {"transformers": "a", "careful": "b", "ours": "ours"}


def run(date="2026-01-01", *, ours=2.0, careful=1.5, commit="c1", **cells):
    """A case measured once: (a), (b) and ours, this many times as fast as (a)."""
    same = {"suite": "step", "case": "mlm_step", "batch": 32, "width": 128, "pass": "both",
            "valid_fraction": 0.6, "dtype": "fp32", "threads": 2, "dropout": 0.1, "device": "cpu",
            "gpu": "none", "date": date, "commit": commit, **cells}  # fmt: skip
    gains = {"transformers": 1.0, "careful": careful, "ours": ours}
    return [
        dict.fromkeys(table.COLUMNS) | same
        | {"provider": who, "role": ROLES[who], "speedup_a": gain, "speedup_b": gain / careful,
           "speedup_a_fp32": gain}
        for who, gain in gains.items()
    ]  # fmt: skip


def found(spreads):
    return [(one.words[1], one.ratio, round(one.apart, 3)) for one in spreads]


def test_each_ratio_is_compared_once_the_furthest_apart_first():
    both = found(spreads(run(ours=2.0), run(ours=2.2)))
    assert both == [
        ("ours", "speedup_a", 0.1), ("ours", "speedup_b", 0.1), ("careful", "speedup_a", 0.0)
    ]  # fmt: skip
    assert found(spreads(run(ours=2.2), run(ours=2.0))) == both


def test_bf16_is_compared_with_fp32_too_and_so_are_graphs():
    before, now = run(dtype="bf16"), run(dtype="bf16")
    assert ("ours", "speedup_a_fp32", 0.0) in found(spreads(before, now))
    before[-1]["graph_speedup_b"], now[-1]["graph_speedup_b"] = 3.0, 6.0
    assert found(spreads(before, now))[0] == ("ours", "graph_speedup_b", 1.0)


@pytest.mark.parametrize(
    "other",
    [{"case": "distill"}, {"batch": 1}, {"valid_fraction": 1.0}, {"pass": "forward"},
     {"dtype": "bf16"}, {"threads": 1}, {"dropout": 0.0}, {"device": "cuda"}],
    ids=str,
)  # fmt: skip
def test_other_inputs_are_another_case(other):
    assert spreads(run(), run(**other)) == []


def test_only_runs_of_one_commit_repeat_each_other():
    rows = [
        *run("2026-01-01", ours=1.0), *run("2026-01-02", ours=2.0), *run("2026-01-03", ours=2.1),
        *run("2026-01-04", ours=9.0, commit="c2"),
        *run("2026-01-05", ours=3.0, commit="c3+"), *run("2026-01-06", ours=9.0, commit="c3+"),
        *run("2026-01-07", ours=3.0, commit="none"), *run("2026-01-08", ours=9.0, commit="none"),
    ]  # fmt: skip
    assert found(repeats(rows)) == found(spreads(run(ours=2.0), run(ours=2.1)))
    assert repeats(run()) == []


def test_a_run_without_a_baseline_repeats_none():
    first, second, alone = (run(f"2026-01-0{day}") for day in (1, 2, 3))
    assert {one.now["date"] for one in repeats([*first, *second, alone[-1]])} == {"2026-01-02"}


@pytest.fixture
def said(capsys):
    def words(before, now):
        agreement.show(spreads(before, now), Console(width=160))
        return " ".join(capsys.readouterr().out.split())

    return words


def test_what_is_said(said):
    assert (
        "Two runs: 3 ratios, largest difference 5.0% (mlm_step B=32 N=128, ours, fp32, x (a)), "
        "median 3.6%. All agree within 10%."
    ) in said(run(), run(ours=2.1, careful=1.52))
    assert "2 of them differ by more than 10%. Leave the machine alone" in said(run(), run(ours=3))
    assert "not of one code on one machine: torch 2.12, now 2.13; commit c1, now c2." in said(
        run(torch="2.12"), run(torch="2.13", commit="c2")
    )
    assert said(run(), run(batch=1)) == "Two runs: they have no ratio in common."
    unlike = "3 of the ratios, 2 of those above 10%, are of runs of which one had free cores"
    assert unlike in said(run(pulse_us=150.0), run(pulse_us=260.0, ours=3))
    assert "free cores" not in said(run(pulse_us=150.0), run(pulse_us=160.0, ours=3))
    assert "free cores" not in said(run(), run(pulse_us=160.0, ours=3))


def test_a_run_against_the_one_before_it_in_the_same_file(tmp_path, capsys):
    rows = tmp_path / "rows.csv"
    how = {"cases": ["hidden_mse_d312"], "smoke": True, "threads": 1, "rounds": 1}
    runner.run_suite("ops", **how, csv_path=rows)
    assert "Two runs" not in capsys.readouterr().out
    runner.run_suite("ops", **how, csv_path=rows, against=rows)
    assert "Two runs: 2 ratios, largest difference" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("none.csv", None, "no such file; expected rows of an earlier run, which --csv"),
        ("other.csv", "who,when\nyou,now\n", "expected benchmark rows, .csv or .json"),
        ("other.json", "[]", "expected benchmark rows, .csv or .json"),
        ("memory.csv", table.to_csv(run(suite="memory")), "expected rows of suite 'step', found m"),
        ("empty.csv", table.to_csv([]), "expected rows of suite 'step', found no rows"),
    ],
)
def test_a_file_without_such_rows_is_refused_before_anything_runs(tmp_path, name, text, says):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=says):
        runner.run_suite(smoke=True, against=tmp_path / name)
