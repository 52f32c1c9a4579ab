"""`import tinybert_fast` needs torch alone, loads nothing else and costs next to nothing more."""

import json
import os
import statistics
import subprocess
import sys

ABSENT = (
    "accelerate datasets matplotlib numpy pandas pyarrow rich safetensors scipy sklearn "
    "tensorboard tokenizers transformers triton typer tinybert_fast._native"
).split()


def without(names: list[str]) -> str:
    """Stand-in for an environment where these are not installed: no finder finds them."""
    return f"""
import sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *where):
        return None if name in {names!r} else self.finder.find_spec(name, *where)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


HIDE = without(ABSENT)
MEASURE = """
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import tinybert_fast
cost = time.process_time() - start
print(json.dumps({"cost": cost, "added": sorted(set(sys.modules) - before)}))
"""
MAX_IMPORT_SECONDS = 0.2  # on top of `import torch`
REPEATS = 5


def python(code: str) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter; no CUDA context, so that timings are of imports only."""
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=os.sep,  # in the checkout kernels/ would hide the PyPI package of that name
    )


def measured() -> dict:
    result = python(MEASURE)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_import_is_light():
    added = {name.partition(".")[0] for name in measured()["added"]}
    strangers = added - {"tinybert_fast", "torch"} - set(sys.stdlib_module_names)
    assert not strangers, f"import tinybert_fast also imports {sorted(strangers)}"


def test_import_is_quick():
    """CPU time of the import that follows torch's, so that other processes do not count."""
    measured()  # writes the byte code
    costs = [measured()["cost"] for _ in range(REPEATS)]
    assert statistics.median(costs) <= MAX_IMPORT_SECONDS, f"import costs {costs} s"


def test_ops_work_with_torch_alone():
    result = python(
        HIDE
        + """
import torch
import tinybert_fast as tbf
x = torch.randn(3, 312, requires_grad=True)
y = tbf.ops.layer_norm(x, torch.ones(312), torch.zeros(312))
y.square().sum().backward()
assert y.shape == x.grad.shape == (3, 312)
"""
    )
    assert result.returncode == 0, result.stderr


def test_ops_import_without_forks():
    """As on Windows, whose os lacks the function."""
    result = python("import os, torch\ndel os.register_at_fork\nimport tinybert_fast.ops")
    assert result.returncode == 0, result.stderr


def test_transformers_part_names_its_extra():
    result = python(HIDE + "import tinybert_fast as tbf\ntbf.accelerate")
    assert result.returncode == 1
    assert "pip install '.[train]'" in result.stderr.splitlines()[-1], result.stderr


def test_command_line_names_its_extra():
    result = python(HIDE + "from tinybert_fast.cli.main import main\nmain()")
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert "pip install '.[train]'" in result.stderr


def test_recipes_load_at_first_use():
    result = python(
        "import tinybert_fast as tbf\nprint(tbf.training.recipes.distill_task.__name__)"
    )
    assert result.stdout == "distill_task\n", result.stderr


def test_masking_and_benchmarks_need_no_datasets():
    result = python(
        without(["datasets"])
        + """
from tinybert_fast.benchmarks.suites import SUITES, load_cases
from tinybert_fast.cli import bench, validate
from tinybert_fast.data import PreTrainingCollator, SparseMaskingCollator
assert all(load_cases(suite) for suite in SUITES)
"""
    )
    assert result.returncode == 0, result.stderr
