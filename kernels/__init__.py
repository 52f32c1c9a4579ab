"""Triton kernels, installed as ``tinybert_fast.kernels``."""

if __name__ == "kernels":
    raise ImportError(
        "this is the source folder of tinybert_fast.kernels, found as a top-level package because "
        "the repository root is on sys.path; it would hide the PyPI package `kernels`: "
        "import tinybert_fast.kernels, or start Python elsewhere (`python -P` keeps the root out)"
    )
