#!/bin/sh
# Builds csrc/ for the CPU with the address and undefined-behaviour sanitizers, and runs the tests of
# its ops against that build: tests/sanitize.sh [CASES of each fuzz test]. Any finding ends it.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python} # PYTHON: an absolute path, or a name on PATH
cxx=${CXX:-g++}
build=build/sanitize
flags="-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"

rm -rf "$build"
TINYBERT_FAST_NATIVE=cpu CXXFLAGS="$flags" LDFLAGS="$flags" \
    "$python" setup.py --quiet build --build-base "$build" --build-lib "$build/lib"

export PYTHONPATH="$PWD/$build/lib" TINYBERT_FAST_FUZZ_CASES="${1:-300}"
export ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 HF_HUB_OFFLINE=1
cd tests # the root, on Python's path, has a tinybert_fast without sanitizers
"$python" -c 'import importlib.util as u, sys
sys.exit("build/sanitize" not in u.find_spec("tinybert_fast._native").origin)'
# Python itself is not sanitized, so the runtimes come first.
LD_PRELOAD="$("$cxx" -print-file-name=libasan.so) $("$cxx" -print-file-name=libubsan.so)" \
    "$python" -m pytest -q ops/test_mlm_mask.py ops/test_block_mask.py \
    ops/test_sequence_layout.py ops/test_attention.py \
    ops/test_attention_native.py \
    ops/test_attention_score_mse_native.py \
    ops/test_attention_relation_kl_native.py \
    ops/test_dropout_add_layer_norm.py ops/test_embedding_layer_norm.py \
    data/test_masking.py -k "not spawn and not compiles" -p no:cacheprovider
