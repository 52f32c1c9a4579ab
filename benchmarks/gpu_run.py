"""Minutes on a machine with a GPU into a folder of evidence: what benchmarks/gpu.sh runs.

    benchmarks/gpu.sh OUT [--minutes 9] [--parts step,tests] [--offline] [--dry-run] [--data DIR]

The parts run in the order of PARTS, the most precious first, each with its share of the minutes
that are left; what one leaves unused goes to those behind it. A part that fails or runs out of time
leaves the others theirs. OUT gets at most 8 files, written anew after every part, and may have none
of an earlier run:

    results.json   facts, each part's outcome, what tests and validation found, tuning, distillation
    rows.csv       the benchmark rows of all suites       profile.json   kernel times of our steps
    bars.png, memory.png, roofline.png (plots.py)         settings.json  launch settings as tuned
    log.txt        all that the parts printed, each cut in its middle beyond LOG_BYTES

`benchmarks/results/import.py OUT` files the rows. ``--dry-run`` rehearses the parts on the CPU at
sizes that mean nothing, with the environment at hand.

Imports the standard library alone: before its first part nothing is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "runs" / "gpu-data"  # git ignores it; gpu_data.py makes it
PROGRAM = [sys.executable, "-m", "tinybert_fast.cli"]
TESTS = (
    "tests/ops tests/modules tests/integrations tests/kernels tests/training/test_launches.py "
    "tests/training/test_teacher.py tests/training/test_graphs.py"
)
TESTS_DRY = "tests/ops/test_bias_gelu.py::test_matches_reference"
CALLS = [sys.executable, "benchmarks/gpu_calls.py"]  # for compute-sanitizer to watch
NEEDED = (  # by the parts; pip names them alike, but for sklearn
    "transformers accelerate safetensors tensorboard matplotlib numpy rich typer datasets "
    "hypothesis pytest sklearn scipy triton"
).split()
SUITES = ("step", "ops", "memory")
FILES = (  # of OUT, where they were made
    "results.json rows.csv profile.json settings.json log.txt bars.png memory.png roofline.png"
).split()
# Cases of the ops suite, as `--case` takes them: of each op one width, then its other ones.
FIRST_OPS = (
    "attention_d26 dropout_add_layer_norm_d312 attention_score_mse_d26 linear_cross_entropy_d312 "
    "hidden_mse_d312 layer_norm_d312 embedding_layer_norm_d312 attention_relation_kl_qk "
    "bias_gelu_d1200 feed_forward_fp8_d768"
).split()
OTHER_OPS = (
    "attention_d64 attention_d32 dropout_add_layer_norm_d768 attention_score_mse_d64 "
    "linear_cross_entropy_d768 hidden_mse_d768 layer_norm_d768 embedding_layer_norm_d768 "
    "attention_relation_kl_vv bias_gelu_d3072"
).split()
MAXIMAL_WORKERS = 14
LEAST = 15.0  # seconds that a bench begins in: it imports and measures ceilings before a case
GRACE = 20.0  # seconds from an interrupt to the kill: pytest takes 10 to print its summary
PROBE, DRAWING = 60.0, 120.0  # seconds for the compiled module to load, for the plots
INSIDE = 0.85  # of a part's time is what a command that can stop by itself is given
LOG_BYTES = 1_500_000  # of a part: all eleven within 16 MiB
PRINTED = 11_000  # characters of the printed end
TIMED_OUT, NOT_FOUND = 124, 127

Command = list[str]


class Skipped(Exception):
    """The part cannot run here; the message says why, and what to do."""


@dataclass(frozen=True)
class Run:
    """What the parts are told."""

    work: Path  # where they leave files for `collect`
    data: Path
    dry: bool
    offline: bool
    cores: int
    damaged: list[str] | None = None  # gets the files that cannot be read; if None, one raises

    def bench(self, suite: str, seconds: float, *more: str, number: int = 0) -> Command:
        """``number``: of several of a suite, whose rows share a .csv; a .json has those of one."""
        size = "--smoke --rounds 1 --threads 1" if self.dry else ""
        json_file = self.work / f"{suite}{number or ''}.json"
        files = ["--json", str(json_file), "--csv", f"{self.work / suite}.csv"]
        minutes = f"{INSIDE * seconds / 60:.3f}"
        return [
            *PROGRAM, *f"bench --suite {suite} --dtype bf16 --minutes {minutes} {size}".split(),
            *more, *files,
        ]  # fmt: skip

    def found(self, name: str) -> dict[str, Any]:
        """What a part wrote as JSON; empty if it did not come so far."""
        return self._read(f"{name}.json", json.loads)

    def tests(self) -> dict[str, Any]:
        """What pytest wrote; see test_results."""
        return self._read("tests.xml", test_results)

    def _read(self, name: str, parse: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        file = self.work / name
        try:
            return parse(file.read_text(encoding="utf-8")) if file.exists() else {}
        except (ValueError, ElementTree.ParseError) as error:  # its writer was killed
            if self.damaged is None:
                raise
            self.damaged.append(f"{name}: {type(error).__name__}: {error}")
            return {}

    def rows(self, suite: str) -> list[dict[str, Any]]:
        """Of all its benches so far."""
        files = sorted(self.work.glob(f"{suite}*.json"))
        return [row for file in files for row in self.found(file.stem).get("rows", [])]


@dataclass(frozen=True)
class Part:
    """``commands`` run one after the other, until one fails if each needs those before it; ``read``
    says in a line what they found, from the files they left and what they printed."""

    name: str
    share: float  # of the minutes
    commands: Callable[[Run, float], Iterable[Command]]  # of the seconds it has
    read: Callable[[Run, str], str]
    chained: bool = True  # each command needs those before it


# ---- the parts -----------------------------------------------------------------------------------


def install(run: Run, seconds: float) -> list[Command]:
    if run.dry:
        raise Skipped("a dry run takes the environment at hand")
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--verbose"]
    if run.offline:
        return [[*pip, "--no-build-isolation", "--no-deps", "-e", "."]]
    return [[*pip, "-e", ".[test,baselines]"]]


def read_install(run: Run, text: str) -> str:
    probe = "import tinybert_fast._native as n; print(n.cuda_architectures or 'no CUDA')"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd="/", timeout=PROBE
    )
    if done.returncode or "CUDA" in done.stdout:
        raise RuntimeError(f"no CUDA in the compiled module: {(done.stdout + done.stderr)[-200:]}")
    return f"compiled module for sm {done.stdout.strip()}{without()}"


def without() -> str:
    return f"; missing packages: {', '.join(missing())}" if missing() else ""


def missing() -> list[str]:
    importlib.invalidate_caches()  # since `install`
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def facts(run: Run, seconds: float) -> list[Command]:
    commands = [[*PROGRAM, "info", "--json", str(run.work / "info.json")]]
    return commands if run.dry else [*commands, ["nvidia-smi"], ["nvcc", "--version"]]


def read_facts(run: Run, text: str) -> str:
    machine = run.found("info").get("machine", {})
    said = ", ".join(f"{name} {machine.get(name)}" for name in ("gpu", "driver", "torch", "triton"))
    return said + without()


def rows_of(suite: str) -> Callable[[Run, str], str]:
    def read(run: Run, text: str) -> str:
        rows = run.rows(suite)
        begun = f"{len(rows)} rows of {len({case_of(row) for row in rows})} cases"
        late = len(re.findall(r": not begun after [\d.]+ minutes", text))
        failed = re.findall(r"no speed is shown: (.+)", text)
        return (
            begun
            + (f"; {late} not begun in time" if late else "")
            + (f"; {failed[0][:120]}" if failed else "")
        )

    return read


def ops(run: Run, seconds: float) -> Iterator[Command]:
    """Every op before any width of it is repeated, and whole ops before their passes: the clock may
    cut off the end. A bench begins in the time that those before it left. A dry run has a case of
    each command."""
    end = time.monotonic() + seconds
    first, others = ([f"--case={name}" for name in names] for names in (FIRST_OPS, OTHER_OPS))
    both, forward, backward = (["--pass", name] for name in ("both", "forward", "backward"))
    commands = [[*both, *first], [*both, *others], forward, backward]
    if run.dry:
        commands = [[*words, *first][:3] for words in commands]
    for number, words in enumerate(commands):
        left = end - time.monotonic()
        if number == 0 or left > LEAST:
            yield run.bench("ops", left, *words, number=number)


def workers(run: Run) -> int:
    """Processes that share the GPU, while each compiles most of the time."""
    return max(1, min(run.cores - 2, MAXIMAL_WORKERS))


def tests(run: Run, seconds: float) -> list[Command]:
    parallel = ""
    if importlib.util.find_spec("xdist") and workers(run) > 1:
        parallel = f"-n {workers(run)} --dist worksteal"
    return [
        [
            sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider",
            f"--junitxml={run.work / 'tests.xml'}", *parallel.split(),
            *(TESTS_DRY if run.dry else TESTS).split(),
        ]
    ]  # fmt: skip


def read_tests(run: Run, text: str) -> str:
    """pytest's own last line, which an interrupted one prints too."""
    counts = re.findall(r"^=*\s*(\d+ [a-z].*?) in [\d.]+s", text, re.MULTILINE)
    said = [line for line in text.splitlines() if line.strip()]
    return counts[-1] if counts else f"no summary: {said[-1][:160]}"


def test_results(text: str) -> dict[str, Any]:
    """{"passed", "skipped", "seconds", "broken": [{"test", "error"}, ...]} of a JUnit file."""
    cases = list(ElementTree.fromstring(text).iter("testcase"))
    broken, skipped = [], 0
    for case in cases:
        wrong = next((e for e in case if e.tag in ("failure", "error")), None)
        skipped += any(e.tag == "skipped" for e in case)
        if wrong is not None:
            said = (wrong.get("message") or wrong.text or "").strip().splitlines()
            name = f"{case.get('classname')}::{case.get('name')}"
            broken.append({"test": name, "error": said[0] if said else ""})
    return {
        "passed": len(cases) - len(broken) - skipped,
        "skipped": skipped,
        "broken": broken,
        "seconds": round(sum(float(case.get("time") or 0) for case in cases), 1),
    }


def validate(run: Run, seconds: float) -> list[Command]:
    how = "--op layer_norm --dtype fp32 --jobs 2" if run.dry else f"--jobs {workers(run)}"
    minutes = f"{INSIDE * seconds / 60:.3f}"
    target = str(run.work / "validate.json")
    return [[*PROGRAM, "validate", *how.split(), "--minutes", minutes, "--json", target]]


def read_validate(run: Run, text: str) -> str:
    found = run.found("validate")
    if not found:
        return "nothing"
    calls, over = len(found["findings"]), len(over_budget(run))
    return f"{calls:,} calls checked against fp64, {over} failed" + (
        "" if found["whole"] else "; stopped before the last"
    )


def over_budget(run: Run) -> list[dict[str, Any]]:
    return [f for f in run.found("validate").get("findings", []) if not f["passed"]]


def tune(run: Run, seconds: float) -> list[Command]:
    if run.dry:
        raise Skipped("tuning times kernels on a GPU")
    return [[*PROGRAM, "bench", "--tune", "--head", "32", "--json", str(run.work / "tune.json")]]


def read_tune(run: Run, text: str) -> str:
    rows = run.found("tune").get("rows", [])
    if not rows:
        return "no settings"
    gains = sorted(row["before_us"] / row["after_us"] for row in rows if row["after_us"])
    if not gains:
        return "nothing reached in time"
    return f"{len(rows)} passes, {gains[0]:.2f}x to {gains[-1]:.2f}x as fast as built in"


def distil(run: Run, seconds: float) -> list[Command]:
    """General distillation, the teacher's fine-tuning, task distillation."""
    work = run.work
    data = work / "data" if run.dry else run.data
    if not run.dry and not (data / "teacher" / "config.json").is_file():
        raise Skipped(f"no data; `python benchmarks/gpu_data.py {data}` makes it")
    student = "4l-312"
    matches = ["--matches", "0:0,1:2,2:3,3:5,4:6"]
    general, fitted, task = "--steps 150 --lr 5e-4", "--epochs 2", (
        "--intermediate-epochs 3 --intermediate-lr 3e-4 --prediction-epochs 2 --prediction-lr 1e-4"
    )  # fmt: skip
    how = ["--bf16"]
    made: list[Command] = []
    if run.dry:
        student, matches = str(data / "student.json"), []
        general, fitted = "--steps 2", "--epochs 1"
        task = "--intermediate-epochs 1 --prediction-epochs 1"
        how = []
        made = [[sys.executable, "benchmarks/gpu_data.py", str(data), "--tiny"]]
    rows = ["--train", str(data / "train.csv"), "--dev", str(data / "dev.csv")]
    teacher, small, fine = str(data / "teacher"), str(work / "general"), str(work / "fine-tuned")
    return [
        *made,
        [
            *PROGRAM, "distill", teacher, "--corpus", str(data / "sentences.txt"), "--student",
            student, *matches, "--init", "pca", *general.split(), *how, "-o", small,
            "--json", str(work / "distil-general.json"),
        ],
        [
            *PROGRAM, "finetune", teacher, *rows, *fitted.split(), *how, "-o", fine,
            "--json", str(work / "distil-teacher.json"),
        ],
        [
            *PROGRAM, "distill", fine, "--student", small, *matches, *rows, *task.split(), *how,
            "-o", str(work / "student"), "--json", str(work / "distil-student.json"),
        ],
    ]  # fmt: skip


def read_distil(run: Run, text: str) -> str:
    found = run.found("distil-student")
    if not found:
        return "no student"
    student, teacher = (found[name]["accuracy"] for name in ("dev", "teacher_dev"))
    return f"student {student:.1%}, teacher {teacher:.1%} on dev"


def memcheck(run: Run, seconds: float) -> list[Command]:
    if run.dry:
        return [[*CALLS, "--device", "cpu"]]
    return sanitize("memcheck")


def racecheck(run: Run, seconds: float) -> list[Command]:
    """Races in shared memory, which compiled Triton kernels use as much as csrc/ does."""
    if run.dry:
        raise Skipped("a dry run has made the calls of memcheck")
    return sanitize("racecheck")


def sanitize(tool: str) -> list[Command]:
    if shutil.which("compute-sanitizer", path=path()) is None:
        raise Skipped("compute-sanitizer is not on the PATH; CUDA's bin folder has it")
    check = "compute-sanitizer --error-exitcode 9 --print-limit 20 --target-processes all --tool"
    return [[*check.split(), tool, *CALLS]]


def read_sanitize(run: Run, text: str) -> str:
    called = re.findall(r"^called .*", text, re.MULTILINE)
    summaries = re.findall(r"^=+ ((?:ERROR|RACECHECK) SUMMARY: .*)", text, re.MULTILINE)
    return f"{len(called)} calls" + "".join(f"; {line.lower()}" for line in summaries)


PARTS = (
    Part("install", 15, install, read_install),
    Part("facts", 3, facts, read_facts),
    Part("step", 20, lambda run, s: [run.bench("step", s, "--profile")], rows_of("step")),
    Part("ops", 20, ops, rows_of("ops"), chained=False),
    Part("tests", 18, tests, read_tests),
    Part("validate", 12, validate, read_validate),
    Part("memory", 6, lambda run, s: [run.bench("memory", s)], rows_of("memory")),
    Part("tune", 8, tune, read_tune),
    Part("distil", 9, distil, read_distil),
    Part("memcheck", 3, memcheck, read_sanitize),
    Part("racecheck", 3, racecheck, read_sanitize),
)


# ---- running them --------------------------------------------------------------------------------


@dataclass
class Outcome:
    part: str
    seconds: float
    code: int | None  # None: skipped
    found: str

    @property
    def failed(self) -> bool:
        return self.code not in (0, None)


def execute(part: Part, run: Run, limit: float) -> Outcome:
    """Runs a part within its limit, all output to a file of its own; never raises."""
    start = time.monotonic()
    log = run.work / f"{part.name}.log"
    try:
        commands = part.commands(run, limit)
    except Skipped as reason:
        return Outcome(part.name, 0.0, None, f"skipped: {reason}")
    code = 0
    with log.open("wb") as output:
        for command in commands:
            output.write(f"$ {' '.join(command)}\n".encode())
            output.flush()
            left = start + limit - time.monotonic()
            failed = call(command, left, output, environment(run, part))
            code = code or failed
            if failed and part.chained:
                break
    text = log.read_text(encoding="utf-8", errors="replace")
    try:
        found = part.read(run, text)
    except Exception as error:  # noqa: BLE001  a half-written file must not end the other parts
        found, code = f"{type(error).__name__}: {error}", code or 1
    return Outcome(part.name, time.monotonic() - start, code, found)


def call(command: Command, seconds: float, output: Any, env: dict[str, str]) -> int:
    """Exit code; TIMED_OUT after so many seconds and GRACE, in which an interrupt may end it."""
    try:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env,
            cwd=ROOT, start_new_session=True, preexec_fn=heed_interrupts,
        )  # fmt: skip
    except OSError as error:
        output.write(f"{error}\n".encode())
        return NOT_FOUND
    try:
        return process.wait(max(seconds, 1.0))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return TIMED_OUT
    finally:  # and whatever it has started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def heed_interrupts() -> None:
    """A shell's background jobs ignore SIGINT, and so would all that they start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def environment(run: Run, part: Part) -> dict[str, str]:
    found = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
        "COLUMNS": "120",
        "TINYBERT_FAST_SETTINGS": str(run.work / "settings.json"),
    }
    if run.dry:
        found["CUDA_VISIBLE_DEVICES"] = ""
    if part.name != "tune":  # what is measured are the built-in settings
        found["TINYBERT_FAST_SETTINGS"] = str(run.work / "none.json")
    if part.name in ("tests", "validate"):
        found["OMP_NUM_THREADS"] = "1"
    if part.name in ("memcheck", "racecheck"):
        # A block that torch keeps would hide what is beyond a tensor.
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    found["PATH"] = path()
    return found


def path() -> str:
    """PATH, and behind it CUDA's programs."""
    cuda = Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda", "bin")
    return os.pathsep.join([os.environ.get("PATH", os.defpath), *([str(cuda)] * cuda.is_dir())])


def case_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("suite", "case", "pass", "dtype", "batch", "width"))


# ---- what is left in OUT -------------------------------------------------------------------------


def collect(run: Run, outcomes: list[Outcome], out: Path) -> None:
    """Writes OUT's files from what the parts have left so far, but for what cannot be read."""
    run = replace(run, damaged=[])
    steps = run.found("step")
    results = {
        "machine": run.found("info").get("machine", {}),
        "dry_run": run.dry,
        "parts": [outcome.__dict__ for outcome in outcomes],
        "missing_packages": missing(),
        "tests": run.tests(),
        "validation": {
            "calls": len(run.found("validate").get("findings", [])),
            "over_budget": over_budget(run),
        },
        "rows": {suite: run.rows(suite) for suite in SUITES},
        "tuning": run.found("tune").get("rows", []),
        "distillation": {
            name: run.found(f"distil-{name}") for name in ("general", "teacher", "student")
        },
    }
    results["unreadable"] = unreadable = sorted(set(run.damaged or ()))
    put(out / "results.json", json.dumps(results, indent=1) + "\n")
    profiles = steps.get("profiles")
    if profiles:
        first = steps["rows"][0]
        told = {name: first[name] for name in ("gpu", "cpu", "torch", "triton", "commit", "date")}
        put(out / "profile.json", json.dumps({**told, "profiles": profiles}, indent=1) + "\n")
    texts = [f.read_text(encoding="utf-8") for s in SUITES if (f := run.work / f"{s}.csv").exists()]
    if texts:
        header = texts[0].partition("\n")[0] + "\n"
        put(out / "rows.csv", header + "".join(text.partition("\n")[2] for text in texts))
    if (run.work / "settings.json").exists():
        shutil.copy(run.work / "settings.json", out)
    logs = [f"==== unreadable: {said}\n".encode() for said in unreadable]
    for outcome in outcomes:
        log = run.work / f"{outcome.part}.log"
        body = log.read_bytes() if log.exists() else b""
        if len(body) > LOG_BYTES:
            half = LOG_BYTES // 2
            cut = f"\n... {len(body) - LOG_BYTES:,} bytes left out ...\n".encode()
            body = body[:half] + cut + body[-half:]
        logs.append(f"==== {outcome.part}: {outcome.found}\n".encode() + body)
    put(out / "log.txt", b"\n".join(logs))


def put(path: Path, content: str | bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    partial.replace(path)


def draw(run: Run, out: Path) -> str:
    """The plots, by a process of its own: here nothing can be imported yet. What it said, if it
    failed or took too long."""
    if not (out / "rows.csv").exists():
        return ""
    try:
        done = subprocess.run(
            [sys.executable, "benchmarks/plots.py", str(out / "rows.csv"), str(out)],
            capture_output=True, text=True, cwd=ROOT, timeout=DRAWING,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"not drawn within {DRAWING:g} s"
    return done.stderr[-800:] if done.returncode else ""


def ending(run: Run, outcomes: list[Outcome], more: Iterable[str] = ()) -> str:
    """What is printed last: failures, figures, and a line for each part."""
    run = replace(run, damaged=[])
    said: list[str] = []
    for outcome in outcomes:
        if outcome.failed:
            log = run.work / f"{outcome.part}.log"
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            said += [f"-- {outcome.part}, the end of its log", *(x[:200] for x in lines[-8:])]
    broken = run.tests().get("broken", [])
    said += [f"FAILED {b['test']}: {b['error']}"[:230] for b in broken[:20]]
    said += [f"... and {len(broken) - 20} more" for _ in broken[20:21]]
    for f in over_budget(run)[:10]:
        what = f["problem"] or ", ".join(x["name"] for x in f["tensors"])
        said.append(f"OVER BUDGET {f['op']} {f['impl']} {f['dtype']} {f['call']}: {what}"[:230])
    figures = [row for suite in SUITES for row in run.rows(suite)]
    said += ["-- ms (of a CUDA graph), times as fast as (a)", *map(figure, figures)]
    said += [
        "-- where our steps spend their ms",
        *map(spent, run.found("step").get("profiles", [])),
    ]
    table = [f"{'part':<9} {'seconds':>7} {'exit':>4}  found"]
    for o in outcomes:
        code = "-" if o.code is None else str(o.code)
        table.append(f"{o.part:<9} {o.seconds:>7.1f} {code:>4}  {o.found[:300]}")
    lost = (f"UNREADABLE {name}"[:230] for name in sorted(set(run.damaged or ())))
    last = "\n".join([*more, *lost, *table])
    first = "\n".join(said)
    room = PRINTED - len(last)
    if len(first) > room:
        first = f"{first[: room - 60]}\n... cut; the rest is in log.txt and rows.csv"
    return f"{first}\n{last}"


def figure(row: dict[str, Any]) -> str:
    graph = "" if row["graph_ms"] is None else f" ({row['graph_ms']:.4g})"
    gain = row["graph_speedup_a"] or row["speedup_a"]
    faster = "" if gain is None else f" {gain:.2f}x"
    phase = "" if row["pass"] == "both" else f" {row['pass']}"
    where = f"{row['case']} B={row['batch']} N={row['width']}{phase}"
    return f"{where} {row['provider']}: {row['median_ms']:.4g}{graph}{faster}"


def spent(profile: dict[str, Any]) -> str:
    """The largest operators of a breakdown."""
    first = (f"{o['name']} {o['ms']:.3g}" for o in profile["operators"][:5])
    total = sum(o["ms"] for o in profile["operators"])
    which = f"{profile['case']} {profile['provider']} {profile['dtype']}"
    return f"{which}: {total:.4g}, of it {', '.join(first)}"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh",
        description="Build, test and measure on this machine's GPU.",
        epilog="Parts, in order: " + ", ".join(part.name for part in PARTS),
    )
    parser.add_argument("out", type=Path, help="folder for the files of this run alone")
    parser.add_argument("--minutes", type=float, default=9.0, help="all parts together")
    parser.add_argument("--parts", help="only these, by commas")
    parser.add_argument("--offline", action="store_true", help="install without the network")
    parser.add_argument("--dry-run", action="store_true", help="rehearse on the CPU")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="what gpu_data.py has made; a dry run makes its own"
    )
    given = parser.parse_args(words)
    names = [part.name for part in PARTS]
    wanted = given.parts.split(",") if given.parts else names
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        parser.error(f"--parts {unknown[0]!r} is not one of {', '.join(names)}")
    if not given.minutes > 0:
        parser.error(f"--minutes {given.minutes}: more than 0 are needed")
    # What is not made this time would stay and pass for this run's.
    earlier = [name for name in FILES if (given.out / name).exists()]
    if earlier:
        parser.error(
            f"{given.out} has {', '.join(earlier)} of an earlier run: name another folder, or "
            "remove them"
        )
    given.out.mkdir(parents=True, exist_ok=True)
    # A caller that ignores interrupts would have the commands do so too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="tinybert-fast-gpu-") as folder:
        return perform(given, [part for part in PARTS if part.name in wanted], Path(folder))


def perform(given: argparse.Namespace, parts: list[Part], work: Path) -> int:
    out = given.out.resolve()
    cores = len(os.sched_getaffinity(0))
    run = Run(work, given.data.resolve(), given.dry_run, given.offline, cores)
    (work / "none.json").write_text("{}\n", encoding="utf-8")  # settings of no GPU
    end = time.monotonic() + 60 * given.minutes
    outcomes: list[Outcome] = []

    def perform_one(part: Part) -> Outcome:
        left = max(end - time.monotonic(), 1.0)
        later = parts[parts.index(part) :]
        limit = left * part.share / sum(other.share for other in later)
        print(f"{part.name}: at most {limit:.0f} s", flush=True)
        return execute(part, run, limit)

    # Side by side where no time is measured.
    side_by_side = ThreadPoolExecutor(cores).map if run.dry else map
    for outcome in side_by_side(perform_one, parts):
        outcomes.append(outcome)
        collect(run, outcomes, out)
    problem = draw(run, out)
    print(ending(run, outcomes, [f"no plots: {problem}"] if problem else []), flush=True)
    return 1 if problem or any(outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
