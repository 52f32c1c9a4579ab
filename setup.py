"""Installs the top-level folders as tinybert_fast.kernels and tinybert_fast.benchmarks, and builds
csrc/ as tinybert_fast._native.

Everything else is said in pyproject.toml. TINYBERT_FAST_NATIVE says what is built: `off` nothing,
`cpu` no CUDA, `cuda` both, where a failure is an error; without it as much as can be, with a
warning about the rest. CXX, CXXFLAGS and LDFLAGS are heard, as a shell would split them; -Werror
among CXXFLAGS, with which the tests build, is nvcc's too.
"""

import os
import shlex
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
CUDA_ARCHITECTURES = ("80", "90", "100")  # A100, H100 and H200, B200 (nvcc 12.8 or newer)
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden"]
LINK_FLAGS = ["-static-libstdc++", "-static-libgcc"]
if sys.platform == "darwin":  # whose linker has neither, and looks for Python's symbols at once
    LINK_FLAGS = ["-undefined", "dynamic_lookup"]


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
                "needs GCC 9 or newer, or clang ($CXX, by default g++), pybind11 and ninja",
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


def architectures(compiler: str) -> list[str]:
    """Those of CUDA_ARCHITECTURES that this nvcc compiles for."""
    listing = subprocess.run(
        [compiler, "--list-gpu-code"], check=True, capture_output=True, text=True
    ).stdout.split()
    known = [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in listing]
    if not known:
        raise OSError(f"{compiler} compiles for none of sm_{', sm_'.join(CUDA_ARCHITECTURES)}")
    if len(known) < len(CUDA_ARCHITECTURES):
        warnings.warn(
            f"tinybert_fast._native for sm_{', sm_'.join(known)} alone, which is all of sm_"
            f"{', sm_'.join(CUDA_ARCHITECTURES)} that {compiler} compiles for",
            stacklevel=1,
        )
    return known


def write_ninja(ninja, target: Path, *, cuda: bool) -> None:
    import pybind11
    from ninja.ninja_syntax import escape

    def given(name: str) -> list[str]:
        return shlex.split(os.environ.get(name, ""))

    def line(*words: str) -> str:
        return escape(shlex.join(words))

    cxx = given("CXX") or ["g++"]  # perhaps behind a launcher, and with flags: `ccache g++ -m64`
    options = [word for word in cxx if word.startswith("-")]
    programs = [word for word in cxx if word not in options]
    for program in programs:
        if shutil.which(program) is None:
            raise OSError(f"no C++ compiler {program!r} was found")
    compiler = nvcc() if cuda else cxx[0]
    if compiler is None:
        raise OSError("no nvcc was found, neither in CUDA_HOME nor on the PATH")
    flags = [*CXX_FLAGS, *given("CXXFLAGS")]
    link_flags = [*LINK_FLAGS, *given("LDFLAGS")]
    includes = [f"-I{pybind11.get_include()}", "-isystem", sysconfig.get_path("include")]
    sources = sorted(CSRC.resolve().glob("*.cpp"))
    link = f"{line(*cxx)} -shared {line(*link_flags)} $in -lpthread -ldl -o $out"
    if cuda:
        known = architectures(compiler)
        flags.append(f'-DTBF_CUDA="{" ".join(known)}"')
        host = ["-ccbin", programs[-1], *(f"-Xcompiler={option}" for option in options)]
        strict = ["-Werror=all-warnings"] if "-Werror" in flags else []
        generate = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in known]
        for_gpus = line(compiler, *NVCC_FLAGS, *strict, *generate, *host)
        ninja.rule(
            "cuda", f"{for_gpus} -MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc"
        )
        sources += sorted(CSRC.resolve().glob("*.cu"))
        wrapped = line(compiler, "-shared", "-cudart=static", *host,
                       *(f"-Xcompiler={flag}" for flag in link_flags))  # fmt: skip
        link = f"{wrapped} $in -o $out"
    command = f"{line(*cxx, *flags)} -MMD -MF $out.d {line(*includes)} -c $in -o $out"
    ninja.rule("cxx", command, depfile="$out.d", deps="gcc")
    ninja.rule("link", link)
    objects = []
    for source in sources:
        rule = "cuda" if source.suffix == ".cu" else "cxx"
        objects += ninja.build(f"{source.name}.o", rule, str(source))
    ninja.build(str(target), "link", objects)


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
