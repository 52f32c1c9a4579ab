"""What a call makes Triton's kernels do, seen in their interpreter: settings, blocks visited."""

import importlib
import pkgutil
from collections import Counter

import pytest
import torch

from tinybert_fast import kernels, ops
from tinybert_fast.benchmarks import gpu_calls
from tinybert_fast.ops import dispatch
from tinybert_fast.testing import validation
from tinybert_fast.testing.operands import (
    Case,
    attention,
    attention_relation_kl,
    attention_score_mse,
    with_itself,
)

pytestmark = pytest.mark.skipif(not dispatch.INTERPRETED, reason="looks into the interpreter")

BLOCK_M, BLOCK_N = 32, 64  # interpreted, under a block mask


@pytest.fixture
def visits(monkeypatch):
    """How often each kernel adds a tile of scores."""
    found = Counter()

    def counting(name, helper):
        def call(*operands):
            found[name] += 1
            return helper(*operands)

        return call

    for module, name in (
        ("attention.forward", "_step"),
        ("attention.backward", "_add_dq"),
        ("attention.backward", "_add_dkdv"),
        ("attention_score_mse", "_add_block"),
    ):
        module = importlib.import_module(f"tinybert_fast.kernels.{module}")
        monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return found


def tiles(length):
    return -(-length // BLOCK_M) * -(-length // BLOCK_N)


@pytest.mark.parametrize("side", [64, 128])
@pytest.mark.parametrize("kind", ["full", "partial"])
def test_blocks_beyond_a_sequence_are_not_visited(kind, side, visits):
    """A mask of 512 positions, shared by sequences of one block, part of a second, and of all."""
    allowed = torch.ones(512, 512, dtype=torch.bool)
    if kind == "partial":
        allowed[::side] = False
        allowed[::side, ::side] = True
    mask = ops.BlockMask.from_dense(allowed, side)
    lengths = (64, 70, 512)
    attention(lengths, heads=1, width=16, block_mask=mask).run("triton")
    scores = sum(tiles(length) for length in lengths)
    assert visits == {"_step": scores, "_add_dq": scores, "_add_dkdv": scores}
    visits.clear()
    attention_score_mse(lengths, 1, 16, 16, form="direct", block_mask=mask).run("triton")
    assert visits == {"_add_block": scores + sum(map(tiles, lengths))}


@pytest.mark.parametrize("itself", [False, True], ids=["a_b", "itself"])
@pytest.mark.parametrize("length", [20, 70], ids=["a_tile", "tiles"])
def test_a_relation_has_the_students_settings(length, itself, monkeypatch):
    """Tiles of half precision, which a wider teacher may have, spill in fp32."""
    from tinybert_fast.kernels import configs

    served, asked = configs.attention_if_served, []

    def recorded(kernel, scores):
        asked.append(scores.dtype)
        return served(kernel, scores)

    monkeypatch.setattr(configs, "attention_if_served", recorded)
    case = attention_relation_kl((length,), 1, 26, 1, 64, 1)
    a, b, c, d = case.operands
    mixed = Case(case.op, (a, b, c.half(), d.half()), case.options)
    case = Case(case.op, (a, b, c.half().float(), d.half().float()), case.options)
    if itself:
        mixed, case = with_itself(mixed), with_itself(case)
    found = mixed.run("triton", upstream_dtype=torch.float32)
    assert set(asked) == {torch.float32}
    torch.testing.assert_close(found, case.run("triton"), rtol=0.0, atol=0.0)


def every_kernel():
    """(module, name) of each that is launched, but of those that GPUs alone have."""
    names = [m.name for m in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.")]
    return {
        (name, function)
        for name in names
        for function, kernel in vars(importlib.import_module(name)).items()
        if function.endswith("_kernel") and kernel.fn.__module__ == name
        if not name.endswith(".feed_forward_fp8")
    }


def test_calls_for_the_sanitizer_launch_every_kernel(monkeypatch):
    """benchmarks/gpu_calls.py, whose labels are those of a GPU's calls."""
    from triton.runtime.interpreter import GridExecutor

    monkeypatch.setattr(gpu_calls, "COMPILED", ("triton",))
    monkeypatch.setattr(validation, "ATTENTION_INTERPRETED", validation.ATTENTION)
    monkeypatch.setattr(validation, "SEVERAL_TILES", (31, 129))
    monkeypatch.setattr(
        validation,
        "RELATION_LENGTHS",
        (*validation.RELATION_LENGTHS, (0, 31, 127, 128), (*validation.MIXED, 512)),
    )
    launched = set()
    monkeypatch.setattr(
        GridExecutor,
        "__call__",
        lambda executor, *_, **__: launched.add((executor.fn.__module__, executor.fn.__name__)),
    )
    assert list(gpu_calls.run(torch.device("cpu")))
    assert launched == every_kernel()
