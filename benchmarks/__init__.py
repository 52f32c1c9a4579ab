"""Benchmark runner and cases, installed as ``tinybert_fast.benchmarks``.

runner.py      runs a suite: cases, printed table, files
suites.py      which cases a suite has
measuring.py   one case: what is done in which order, and its rows
checking.py    values before speed: when there are no rows
clocks.py      how long a call takes, with nobody else on the cores
rounds.py      times in turns, and ratios
cases/         one file per op or step: sizes, inputs, providers
baselines/     what one would use otherwise: (a) as it comes, (b) as a careful user writes it
table.py       the one table: its columns, CSV, JSON, print
agreement.py   how far apart two runs lie
plots.py       its rows as figures
gpu_run.py     all of it and the tests, on a GPU, within given minutes (gpu.sh)
"""
