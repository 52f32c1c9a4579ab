"""Triton kernels, installed as ``tinybert_fast.kernels``.

Where the repository's root is on sys.path, this folder is found as a top-level ``kernels`` too, the
name of a PyPI package that Transformers looks for.
"""

from importlib import metadata

if __name__ == "kernels":
    try:
        metadata.version("kernels")
    except metadata.PackageNotFoundError:
        # Nothing is hidden. Transformers asks for a version, takes this for too old, and goes on.
        __version__ = "0"
        __path__ = []  # so that `import kernels.attention` finds nothing
    else:
        raise ImportError(
            "this is the source folder of tinybert_fast.kernels, found as a top-level package "
            "because the repository root is on sys.path; it would hide the PyPI package `kernels`, "
            "which is installed: import tinybert_fast.kernels, or start Python elsewhere"
        )
