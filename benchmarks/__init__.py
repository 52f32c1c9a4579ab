"""Benchmark runner and cases, installed as ``tinybert_fast.benchmarks``.

runner.py      what is compared, in which order, and when no speed is printed
cases/         one file per op or step: sizes, inputs, providers
baselines/     what one would use otherwise: (a) as it comes, (b) as a careful user writes it
table.py       the one table: its columns, CSV, JSON, print
plots.py       its rows as figures
gpu_run.py     all of it and the tests, on a GPU, within given minutes (gpu.sh)
"""
