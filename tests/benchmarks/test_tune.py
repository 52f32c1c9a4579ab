"""Tuning, with a clock that counts: what is chosen, refused and written."""

import json

import pytest
import torch

from tinybert_fast.benchmarks import tune
from tinybert_fast.kernels import configs, settings
from tinybert_fast.kernels.settings import ANY, Key, Setting
from tinybert_fast.testing.validation import ATTENTION

FASTEST = {
    "forward": Setting(64, 128, 8, 3),
    "dq": Setting(128, 64, 4, 1),
    "dkdv": Setting(64, 32, 4, 2),
}
BASE = configs.FAMILIES[90]


def clock_of(one_tile_seconds):
    """A second for each number in which a setting differs from FASTEST; nobody's 64s can run."""

    def clock(which, head, dropout, length):
        table = configs.table(torch.device("cpu"))

        def entry(kernel):
            return table[Key(kernel, head, torch.bfloat16, dropout)]

        if which == "backward" and entry("one_tile"):
            return one_tile_seconds
        kernels = ("forward",) if which == "forward" else ("dq", "dkdv")
        tried = {kernel: entry(kernel)[ANY] for kernel in kernels}
        if any(setting.block_m == setting.block_n == 64 for setting in tried.values()):
            return float("inf")
        return 1.0 + sum(
            abs(a - b) for k, setting in tried.items() for a, b in zip(setting, FASTEST[k])
        )

    return clock


def start():
    """As BASE, but every kernel runs with what it starts from."""
    runs = {kernel: Setting(128, 128, 8, 1) for kernel in FASTEST}
    return {
        **BASE,
        **{
            Key(kernel, 32, torch.bfloat16, dropout): {ANY: setting}
            for kernel, setting in runs.items()
            for dropout in (False, True)
        },
    }


def test_the_fastest_of_each_kernel_is_chosen():
    found = tune.tune([32], start(), clock_of(0.5), lambda _: None)
    for dtype in configs.HALF:
        for dropout in (False, True):
            for kernel, setting in FASTEST.items():
                entry = found[Key(kernel, 32, dtype, dropout)]
                assert entry == dict.fromkeys((64, 128, ANY), setting)
            one_tile = found[Key("one_tile", 32, dtype, dropout)]
            assert one_tile.keys() == {64, 128}
            assert all(setting.block_m == up_to for up_to, setting in one_tile.items())


def test_nothing_is_chosen_where_nothing_runs():
    with pytest.raises(tune.Invalid, match="forward of heads of 32 runs with no setting"):
        tune.tune([32], BASE, lambda *call: float("inf"), lambda _: None)


def test_one_tile_is_left_out_where_two_kernels_are_faster():
    found = tune.tune([32], start(), clock_of(1e9), lambda _: None)
    assert found[Key("one_tile", 32, torch.float16, True)] == {}


def test_written_beside_what_is_there(tmp_path, monkeypatch):
    file = tmp_path / "new" / "settings.json"
    monkeypatch.setenv(settings.VARIABLE, str(file))
    one, two = (Key(kernel, 32, torch.float16, True) for kernel in ("dq", "one_tile"))
    tune.write("A", {one: {ANY: FASTEST["dq"]}})
    tune.write("B", {two: {64: tune.ONE_TILE[64][0]}})
    tune.write("A", {two: {}})
    assert settings.own("A") == {one: {ANY: FASTEST["dq"]}, two: {}}
    assert settings.own("B") == {two: {64: tune.ONE_TILE[64][0]}}
    assert json.loads(file.read_text()).keys() == {"A", "B"}


def test_refuses():
    with pytest.raises(ValueError, match="--head 26 is not one of 32, 64, 128"):
        tune.tune_this_gpu([26])


def test_what_is_tuned_is_validated():
    """Each width and bucket of lengths has a call, so that what wins is held against fp64."""
    for head in configs.HEADS:
        longest = {max(lengths) for lengths in ATTENTION[head]}
        low = 0
        for up_to in tune.LONGEST.values():
            assert any(low < n <= up_to for n in longest), (head, up_to)
            low = up_to
