"""Installs the top-level folders as tinybert_fast.kernels and tinybert_fast.benchmarks.

Everything else is said in pyproject.toml.
"""

from setuptools import find_packages, setup

MAPPED = ("kernels", "benchmarks")

setup(
    packages=find_packages(include=["tinybert_fast*"])
    + [f"tinybert_fast.{name}" for name in find_packages(include=[f"{top}*" for top in MAPPED])],
    package_dir={f"tinybert_fast.{top}": top for top in MAPPED},
)
