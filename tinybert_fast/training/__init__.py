"""Training runs: pre-training, fine-tuning, distillation, evaluation. ``recipes``, which loads at
first use, has ``pretrain``, ``distill_general`` and ``distill_task``.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name != "recipes":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(f"{__name__}.{name}")
