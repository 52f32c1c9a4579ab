"""What an installation holds: wheel and editable, the mapped folders, and the guard of kernels/."""

import os
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from email.parser import HeaderParser
from importlib.metadata import distributions
from pathlib import Path

import ninja
import pytest
from ninja import ninja_syntax

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    "MANIFEST.in",
    "pyproject.toml",
    "setup.py",
    "csrc",
    "README.md",
    "LICENSE",
    "tinybert_fast",
    "kernels",
    "benchmarks",
]
# Offline and without build isolation: setuptools, pybind11 and ninja come with [test].
PIP = ["-m", "pip", "--quiet", "--disable-pip-version-check"]
FLAGS = ["--no-index", "--no-deps", "--no-build-isolation"]


def attempt(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """The command's end; nothing of this checkout is on its path."""
    env = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME"}}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**env, "TINYBERT_FAST_NATIVE": "off", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    result = attempt(*command, cwd=cwd, **environment)
    assert result.returncode == 0, f"{command}:\n{result.stdout}\n{result.stderr}"
    return result.stdout.strip()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, so that no build leaves files in the working tree; its path has a
    space.
    """
    copy = tmp_path_factory.mktemp("a checkout")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    """Built without a warning, by a compiler behind a launcher."""
    compiler = f"env {os.environ.get('CXX', 'g++')} -pipe"
    strict = {"TINYBERT_FAST_NATIVE": "cpu", "CXX": compiler, "CXXFLAGS": "-Werror"}
    return build(checkout, tmp_path_factory.mktemp("wheel"), **strict)


def build(checkout: Path, folder: Path, **environment: str) -> zipfile.ZipFile:
    wheel = (*PIP, "wheel", *FLAGS, "--wheel-dir", folder, checkout)
    run(sys.executable, *wheel, cwd=folder, **environment)
    (path,) = folder.glob("tinybert_fast-*.whl")
    return zipfile.ZipFile(path)


def compiled(wheel: zipfile.ZipFile) -> list[str]:
    return [name for name in wheel.namelist() if name.startswith("tinybert_fast/_native.")]


def text_of(wheel: zipfile.ZipFile, suffix: str) -> str:
    (name,) = (name for name in wheel.namelist() if name.endswith(f".dist-info/{suffix}"))
    return wheel.read(name).decode()


def test_wheel_holds_every_module_and_no_other_package(wheel):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in files} == {"tinybert_fast"}
    assert text_of(wheel, "top_level.txt").split() == ["tinybert_fast"]

    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "tinybert_fast").rglob("*.py")}
    for top in ("kernels", "benchmarks"):
        expected |= {f"tinybert_fast/{p.relative_to(ROOT)}" for p in (ROOT / top).rglob("*.py")}
    # Scripts beside the committed rows, which only a checkout has.
    expected = {
        name for name in expected if not name.startswith("tinybert_fast/benchmarks/results/")
    }
    missing = expected - files
    assert not missing, f"left out, perhaps for want of an __init__.py: {sorted(missing)}"


def test_wheel_metadata(wheel):
    metadata = HeaderParser().parsestr(text_of(wheel, "METADATA"))
    always = [need for need in metadata.get_all("Requires-Dist") if "extra ==" not in need]
    assert [need[: len("torch")] for need in always] == ["torch"], always
    assert {"train", "bench", "demo", "test", "dev"} <= set(metadata.get_all("Provides-Extra"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in text_of(wheel, "licenses/LICENSE")
    assert "tinybert-fast = tinybert_fast.cli.main:main" in text_of(wheel, "entry_points.txt")


def test_wheel_imports(wheel, tmp_path):
    wheel.extractall(tmp_path)
    where = run(
        sys.executable,
        "-c",
        "import sys; sys.path.insert(0, sys.argv[1]);"
        "import tinybert_fast, tinybert_fast.kernels as k, tinybert_fast.benchmarks as b;"
        "print(tinybert_fast.__file__, k.__file__, b.__file__, sep='\\n')",
        tmp_path,
        cwd=Path(tmp_path.anchor),
    )
    package = tmp_path / "tinybert_fast"
    assert [Path(line).parent for line in where.splitlines()] == [
        package, package / "kernels", package / "benchmarks",
    ]  # fmt: skip


def test_wheel_has_the_compiled_module(wheel, tmp_path):
    """Of this Python and machine, small, and importable without torch."""
    (name,) = compiled(wheel)
    assert wheel.getinfo(name).file_size < 5 << 20
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in wheel.filename
    wheel.extract(name, tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import _native; "
        "print(_native.isa(), 'torch' in sys.modules)"
    )
    answer = run(sys.executable, "-I", "-c", code, tmp_path / "tinybert_fast", cwd=tmp_path)
    assert answer.endswith(" False")


def test_a_wheel_without_a_compiler_is_pure_python(checkout, tmp_path):
    """And says so; a build that was forced is an error."""
    missing = {"CXX": "no-such-compiler", "PATH": str(tmp_path), "CUDA_HOME": ""}
    assert not compiled(build(checkout, tmp_path, TINYBERT_FAST_NATIVE="", **missing))
    wheel = (sys.executable, *PIP, "wheel", *FLAGS, "--wheel-dir", tmp_path, checkout)
    for forced, message in (
        ("cpu", "no C++ compiler 'no-such-compiler' was found"),
        ("cuda", "no nvcc was found"),
        ("gpu", "TINYBERT_FAST_NATIVE='gpu' is not one of off, cpu, cuda"),
    ):
        compiler = missing if forced == "cpu" else {**missing, "CXX": sys.executable}
        result = attempt(*wheel, cwd=tmp_path, TINYBERT_FAST_NATIVE=forced, **compiler)
        assert result.returncode != 0
        assert message in result.stderr + result.stdout


@pytest.fixture
def setup_py(monkeypatch):
    """What setup.py defines."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    return runpy.run_path("setup.py")


def nvcc_that_knows(folder: Path, *architectures: str) -> Path:
    """It answers --list-gpu-code."""
    script = folder / "bin" / "nvcc"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(f"#!/bin/sh\nprintf '%s\\n' {' '.join(architectures)}\n")
    script.chmod(0o755)
    return script


def test_an_older_nvcc_builds_what_it_can(setup_py, tmp_path):
    architectures = setup_py["architectures"]
    assert architectures(nvcc_that_knows(tmp_path, "sm_75", "sm_80", "sm_90", "sm_100")) == [
        "80", "90", "100",
    ]  # fmt: skip
    with pytest.warns(UserWarning, match="for sm_80, sm_90 alone, .* compiles for"):
        assert architectures(nvcc_that_knows(tmp_path, "sm_75", "sm_80", "sm_90")) == ["80", "90"]
    with pytest.raises(OSError, match="nvcc compiles for none of sm_80, sm_90, sm_100"):
        architectures(nvcc_that_knows(tmp_path, "sm_70"))


@pytest.mark.filterwarnings("ignore:tinybert_fast._native for sm_80 alone")
@pytest.mark.parametrize("strict", [False, True])
def test_commands_of_a_build(strict, setup_py, tmp_path, monkeypatch):
    """Words with spaces, a compiler of several words; warnings are errors where asked for."""
    home, include = tmp_path / "cuda home", tmp_path / "some headers"
    nvcc_that_knows(home, "sm_80")
    monkeypatch.setattr("pybind11.get_include", lambda: str(include))
    for name, value in {
        "CUDA_HOME": str(home),
        "CXX": f"env '{sys.executable}' -m64",
        "CXXFLAGS": "-DNAME='two words'" + (" -Werror" if strict else ""),
        "LDFLAGS": "-Wl,-rpath,'$ORIGIN'",
    }.items():
        monkeypatch.setenv(name, value)
    with (tmp_path / "build.ninja").open("w") as file:
        setup_py["write_ninja"](ninja_syntax.Writer(file), tmp_path / "a target.so", cuda=True)
    asked = [Path(ninja.BIN_DIR, "ninja"), "-C", tmp_path, "-t", "commands"]
    lines = run(*asked, cwd=tmp_path).splitlines()
    by_nvcc = [words for line in lines if (words := shlex.split(line))[0] == str(home / "bin/nvcc")]
    by_cxx = [words for line in lines if (words := shlex.split(line))[0] == "env"]
    assert len(by_nvcc) + len(by_cxx) == len(lines)
    for words in by_nvcc:
        assert words[words.index("-ccbin") + 1] == sys.executable
        assert "-Xcompiler=-m64" in words
        assert ("-Werror=all-warnings" in words) == (strict and "-c" in words)
    for words in by_cxx:
        assert words[:3] == ["env", sys.executable, "-m64"]
        assert {f"-I{include}", "-DNAME=two words", '-DTBF_CUDA="80"'} <= set(words)
        assert ("-Werror" in words) == strict
    (link,) = (words for words in by_nvcc if "-shared" in words)
    assert "-Xcompiler=-Wl,-rpath,$ORIGIN" in link
    assert link[-2:] == ["-o", str(tmp_path / "a target.so")]


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_flags_of_the_linker(platform, request, tmp_path, monkeypatch):
    """Python's symbols are found at the load, which a linker on macOS has to be told."""
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setenv("CXX", sys.executable)
    with (tmp_path / "build.ninja").open("w") as file:
        write = request.getfixturevalue("setup_py")["write_ninja"]
        write(ninja_syntax.Writer(file), tmp_path / "target.so", cuda=False)
    commands = run(Path(ninja.BIN_DIR, "ninja"), "-C", tmp_path, "-t", "commands", cwd=tmp_path)
    (link,) = (line for line in commands.splitlines() if "-shared" in line)
    assert ("-undefined dynamic_lookup" in link) == (platform == "darwin")
    assert ("-static-libgcc" in link) == (platform == "linux")


def test_editable_install(checkout, tmp_path):
    """`pip install -e .` in a throwaway venv finds the mapped folders and sees edits at once."""
    venv.create(tmp_path / "venv", symlinks=os.name != "nt")
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    purelib = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path
    )
    # Everything that this environment has, except its own .pth files: not its tinybert_fast.
    Path(purelib, "outer.pth").write_text("\n".join(site.getsitepackages()))
    run(python, *PIP, "install", *FLAGS, "--ignore-installed", "--editable", checkout, cwd=tmp_path)

    names = ["tinybert_fast", "tinybert_fast.kernels", "tinybert_fast.benchmarks"]
    folders = ["tinybert_fast", "kernels", "benchmarks"]
    probe = (
        "import sys, importlib; [print(importlib.import_module(n).__file__) for n in sys.argv[1:]]"
    )
    found = run(python, "-c", probe, *names, cwd=tmp_path)
    assert found.splitlines() == [str(checkout / folder / "__init__.py") for folder in folders]

    added = checkout / "kernels" / "added_later.py"
    added.write_text("")
    try:
        assert run(python, "-c", probe, "tinybert_fast.kernels.added_later", cwd=tmp_path) == str(
            added
        )
    finally:
        added.unlink()


def from_the_root(*words: str | Path, path: str = "") -> subprocess.CompletedProcess:
    """Python started where the folder kernels/ is found as a top-level package."""
    return attempt(sys.executable, *words, cwd=ROOT, PYTHONPATH=path, HF_HUB_OFFLINE="1")


def test_kernels_hides_no_package(tmp_path):
    """Where the PyPI package of that name is installed, the folder would, and says so."""
    installed = tmp_path / "kernels-0.18.2.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    result = from_the_root("-c", "import kernels", path=str(tmp_path))
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ImportError"), last
    assert "import tinybert_fast.kernels, or start Python elsewhere" in last


without_kernels = pytest.mark.skipif(
    any(distributions(name="kernels")), reason="the PyPI package kernels is installed"
)


@without_kernels
def test_kernels_is_an_empty_top_level_package():
    """Too old for Transformers, which asks whatever has that name for its version."""
    result = from_the_root("-c", "import kernels; print(kernels.__version__)")
    assert result.stdout == "0\n", result.stderr
    for code in ("import kernels.attention", "from kernels import get_kernel"):
        result = from_the_root("-c", code)
        assert result.returncode == 1
        assert "kernels" in result.stderr.splitlines()[-1]


@without_kernels
def test_the_program_runs_from_the_root(tmp_path):
    """As `torchrun -m tinybert_fast.cli` starts it."""
    words = ("-m", "tinybert_fast.cli", "pretrain", "missing.txt", "-o", tmp_path / "model")
    result = from_the_root(*words)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "missing.txt" in line


def test_pytest_keeps_the_root_off_the_path():
    """The guard must not meet the tests: importlib mode asks for neither of these files."""
    assert not (ROOT / "tests" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists()


def test_benchmark_runner_starts_as_a_script():
    assert "--suite" in run(sys.executable, "benchmarks/run.py", "--help", cwd=ROOT)
