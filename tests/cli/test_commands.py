"""The program around its commands: help, start-up, missing packages; info and bench."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from tinybert_fast.ops.dispatch import FASTEST_FIRST, OPS

COMMANDS = ("info", "validate", "finetune", "distill", "evaluate", "demo", "bench")
HEAVY = ("torch", "transformers", "datasets", "matplotlib", "numpy", "tensorboard")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd="/",  # not the repository, whose kernels/ would be found as a package
        env=os.environ | {"COLUMNS": "100"},
        timeout=60,
        check=False,
    )


def test_help_loads_nothing_heavy():
    code = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print([m for m in {HEAVY!r} if m in sys.modules]))\n"
        "from tinybert_fast.cli.main import main\n"
        "main(['distill', '--help'])"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_lists_the_commands(cli):
    answer = cli("--help")
    assert answer.code == 0
    assert all(command in answer.out for command in COMMANDS)
    assert cli("-h").out == answer.out


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(cli, command):
    answer = cli(command, "--help")
    assert answer.code == 0
    assert "Examples" in answer.out
    assert f"tinybert-fast {command}" in " ".join(answer.out.split())
    assert "--json" in answer.out


def test_head_is_of_tuning_alone(cli):
    assert "give --tune too" in cli("bench", "--head", "32").line
    if not torch.cuda.is_available():
        assert "on an NVIDIA GPU: no CUDA device" in cli("bench", "--tune").line


def test_version(cli):
    from tinybert_fast import __version__

    assert cli("--version").out == f"tinybert-fast {__version__}\n"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("no-such-command",), "No such command 'no-such-command'"),
        (("evaluate",), "Missing argument"),
        (("info", "--no-such"), "No such option: --no-such"),
        (("distill", "teacher", "-o", "out", "--epochs", "many"), "Invalid value for '--epochs'"),
    ],
    ids=["command", "argument", "option", "value"],
)
def test_wrong_usage_is_a_line_and_code_2(cli, wrong, said):
    line = cli(*wrong).line
    assert said in line
    assert line.endswith("--help\n")


def test_no_command_is_answered_with_help(cli):
    answer = cli()
    assert answer.code == 2
    assert answer.err == ""
    assert "distill" in answer.out


@pytest.mark.parametrize(
    ("absent", "command"),
    [("typer", "--help"), ("transformers", "evaluate")],
)
def test_missing_extra_is_one_line(absent, command):
    arguments = ["evaluate", "model", "file.csv"] if command == "evaluate" else [command]
    code = (
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, *where):\n"
        f"        if name.partition('.')[0] == {absent!r}:\n"
        f"            raise ModuleNotFoundError('hidden', name={absent!r})\n"
        "sys.meta_path.insert(0, Without())\n"
        "from tinybert_fast.cli.main import main\n"
        f"main({arguments!r})"
    )
    done = python(code)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"error: this command needs {absent}; run: pip install '.[train]' in the checkout\n"
    )


TERMINATED = """
import os, signal, sys, time, types
from pathlib import Path
from tinybert_fast.cli.main import main
from tinybert_fast.data.atomic import replacing_folder
def app(**given):
    with replacing_folder(Path(sys.argv[1])) as partial:
        (partial / "00000").write_text("half")
        ready, say = os.pipe()
        worker = os.fork()
        if worker == 0:
            os.write(say, b"!")  # a signal that comes before Python has forked too is lost
            time.sleep(60)
            os._exit(1)
        os.read(ready, 1)
        os.kill(worker, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), flush=True)
        time.sleep(60)
sys.modules["tinybert_fast.cli.app"] = types.SimpleNamespace(app=app)
main([])
"""


def test_sigterm_leaves_nothing_half_written(tmp_path):
    """And a forked worker of the command ends by it as ever."""
    command = [sys.executable, "-c", TERMINATED, str(tmp_path / "lessons")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd="/", text=True)
    assert process.stdout.readline() == "-15\n"
    assert len(list(tmp_path.iterdir())) == 1
    process.terminate()
    assert process.wait(timeout=30) == 143
    assert not list(tmp_path.iterdir())


def test_sigterm_is_the_callers_own_again(cli):
    before = signal.getsignal(signal.SIGTERM)
    assert cli("--version").code == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_python_dash_m():
    done = python(
        "import runpy, sys; sys.argv = ['x', '--version']\n"
        "runpy.run_module('tinybert_fast.cli', run_name='__main__')"
    )
    assert done.stdout.startswith("tinybert-fast "), done.stderr


def test_info(cli, tmp_path):
    answer = cli("info", "--json", tmp_path / "info.json")
    assert answer.code == 0, answer.err
    found = json.loads((tmp_path / "info.json").read_text())
    assert found["command"] == "info"
    assert {"torch", "cpu", "threads", "gpu", "python"} <= set(found["machine"])
    assert set(found["ops"]) == set(OPS)
    for op, of in found["ops"].items():
        assert of["reference"]["runs"], op
        assert of["auto"] in FASTEST_FIRST
        for name in FASTEST_FIRST:  # what does not run says why, in the JSON and on the screen
            assert of[name]["runs"] == (of[name]["why_not"] is None)
            if not of[name]["runs"]:
                assert of[name]["why_not"] in answer.out
    assert "attention_score_mse" in answer.out


def test_info_shows_the_environment(cli, monkeypatch):
    from tinybert_fast.ops import dispatch

    monkeypatch.setattr(dispatch, "FROM_ENVIRONMENT", {"attention": "reference"})
    out = cli("info").out
    row = next(line for line in out.splitlines() if line.split()[:1] == ["attention"])
    assert row.split()[-1] == "reference"
    assert "TINYBERT_FAST_IMPL" in out


def test_info_asks_what_auto_asks(cli, monkeypatch, tmp_path):
    """As on a GPU that the compiled module was not built for."""
    from tinybert_fast.ops import dispatch

    def refusal(limits, name, tensor, facts):
        return "the compiled module was built without CUDA" if name == "native" else None

    monkeypatch.setattr(dispatch.Limits, "refusal", refusal)
    answer = cli("info", "--json", tmp_path / "info.json")
    found = json.loads((tmp_path / "info.json").read_text())["ops"]["mlm_mask"]
    assert found["native"] == {"runs": False, "why_not": refusal(None, "native", None, {})}
    assert "was built without CUDA" in answer.out


def test_info_says_what_nothing_can_serve(cli, monkeypatch, tmp_path):
    from tinybert_fast.ops import dispatch

    monkeypatch.setattr(dispatch, "FROM_ENVIRONMENT", {"attention": "native"})
    monkeypatch.setitem(dispatch.UNAVAILABLE, "native", "nobody compiled it")
    answer = cli("info", "--json", tmp_path / "info.json")
    assert answer.code == 0, answer.err
    found = json.loads((tmp_path / "info.json").read_text())["ops"]["attention"]
    assert found["auto"] is None
    assert "impl='native' cannot serve this call" in found["auto_why_not"]
    assert found["auto_why_not"] in answer.out


def test_bench(cli, tmp_path):
    answer = cli(
        "bench", "--suite", "step", "--case", "mlm", "--smoke", "--rounds", 1, "--threads", 1,
        "--profile", "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    written = json.loads((tmp_path / "rows.json").read_text())
    assert {row["role"] for row in written["rows"]} >= {"a", "b", "ours"}
    assert [profile["provider"] for profile in written["profiles"]] == ["ours"]


def test_bench_refuses(cli):
    assert (
        "--suite 'all' is not one of step, ops, memory, masking, inference, scaling"
        in cli("bench", "--suite", "all").line
    )


def test_bench_shows_no_speed_for_wrong_values(cli, monkeypatch):
    from tinybert_fast.benchmarks import case, runner

    def disagree(*arguments, **more):
        raise case.Disagreement("ours differs by 3")

    monkeypatch.setattr(runner, "run_suite", disagree)
    answer = cli("bench")
    assert answer.code == 1
    assert "ours differs by 3" in answer.out + answer.err
