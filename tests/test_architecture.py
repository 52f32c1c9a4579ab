"""The arrows of ARCHITECTURE.md: who may import whom, and one word for one op in every folder."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "tinybert_fast"
MAPPED = ("kernels", "benchmarks")  # top-level folders that are installed inside the package

BELOW_BENCHMARKS = {
    "training", "integrations", "modules", "data", "testing", "ops", "allocator",
}  # fmt: skip
# Part of the package -> what it may import of the package: a part, or one module of it.
ARROWS = {
    "allocator": set(),
    "reference": {"reference.philox"},
    "tuned": {"tuned", "reference.philox", "reference.block_mask", "ops.layout", "ops.native"},
    "kernels": {"kernels", "reference.philox"},
    "ops": {"ops", "reference", "tuned", "kernels", "_native"},
    "testing": {"testing", "ops", "reference", "integrations"},
    "modules": {"modules", "ops"},
    "data": {"data", "ops"},
    "integrations": {"integrations", "modules", "ops"},
    "training": {"training", "integrations", "modules", "data", "ops"},
    "benchmarks": {"benchmarks", *BELOW_BENCHMARKS},
    "cli": {"cli", "benchmarks", *BELOW_BENCHMARKS},
}
# Single modules: what they may import besides. The last two work on the kernels themselves.
BESIDES = {
    "benchmarks.run": {"cli.main"},
    "benchmarks.machine_code": {"kernels"},
    "benchmarks.tune": {"kernels"},
}
# Parts whose modules must import with torch alone (an import inside a function may ask for more).
TORCH_ALONE = {"reference", "tuned", "ops", "testing"}
# The only part that may name triton, at any depth, and the script that reads what it compiles.
TRITON_HOME = "kernels"
READS_TRITON = "benchmarks.machine_code"

OPS = {
    "attention",
    "attention_relation_kl",
    "attention_score_mse",
    "bias_gelu",
    "block_mask",
    "dropout_add_layer_norm",
    "embedding_layer_norm",
    "feed_forward_fp8",
    "hidden_mse",
    "layer_norm",
    "linear_cross_entropy",
    "mlm_mask",
    "sequence_layout",
    "soft_cross_entropy",
}


def module_of(file: Path) -> str:
    """kernels/tiles.py -> tinybert_fast.kernels.tiles; an __init__.py -> its package."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    if parts[0] in MAPPED:
        parts = (PACKAGE, *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_of(file): file
    for top in (PACKAGE, *MAPPED)
    for file in sorted((ROOT / top).rglob("*.py"))
}


def imports(source: str, module: str, *, is_package: bool) -> Iterator[tuple[str, int, bool]]:
    """(imported module, line, whether importing `module` executes it) of every import statement.

    `from a import b` counts as a.b when that is one of our modules or parts, else as a.
    """
    deferred: set[ast.AST] = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            deferred.update(child for child in ast.walk(node) if child is not node)
    for node in ast.walk(tree):
        eager = node not in deferred
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, eager
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                child = f"{base}.{alias.name}"
                ours = child in MODULES or (base == PACKAGE and alias.name in ARROWS)
                yield child if ours else base, node.lineno, eager


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """Every import of `source`, read as `module`, that breaks a rule; the strings say which."""
    name = module.partition(".")[2]
    part = name.partition(".")[0]
    found = []
    for target, line, eager in imports(source, module, is_package=is_package):
        top = target.partition(".")[0]
        if top == PACKAGE:
            inside = target.partition(".")[2]
            legal = part not in ARROWS or any(
                inside == allowed or inside.startswith(f"{allowed}.")
                for allowed in ARROWS[part] | BESIDES.get(name, set())
            )
            # A package may gather its own modules, and anything may read the version.
            legal |= inside == "" or (is_package and inside.startswith(f"{name}."))
            if not legal:
                found.append(f"{module}:{line} imports {target}: {part} may not")
        elif top == "triton" and part != TRITON_HOME and name != READS_TRITON:
            found.append(f"{module}:{line} imports triton: only {TRITON_HOME} may")
        elif top in MAPPED:
            found.append(f"{module}:{line} imports {target}: say {PACKAGE}.{target}")
        elif (
            eager and part in {*TORCH_ALONE, ""} and top not in {"torch", *sys.stdlib_module_names}
        ):
            found.append(
                f"{module}:{line} imports {top}: {part or PACKAGE} imports with torch alone"
            )
    return found


@pytest.mark.parametrize("module", MODULES)
def test_arrows_run_one_way(module):
    file = MODULES[module]
    broken = violations(file.read_text(), module, is_package=file.name == "__init__.py")
    assert not broken, "\n".join(broken)


def test_every_part_has_its_arrows():
    parts = {
        module.split(".")[1] for module, file in MODULES.items() if file.parent != ROOT / PACKAGE
    }
    assert parts <= set(ARROWS), f"no arrows are given for {parts - set(ARROWS)}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ops.attention", "from tinybert_fast.modules import encoder"),
        ("ops.attention", "from ..training.losses import attention_loss"),
        ("ops.attention", "from .. import cli"),
        ("ops.dispatch", "import triton"),
        ("ops.dispatch", "def probe():\n    import triton"),
        ("ops.dispatch", "import numpy"),
        ("ops.dispatch", "from kernels import attention"),
        ("modules.encoder", "import tinybert_fast.integrations.bert"),
        ("modules.encoder", "def late():\n    from tinybert_fast.training import distill"),
        ("modules.encoder", "from tinybert_fast.reference import attention"),
        ("integrations.bert", "from tinybert_fast.training import finetune"),
        ("training.distill", "from tinybert_fast.cli import main"),
        ("training.losses", "from tinybert_fast.tuned import attention_score_mse"),
        ("reference.attention", "from tinybert_fast.ops.layout import SequenceLayout"),
        ("reference.attention", "from . import layer_norm"),
        ("tuned.attention", "from tinybert_fast.ops.dispatch import choose"),
        ("tuned.attention", "from tinybert_fast.reference.attention import attention"),
        ("kernels.attention", "from tinybert_fast.ops import layout"),
        ("data.collate", "from tinybert_fast.integrations import tinybert"),
    ],
)
def test_a_turned_arrow_is_seen(module, source):
    assert violations(source, f"{PACKAGE}.{module}")


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("reference.attention", "import math\nimport torch\nfrom .philox import keep_mask"),
        ("tuned.attention", "from tinybert_fast.reference.philox import keep_mask"),
        (
            "ops.attention",
            "from .dispatch import choose\nfrom tinybert_fast.reference import attention",
        ),
        ("integrations.bert", "import transformers\nfrom tinybert_fast import ops"),
        (
            "kernels.attention",
            "import triton.language as tl\nfrom tinybert_fast.kernels import tiles",
        ),
        ("cli.main", "from tinybert_fast.training.distill import distill_task"),
    ],
)
def test_a_good_arrow_passes(module, source):
    assert not violations(source, f"{PACKAGE}.{module}")


def stems(folder: str) -> set[str]:
    """The words of a folder: file names, and sub-packages, without prefix `test_`."""
    entries = [
        p for p in (ROOT / folder).iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    ]
    return {entry.stem.removeprefix("test_") for entry in entries} - {"__init__"}


def test_one_op_one_word():
    words = stems(f"{PACKAGE}/reference") - {"philox"}
    assert words >= OPS, f"reference/ lacks {OPS - words}"
    for folder in (f"{PACKAGE}/ops", "tests/ops"):
        assert stems(folder) >= words, f"{folder} lacks {words - stems(folder)}"


def test_faster_implementations_keep_the_word():
    words = stems(f"{PACKAGE}/reference")
    shared = {
        "configs",
        "linear_gelu",
        "philox",
        "products",
        "random",
        "rows",
        "scaled_gradient",
        "settings",
    }  # what several ops of a folder use
    for folder in (f"{PACKAGE}/tuned", "kernels"):
        strangers = stems(folder) - words - shared
        assert not strangers, f"{folder} has {strangers}, which reference/ does not define"


def test_every_launch_says_how_it_is_compiled():
    """What Triton leaves open, its versions answer differently."""
    launches = 0
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript)):
                continue
            if not ast.unparse(node.func.value).endswith("_kernel"):
                continue
            launches += 1
            unpacked = [ast.unparse(word.value) for word in node.keywords if word.arg is None]
            said = [w for w in unpacked if w.endswith(("COMPILED", "launch()", "vocabulary()"))]
            assert len(said) == 1, f"{file.name}: {ast.unparse(node)}"
    assert launches > 20
