"""benchmarks/gpu.sh: a dry run from end to end, what failing parts leave, and filing the rows."""

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from tinybert_fast.benchmarks import gpu_run, table
from tinybert_fast.benchmarks.gpu_run import Outcome, Part, Run
from tinybert_fast.benchmarks.suites import load_cases, selected

ROOT = Path(__file__).resolve().parents[2]
IMPORT = ROOT / "benchmarks" / "results" / "import.py"
GPU = "NVIDIA H100 80GB HBM3"


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """OUT of a dry run of all parts, and what it printed."""
    folder = tmp_path_factory.mktemp("gpu")
    out = folder / "out"
    done = subprocess.run(
        ["bash", ROOT / "benchmarks/gpu.sh", out, "--dry-run"],
        capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_a_dry_run_leaves_everything_but_a_gpus(rehearsed):
    out, printed = rehearsed
    files = {file.name: file.stat().st_size for file in out.iterdir()}
    assert files.keys() <= set(gpu_run.FILES)
    always = {"results.json", "rows.csv", "profile.json", "bars.png", "memory.png", "log.txt"}
    assert always <= files.keys() <= always | {"roofline.png", "settings.json"}
    assert all(0 < size < 1 << 24 for size in files.values())
    results = json.loads((out / "results.json").read_text())
    parts = {part["part"]: part for part in results["parts"]}
    assert list(parts) == [part.name for part in gpu_run.PARTS]
    for name, part in parts.items():
        assert part["code"] == (None if name in ("install", "tune", "racecheck") else 0), part
        assert f"{name} " in printed
        assert part["found"] in printed
    assert results["dry_run"] is True
    assert results["unreadable"] == []
    assert results["tests"]["passed"] > 10
    assert results["validation"]["calls"] > 3
    assert results["distillation"]["student"]["dev"]["accuracy"] >= 0
    with (out / "rows.csv").open(newline="") as file:
        assert {row["suite"] for row in csv.DictReader(file)} == set(gpu_run.SUITES)
    assert len(printed) < 12_000
    assert printed.rstrip().splitlines()[-1].startswith("racecheck")


# ---- parts that fail -----------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    (tmp_path / "work").mkdir()
    return Run(tmp_path / "work", tmp_path / "none", dry=True, offline=False, cores=2)


def python(code):
    return lambda run, seconds: [[sys.executable, "-c", code], ["echo", "behind it"]]


def last_line(run, text):
    return text.splitlines()[-1]


def test_a_part_ends_with_its_first_failure(run):
    outcome = gpu_run.execute(Part("tune", 1, python("print('one'); exit(3)"), last_line), run, 60)
    assert (outcome.code, outcome.found, outcome.failed) == (3, "one", True)


@pytest.mark.parametrize(("offline", "extra"), [(False, "[test,baselines]"), (True, "")])
def test_what_others_kernels_need_is_installed_with_the_network(offline, extra, tmp_path):
    run = Run(tmp_path, tmp_path, dry=False, offline=offline, cores=2)
    ((*_, what),) = gpu_run.install(run, 60.0)
    assert what == f".{extra}"


def test_commands_that_need_no_other_run_after_a_failure(run):
    part = Part("ops", 1, python("print('one'); exit(3)"), last_line, chained=False)
    outcome = gpu_run.execute(part, run, 60)
    assert (outcome.code, outcome.found) == (3, "behind it")


def options(command, name):
    return [
        word.removeprefix(f"{name}=") for before, word in zip([""] + command, command)
        if before == name or word.startswith(f"{name}=")
    ]  # fmt: skip


def test_every_op_is_timed_before_a_width_or_a_pass_of_it(run):
    builders = load_cases("ops", on_gpu=True)
    first, others, *passes = gpu_run.ops(replace(run, dry=False), 100.0)
    assert [options(command, "--pass") for command in (first, others, *passes)] == [
        ["both"], ["both"], ["forward"], ["backward"],
    ]  # fmt: skip
    assert not any(options(command, "--case") for command in passes)
    once, again = (list(selected(builders, options(c, "--case"))) for c in (first, others))
    assert sorted([*once, *again]) == sorted(builders)
    ops = [name.partition("_ragged")[0].partition("_no_")[0] for name in once]
    assert sorted(set(ops)) == sorted(gpu_run.FIRST_OPS)
    files = [builders[name].func.__module__ for name in gpu_run.FIRST_OPS]
    assert sorted(files) == sorted({build.func.__module__ for build in builders.values()})


def test_ops_begin_nothing_in_the_last_seconds(run, monkeypatch):
    """And what they begin is told the time that is left."""
    now = [0.0]
    monkeypatch.setattr(gpu_run.time, "monotonic", lambda: now[0])
    minutes = []
    for command in gpu_run.ops(run, 100.0):
        minutes += map(float, options(command, "--minutes"))
        now[0] += 70.0 if len(minutes) == 1 else 20.0
    assert minutes == [pytest.approx(gpu_run.INSIDE * left / 60, abs=1e-3) for left in (100, 30)]


def test_rows_of_several_benches_of_a_suite_stand_together(run):
    for number, case in ((0, "c"), (1, "d")):
        command = run.bench("ops", 60.0, number=number)
        (written,) = options(command, "--json")
        table.write_json(Path(written), "ops", rows_of("ops", case))
    said = gpu_run.rows_of("ops")(run, "attention_d26: not begun after 0.4 minutes\n")
    assert said == "4 rows of 2 cases; 1 not begun in time"


@pytest.mark.parametrize("ours", [signal.SIG_DFL, signal.SIG_IGN])  # a background job's
def test_a_part_that_takes_too_long_is_interrupted_first(run, ours):
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('summary')"
    before = signal.signal(signal.SIGINT, ours)
    try:
        outcome = gpu_run.execute(Part("tune", 1, python(code), last_line), run, 4)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (outcome.code, outcome.found) == (gpu_run.TIMED_OUT, "summary")


def test_and_killed_then_with_what_it_started(run, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_run, "GRACE", 0.2)
    code = (
        "import subprocess, sys, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    outcome = gpu_run.execute(Part("tune", 1, python(code), last_line), run, 3)
    assert outcome.code == gpu_run.TIMED_OUT
    deadline = time.monotonic() + 20
    while runs(outcome.found):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def runs(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_cannot_start_or_be_read_is_an_outcome(run):
    absent = Part("tune", 1, lambda run, seconds: [["no-such-program"]], last_line)
    assert gpu_run.execute(absent, run, 5).code == gpu_run.NOT_FOUND
    unread = Part("tune", 1, lambda run, seconds: [["true"]], lambda run, text: str(1 / 0))
    outcome = gpu_run.execute(unread, run, 5)
    assert (outcome.code, outcome.found) == (1, "ZeroDivisionError: division by zero")


def test_without_data_distillation_says_how_to_make_it(run):
    part = next(part for part in gpu_run.PARTS if part.name == "distil")
    outcome = gpu_run.execute(part, replace(run, dry=False), 5)
    assert not outcome.failed
    assert "skipped: no data; `python benchmarks/gpu_data.py" in outcome.found


def test_races_are_looked_for_whatever_memcheck_takes(run, tmp_path, monkeypatch):
    """Each has half of the time."""
    compute_sanitizer = tmp_path / "compute-sanitizer"
    compute_sanitizer.write_text(
        "#!/bin/sh\ncase $* in *memcheck*) exec sleep 60;; esac\necho called attention; exit 9\n"
    )
    compute_sanitizer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = gpu_run.perform(given(tmp_path / "out", minutes=4 / 60), sanitizers(), run.work)
    parts = json.loads((tmp_path / "out" / "results.json").read_text())["parts"]
    assert found == 1
    assert [(part["part"], part["code"], part["found"]) for part in parts] == [
        ("memcheck", gpu_run.TIMED_OUT, "0 calls"), ("racecheck", 9, "1 calls"),
    ]  # fmt: skip


def sanitizers():
    return [part for part in gpu_run.PARTS if part.name in ("memcheck", "racecheck")]


def given(out, minutes):
    """The command line, of a run that is none of a dry one."""
    out.mkdir()
    return Namespace(out=out, data=out, dry_run=False, offline=True, minutes=minutes)


def test_what_a_killed_part_left_half_written_loses_nothing_else(run, tmp_path):
    (run.work / "validate.json").write_text('{"findings": [')
    (run.work / "tests.xml").write_text('<?xml version="1.0"?><testsuites><testsuite><testca')
    (run.work / "tune.json").write_text('{"rows": [{"kernel": "dq"}]}')
    (run.work / "step.json").write_bytes(b'{"rows": "\xff')
    (run.work / "tests.log").write_text("killed\n")
    outcomes = [Outcome("tests", 1.0, gpu_run.TIMED_OUT, "no summary")]
    gpu_run.collect(run, outcomes, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["tests"], results["tuning"]) == ({}, [{"kernel": "dq"}])
    said = [line.partition(": ")[::2] for line in results["unreadable"]]
    assert [name for name, _ in said] == ["step.json", "tests.xml", "validate.json"]
    assert said[1][1].startswith("ParseError: unclosed token")
    log = (tmp_path / "log.txt").read_text()
    printed = gpu_run.ending(run, outcomes)
    for line in results["unreadable"]:
        assert f"==== unreadable: {line}" in log
        assert f"UNREADABLE {line}" in printed


def test_its_own_outcome_says_what_a_part_left_half_written(run):
    (run.work / "validate.json").write_text('{"findings": [')
    part = Part("validate", 1, lambda run, seconds: [["true"]], gpu_run.read_validate)
    outcome = gpu_run.execute(part, run, 5)
    assert outcome.code == 1
    assert outcome.found.startswith("JSONDecodeError: ")


def test_plots_and_the_probe_of_the_module_end(run, tmp_path, monkeypatch):
    (tmp_path / "rows.csv").write_text("suite\n")
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(gpu_run.sys, "executable", str(slow))
    monkeypatch.setattr(gpu_run, "DRAWING", 0.1)
    monkeypatch.setattr(gpu_run, "PROBE", 0.1)
    assert gpu_run.draw(run, tmp_path) == "not drawn within 0.1 s"
    installed = Part("install", 1, lambda run, seconds: [["true"]], gpu_run.read_install)
    outcome = gpu_run.execute(installed, run, 5)
    assert (outcome.code, outcome.found.partition(":")[0]) == (1, "TimeoutExpired")


def test_failing_tests_are_named_with_their_first_line(run, tmp_path):
    suite = tmp_path / "test_it.py"
    suite.write_text(
        "import pytest\ndef test_good(): pass\n"
        "@pytest.mark.skip\ndef test_left_out(): pass\n"
        "@pytest.mark.parametrize('i', range(30))\ndef test_bad(i): assert i < 0, 'too small'\n"
    )
    xml = run.work / "tests.xml"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junitxml={xml}", suite],
        capture_output=True, text=True,
    )  # fmt: skip
    assert gpu_run.read_tests(run, done.stdout) == "30 failed, 1 passed, 1 skipped"
    (run.work / "tests.log").write_text("the end\n")
    printed = gpu_run.ending(run, [Outcome("tests", 1.0, 1, "1 passed, 30 failed")])
    assert "test_it::test_bad[0]: AssertionError: too small" in printed
    assert "... and 10 more" in printed
    assert printed.splitlines()[-1].split() == "tests 1.0 1 1 passed, 30 failed".split()


def test_the_printed_end_is_short_whatever_happened(run):
    rows = [{**dict.fromkeys(table.COLUMNS, 1.0), "case": "c" * 40}] * 900
    (run.work / "step.json").write_text(json.dumps({"rows": rows}))
    printed = gpu_run.ending(run, [Outcome("step", 1.0, 0, "x" * 5000)] * 10)
    assert len(printed) <= gpu_run.PRINTED
    assert "cut; the rest is in log.txt" in printed


def test_a_long_log_is_cut_in_its_middle(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "LOG_BYTES", 100)
    (run.work / "tests.log").write_text("first" + 500 * "." + "last")
    gpu_run.collect(run, [Outcome("tests", 1.0, 0, "")], tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert "first..." in log
    assert log.endswith("...last")
    assert "409 bytes left out" in log


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--parts", "tests,lint"], "'lint' is not one of"), (["--minutes", "0"], "more than 0")],
)
def test_refuses(words, says, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        gpu_run.main([str(tmp_path / "out"), *words])
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["profile.json", "settings.json", "roofline.png"])
def test_a_folder_of_an_earlier_run_is_refused(name, tmp_path, capsys):
    """A part that leaves nothing this time would leave that run's file beside the new rows."""
    (tmp_path / name).write_text("measured")
    with pytest.raises(SystemExit, match="2"):
        gpu_run.main([str(tmp_path), "--parts", "memcheck", "--dry-run", "--minutes", "0.01"])
    assert f"{name} of an earlier run: name another folder" in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "measured"


# ---- filing the rows -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filing():
    spec = importlib.util.spec_from_file_location("import_results", IMPORT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(suite, case="c", date="2026-11-26T01:00:00Z", **cells):
    """A case as a GPU's bench leaves it."""
    same = {
        "suite": suite, "case": case, "date": date, "gpu": GPU, "commit": "none", "pass": "both",
        "dtype": "bf16", "batch": 2, "width": 4, "valid_tokens": 8, "valid_fraction": 1.0,
        "threads": 2, "torch": "2.11.0", "triton": "3.6.0",
    }  # fmt: skip
    return [
        {**dict.fromkeys(table.COLUMNS), **same, "provider": who, "role": role, "median_ms": ms,
         **cells}
        for who, role, ms in (("eager", "a", 4.0), ("ours", "ours", 2.0))
    ]  # fmt: skip


@pytest.fixture
def out(tmp_path):
    """A folder as a GPU leaves it: two suites of a case each."""
    table.CsvFile(tmp_path / "out" / "rows.csv").write([*rows_of("step"), *rows_of("ops")])
    (tmp_path / "out" / "profile.json").write_text('{"profiles": [1]}')
    (tmp_path / "out" / "bars.png").write_bytes(b"of this run alone")
    (tmp_path / "results").mkdir()
    return tmp_path / "out"


NAME = "nvidia-h100-80gb-hbm3"


def test_rows_are_filed_once(filing, out, tmp_path):
    results = tmp_path / "results"
    written = filing.file_results(out, results, commit="abc")
    assert {file.name for file in written} == {
        f"step-{NAME}.csv", f"ops-{NAME}.csv", f"profile-{NAME}.json", f"bars-{NAME}.png",
    }  # fmt: skip
    rows = filing.read(results / f"ops-{NAME}.csv")
    assert [(row["suite"], row["commit"]) for row in rows] == [("ops", "abc")] * 2
    assert json.loads((results / f"profile-{NAME}.json").read_text())["commit"] == "abc"
    before = {file.name: file.read_bytes() for file in results.iterdir()}
    for commit in ("abc", "abd"):  # who files them again, and where from, is no measurement
        with pytest.raises(ValueError, match=r"already has 2 of these rows.*under commit abc"):
            filing.file_results(out, results, commit=commit)
    assert {file.name: file.read_bytes() for file in results.iterdir()} == before


def test_another_measurement_is_filed_behind(filing, out, tmp_path):
    results = tmp_path / "results"
    filing.file_results(out, results, commit="abc")
    (out / "rows.csv").unlink()
    table.CsvFile(out / "rows.csv").write(rows_of("ops", date="2026-11-26T02:00:00Z"))
    filing.file_results(out, results, commit="abc")
    dates = [row["date"] for row in filing.read(results / f"ops-{NAME}.csv")]
    assert dates == ["2026-11-26T01:00:00Z"] * 2 + ["2026-11-26T02:00:00Z"] * 2


def test_figures_are_of_all_that_is_filed(filing, out, tmp_path, monkeypatch):
    """An OUT of one case leaves the others in the figure, each with its newest rows."""
    results = tmp_path / "results"
    filing.file_results(out, results, commit="abc")
    (out / "rows.csv").unlink()
    again = rows_of("ops", date="2026-11-26T02:00:00Z")
    table.CsvFile(out / "rows.csv").write([*again, *rows_of("ops", case="d")])
    drawn = []
    monkeypatch.setattr(filing, "draw", lambda rows, *_: drawn.extend(rows) or [])
    filing.file_results(out, results, commit="abd")
    assert [(row["suite"], row["case"], row["date"][11:13]) for row in drawn] == [
        (*of_case, hour) for *of_case, hour in
        (("step", "c", "01"), ("ops", "c", "02"), ("ops", "d", "01")) for _ in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (GPU, "none", "a dry run is not filed"),
        ("suite,case", "suite,place", "other columns than the table: case, place"),
        ("none", "none", "rows without a commit"),
    ],
)
def test_refuses_to_file(filing, out, tmp_path, old, new, says):
    rows = out / "rows.csv"
    rows.write_text(rows.read_text().replace(old, new))
    with pytest.raises(ValueError, match=says):
        filing.file_results(out, tmp_path / "results")
    assert not list((tmp_path / "results").iterdir())


def test_refuses_a_folder_without_rows(filing, tmp_path):
    with pytest.raises(ValueError, match=r"has no rows\.csv"):
        filing.file_results(tmp_path)
