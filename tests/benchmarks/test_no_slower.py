"""Our steps have not slowed against the baselines' in the same run: a ratio, never a time.

Rounds are interleaved and the median of their ratios counts, so that whatever else the machine does
slows both sides; and two more tries have to fail too. Bounds lie above the ratios that were seen on
a busy machine, which the comments give.
"""

import time
from functools import partial

import pytest
import torch

from tinybert_fast.benchmarks.baselines import textbrewer
from tinybert_fast.benchmarks.baselines.distillation import Setting
from tinybert_fast.benchmarks.baselines.plain_bert import Form
from tinybert_fast.benchmarks.case import Setup
from tinybert_fast.benchmarks.cases import distill_step, mlm_step
from tinybert_fast.benchmarks.clocks import Clock
from tinybert_fast.benchmarks.rounds import interleave, quantiles
from tinybert_fast.integrations import TinyBertConfig
from tinybert_fast.ops import dispatch

ROUNDS, TRIES = 3, 3
WORDS = 2048  # few, so that the update, the same for all, is little of a small batch's step
TEACHER_LAYERS = 4
CPU = torch.device("cpu")

needs_native = pytest.mark.skipif(
    dispatch.UNAVAILABLE["native"] is not None or dispatch.INTERPRETED,
    reason="the speed is that of the compiled module",
)


def hold(providers, bounds):
    """``bounds``: baseline -> the largest allowed ratio of our time to its."""
    lanes = [(providers[name], "fp32") for name in (*bounds, "ours")]
    found = []
    for _ in range(TRIES):
        *theirs, ours = interleave(lanes, ROUNDS, 1, Clock(CPU)).values()
        rounds = {
            name: [mine / other for mine, other in zip(ours, times)]
            for name, times in zip(bounds, theirs)
        }
        found.append({name: quantiles(each, (0.5,))[0] for name, each in rounds.items()})
        print("ours takes", found[-1])
        if all(found[-1][name] <= bound for name, bound in bounds.items()):
            return
    pytest.fail(
        f"our time over that of the baselines is {found} in {TRIES} tries, of which one should be "
        f"within {bounds}. `tinybert-fast bench --profile` shows where it goes"
    )


@pytest.fixture
def small(monkeypatch):
    """Few words, few layers of the teacher: a step takes about 100 ms."""
    from transformers import BertConfig

    students = partial(TinyBertConfig.tiny_4l_312, vocab_size=WORDS)
    monkeypatch.setattr(TinyBertConfig, "tiny_4l_312", students)
    teachers = partial(BertConfig, num_hidden_layers=TEACHER_LAYERS, vocab_size=WORDS)
    monkeypatch.setattr("transformers.BertConfig", teachers)
    monkeypatch.setattr(textbrewer, "is_installed", lambda: False)


@needs_native
def test_masked_lm_step(small):
    (case,) = mlm_step.cases(Setup(CPU), name="mlm_step", batch=4, width=128)
    providers = {one.name: one for one in case.providers}
    providers["careful"].choose("fp32", Form(4, False))  # its choice in the step suite
    hold(providers, {"transformers": 0.62, "careful": 0.87})  # 0.47 to 0.50, 0.67 to 0.69


@needs_native
def test_distillation_step(small):
    (case,) = distill_step.cases(Setup(CPU), name="distill_step", batch=2, width=128)
    providers = {one.name: one for one in case.providers}
    providers["careful"].choose("fp32", Setting(2, "gram"))
    hold(providers, {"official": 0.85, "careful": 1.0})  # 0.60 to 0.79 but once, 0.44 to 0.83


class Takes:
    """Its runs, one after the other, take so many milliseconds."""

    def __init__(self, *milliseconds):
        self.left = list(milliseconds)

    def run(self, dtype):
        time.sleep(1e-3 * (self.left.pop(0) if len(self.left) > 1 else self.left[0]))


def test_a_slow_step_is_seen():
    with pytest.raises(pytest.fail.Exception, match="in 3 tries, of which one should be within"):
        hold({"careful": Takes(20), "ours": Takes(40)}, {"careful": 1.2})


def test_a_disturbed_try_is_repeated():
    slow_at_first = Takes(*[40] * (1 + ROUNDS), 10)
    hold({"careful": Takes(20), "ours": slow_at_first}, {"careful": 1.2})
