#!/usr/bin/env bash
# Minutes on a machine with a GPU into a folder of evidence; `benchmarks/gpu.sh --help` says how.
# PYTHON is the interpreter that has torch and triton (python3 by default).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# The root stays off the path, from Python 3.11 on: its folder kernels/ is no top-level package.
export PYTHONSAFEPATH=1
exec "${PYTHON:-python3}" benchmarks/gpu_run.py "$@"
