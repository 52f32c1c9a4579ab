"""Installs the top-level folders as tinybert_fast.kernels and tinybert_fast.benchmarks, and builds
csrc/ as tinybert_fast._native.

Everything else is said in pyproject.toml. TINYBERT_FAST_NATIVE says what is built: `off` nothing,
`cpu` no CUDA, `cuda` both, where a failure is an error; without it as much as can be, with a
warning about the rest. CXX, CXXFLAGS and LDFLAGS are heard.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MAPPED = ("kernels", "benchmarks")
CSRC = Path("csrc")
CUDA_ARCHITECTURES = ("80", "90", "100")  # A100, H100 and H200, B200
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Werror=all-warnings", "-Xcompiler=-fPIC,-fvisibility=hidden"]
LINK_FLAGS = ["-static-libstdc++", "-static-libgcc"]


def wanted() -> str:
    choice = os.environ.get("TINYBERT_FAST_NATIVE", "")
    if choice not in ("", "off", "cpu", "cuda"):
        raise SystemExit(f"TINYBERT_FAST_NATIVE={choice!r} is not one of off, cpu, cuda")
    return choice


class BuildNative(build_ext):
    """One object for each source, by ninja: in parallel, and only what has changed."""

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # of an earlier build, which this one may not replace
        if wanted():
            self.build(target, cuda=wanted() == "cuda")
            return
        if nvcc() is not None:
            try:
                self.build(target, cuda=True)
                return
            except (OSError, subprocess.CalledProcessError, ImportError) as error:
                warnings.warn(f"tinybert_fast._native without CUDA: {error}", stacklevel=1)
        try:
            self.build(target, cuda=False)
        except (OSError, subprocess.CalledProcessError, ImportError) as error:
            warnings.warn(
                f"tinybert_fast without its compiled module, whose ops run in Python: {error}. It "
                "needs a C++17 compiler ($CXX, by default g++), pybind11 and ninja",
                stacklevel=1,
            )

    def build(self, target: Path, *, cuda: bool) -> None:
        from ninja import BIN_DIR, ninja_syntax

        folder = Path(self.build_temp).resolve() / ("cuda" if cuda else "cpu")
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "build.ninja").open("w") as file:
            write_ninja(ninja_syntax.Writer(file), target, cuda=cuda)
        subprocess.run([Path(BIN_DIR, "ninja"), "--quiet", "-C", folder], check=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def copy_extensions_to_source(self) -> None:
        """Of an editable install; there is nothing to copy where nothing could be built."""
        built = Path(self.build_lib, self.get_ext_filename(self.extensions[0].name))
        if built.exists():
            super().copy_extensions_to_source()


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    if home and Path(home, "bin", "nvcc").exists():
        return str(Path(home, "bin", "nvcc"))
    return shutil.which("nvcc")


def write_ninja(ninja, target: Path, *, cuda: bool) -> None:
    import pybind11

    cxx = os.environ.get("CXX", "g++")
    if shutil.which(cxx) is None:
        raise OSError(f"no C++ compiler {cxx!r} was found")
    compiler = nvcc() if cuda else cxx
    if compiler is None:
        raise OSError("no nvcc was found, neither in CUDA_HOME nor on the PATH")
    includes = [f"-I{pybind11.get_include()}", f"-isystem {sysconfig.get_path('include')}"]
    flags = CXX_FLAGS + os.environ.get("CXXFLAGS", "").split()
    flags += ["-DTBF_CUDA='\"" + " ".join(CUDA_ARCHITECTURES) + "\"'"] if cuda else []
    ninja.variable("cxx", cxx)
    ninja.rule(
        "cxx", f"$cxx {' '.join(flags)} -MMD -MF $out.d {' '.join(includes)} -c $in -o $out",
        depfile="$out.d", deps="gcc",
    )  # fmt: skip
    sources = sorted(CSRC.resolve().glob("*.cpp"))
    link_flags = LINK_FLAGS + os.environ.get("LDFLAGS", "").split()
    link = f"$cxx -shared {' '.join(link_flags)} $in -lpthread -ldl -o $out"
    if cuda:
        generate = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
        ninja.variable("nvcc", compiler)
        ninja.rule(
            "cuda",
            f"$nvcc {' '.join(NVCC_FLAGS + generate)} -ccbin $cxx -MMD -MF $out.d -c $in -o $out",
            depfile="$out.d", deps="gcc",
        )  # fmt: skip
        sources += sorted(CSRC.resolve().glob("*.cu"))
        wrapped = " ".join(f"-Xcompiler={flag}" for flag in link_flags)
        link = f"$nvcc -shared -cudart=static -ccbin $cxx {wrapped} $in -o $out"
    ninja.rule("link", link)
    objects = []
    for source in sources:
        rule = "cuda" if source.suffix == ".cu" else "cxx"
        objects += ninja.build(f"{source.name}.o", rule, str(source))
    ninja.default(ninja.build(str(target), "link", objects))


def extensions() -> list[Extension]:
    if wanted() == "off" or sys.platform == "win32":
        return []
    sources = [str(path) for path in sorted(CSRC.glob("*")) if path.suffix in (".cpp", ".cu")]
    return [Extension("tinybert_fast._native", sources, depends=sources)]


setup(
    packages=find_packages(include=["tinybert_fast*"])
    + [f"tinybert_fast.{name}" for name in find_packages(include=[f"{top}*" for top in MAPPED])],
    package_dir={f"tinybert_fast.{top}": top for top in MAPPED},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
)
