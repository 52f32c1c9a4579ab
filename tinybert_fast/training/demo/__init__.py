"""The main job on real data, end to end: what `tinybert-fast demo` runs."""

from tinybert_fast.training.demo.phases import PHASES, run_demo
from tinybert_fast.training.demo.settings import FULL, QUICK, DemoSettings

__all__ = ["FULL", "PHASES", "QUICK", "DemoSettings", "run_demo"]
