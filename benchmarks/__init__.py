"""Benchmark runner and cases, installed as ``tinybert_fast.benchmarks``."""
