"""Tuning, with a clock that counts: what is compiled ahead, chosen, refused and written."""

import json
import math
import time
from contextlib import contextmanager

import pytest
import torch

from tinybert_fast.benchmarks import tune
from tinybert_fast.kernels import configs, settings
from tinybert_fast.kernels.settings import ANY, Key, Setting
from tinybert_fast.ops.dispatch import INTERPRETED
from tinybert_fast.testing.validation import CALLS, Finding

FASTEST = {
    "forward": Setting(128, 128, 8, 2),
    "dq": Setting(128, 64, 4, 1),
    "dkdv": Setting(64, 32, 4, 2),
}
BASE = configs.FAMILIES[90]
GROUPS = [tune.Group(32, True), tune.Group(32, False)]


def clock_of(one_tile_seconds):
    """A second for each number in which a setting differs from FASTEST; nobody's 64s can run."""

    def clock(which, head, dropout, length, effort):
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


def compiled(base, groups=GROUPS, but=()):
    """Each group with all of its candidates."""
    for group in groups:
        listed = {
            (kernel, setting)
            for kernel in tune.CANDIDATES
            for setting in tune.candidates_of(base, group.key(kernel))
        }
        one_tile = {("one_tile", setting) for of in tune.ONE_TILE.values() for setting in of}
        yield group, (listed | one_tile) - set(but)


def tuned(base, clock, **options):
    return tune.tune(compiled(base, **options), base, clock, lambda _: None)


def test_the_fastest_of_each_kernel_is_chosen():
    found = tuned(start(), clock_of(0.5))
    for dtype in configs.HALF:
        for dropout in (False, True):
            for kernel, setting in FASTEST.items():
                entry = found[Key(kernel, 32, dtype, dropout)]
                assert entry == dict.fromkeys((64, 128, ANY), setting)
            one_tile = found[Key("one_tile", 32, dtype, dropout)]
            assert one_tile.keys() == {64, 128}
            assert all(setting.block_m == up_to for up_to, setting in one_tile.items())


def test_nothing_is_chosen_where_nothing_runs():
    with pytest.raises(tune.Invalid, match="forward of heads of 32 with dropout runs with no"):
        tuned(BASE, lambda *call: float("inf"))


def test_what_does_not_compile_is_not_timed():
    found = tuned(start(), clock_of(0.5), but=[("dq", FASTEST["dq"])])
    second = found[Key("dq", 32, torch.float16, True)][ANY]
    assert second != FASTEST["dq"]
    assert sum(a != b for a, b in zip(second, FASTEST["dq"])) == 1


def test_the_hopeless_are_timed_once():
    """A glance at each; then those within 1.5 times the fastest with care."""
    efforts = []

    def clock(which, head, dropout, length, effort):
        efforts.append((which, effort))
        return clock_of(1e9)(which, head, dropout, length, effort)

    tuned(start(), clock, groups=GROUPS[:1])
    forward = [effort for which, effort in efforts if which == "forward"]
    assert forward.count(tune.SCREEN) == 3 * len(tune.CANDIDATES["forward"])
    assert 0 < forward.count(tune.CAREFUL) < forward.count(tune.SCREEN) / 3


def test_students_and_teachers_come_first():
    assert sorted(tune.ORDER) == [tune.Group(h, d) for h in configs.HEADS for d in (False, True)]
    assert tune.ORDER[:2] == [tune.Group(32, True), tune.Group(64, False)]


@pytest.mark.parametrize("head", [32, 64])
def test_candidates(head):
    """Tiles that a settings file may hold; none twice, and what is built in is among them."""
    for kernel, candidates in tune.CANDIDATES.items():
        assert len(set(candidates)) == len(candidates)
        settings.table_of(
            settings.entries_of({Key(kernel, head, torch.float16, True): {ANY: one}})[0]
            for one in candidates
        )
        built_in = BASE[Key(kernel, head, torch.bfloat16, True)].values()
        assert set(built_in) <= set(candidates)


@pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")
def test_compiled_ahead(tmp_path, monkeypatch):
    """In another process, into the cache that this one then finds filled; all but what is over the
    deadline, and what the compiler refuses.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    good, bad = Setting(64, 64, 4, 1), Setting(64, 48, 4, 1)  # of no power of 2
    monkeypatch.setattr(tune, "CANDIDATES", {"forward": [good, bad]})
    monkeypatch.setattr(tune, "ONE_TILE", {64: [good]})
    workers, group = tune.Workers(1, 90), tune.Group(32, False)
    base = {group.key("forward"): {ANY: good}}
    say = [].append
    try:
        assert not list(workers.compiled([group], base, time.monotonic(), say))
        (found,) = workers.compiled([group], base, math.inf, say)
        assert found == (group, {("forward", good), ("one_tile", good)})
        monkeypatch.setattr(tune, "CANDIDATES", {"forward": [bad]})
        broken = {group.key("forward"): {ANY: bad}}
        with pytest.raises(tune.Invalid, match=r"forward .* compiles with no setting: Comp"):
            list(workers.compiled([group], broken, math.inf, say))
    finally:
        workers._pool.shutdown(cancel_futures=True)
    binaries = set(tmp_path.rglob("*.cubin"))
    assert len(binaries) == 2
    assert not tune.compile_one(90, group, "forward", good)
    assert set(tmp_path.rglob("*.cubin")) == binaries


class Stopwatch:
    """Of a GPU's events: each launch takes a millisecond."""

    launches = 0

    def __init__(self, enable_timing):
        self.at = None

    def record(self):
        self.at = Stopwatch.launches

    def synchronize(self):
        pass

    def elapsed_time(self, stop):
        return float(stop.at - self.at)


def test_clock(monkeypatch):
    """Operands are kept while settings change; what cannot be launched takes for ever."""
    made = []

    def call(*which):
        made.append(which[:4])

        def launch():
            if which[1] == 128:
                raise RuntimeError("out of shared memory")
            Stopwatch.launches += 1

        return launch

    monkeypatch.setattr(torch.cuda, "Event", Stopwatch)
    monkeypatch.setattr(tune, "_call", call)
    clock = tune.gpu_clock(torch.device("cpu"))
    for effort in (tune.SCREEN, tune.CAREFUL, tune.CAREFUL):
        assert clock("forward", 32, True, 64, effort) == pytest.approx(1e-3)
    assert Stopwatch.launches == 3 + 1 * 3 + 2 * 5 * 20
    assert clock("forward", 128, True, 64, tune.SCREEN) == math.inf
    assert made == [("forward", 32, True, 64), ("forward", 128, True, 64)]


class Staff:
    """Stands in for the processes: compiles the first of the groups in time; nothing fails."""

    def __init__(self, findings=()):
        self.findings = list(findings)

    @contextmanager
    def of(self, device):
        yield self

    def compiled(self, groups, base, deadline, say):
        assert deadline < math.inf
        return compiled(base, groups[:1])

    def failed(self, found, device):
        return self.findings


@pytest.fixture
def a_gpu(tmp_path, monkeypatch):
    """Named A, with a clock that counts."""
    monkeypatch.setenv(settings.VARIABLE, str(tmp_path / "settings.json"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A")
    monkeypatch.setattr(configs, "_table", lambda device: start())
    monkeypatch.setattr(tune, "gpu_clock", lambda device: clock_of(0.5))


def test_the_whole(a_gpu, monkeypatch):
    monkeypatch.setattr(tune, "Workers", Staff())
    file, rows = tune.tune_this_gpu([32], minutes=1)
    assert file.exists()
    assert {(key.head, key.dropout) for key in settings.own("A")} == {GROUPS[0]}
    assert [row["dropout"] for row in rows] == [True] * 6 + [False] * 6
    assert [row["settings"] == "built-in: no time was left" for row in rows] == [False] * 6 + [
        True
    ] * 6
    assert len({tuple(row) for row in rows}) == 1  # columns of one table


def test_nothing_is_written_where_validation_fails(a_gpu, monkeypatch):
    wrong = Finding("attention", "triton", "bfloat16", "a call", problem="it is wrong")
    monkeypatch.setattr(tune, "Workers", Staff([wrong]))
    with pytest.raises(tune.Invalid, match="bfloat16, a call: it is wrong"):
        tune.tune_this_gpu([32], minutes=1)
    assert not settings.file().exists()


def test_rows_say_what_was_not_reached():
    reached, other = GROUPS
    found = tuned(start(), clock_of(0.5), groups=[reached])
    row = tune._row("forward", reached, 128, start(), found, clock_of(0.5))
    assert row["settings"] == "forward 128 x 128, 8 warps, 2 stages"
    assert row["after_us"] == 1e6 < row["before_us"]
    row = tune._row("backward", reached, 64, start(), found, clock_of(0.5))
    assert row["settings"] == "one_tile 64 x 64, 4 warps, 1 stages"
    assert (
        "dq 128 x 64"
        in tune._row("backward", reached, 512, start(), found, clock_of(0.5))["settings"]
    )
    row = tune._row("forward", other, 128, start(), found, clock_of(0.5))
    assert row["settings"] == "built-in: no time was left"
    assert row["before_us"] == row["after_us"] == ""


def test_one_tile_is_left_out_where_two_kernels_are_faster():
    found = tuned(start(), clock_of(1e9))
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
    with pytest.raises(ValueError, match="--minutes 0: more than 0"):
        tune.tune_this_gpu([32], minutes=0)


def test_what_is_tuned_is_validated():
    """Each group and bucket of lengths has a call, so that what wins is held against fp64."""
    served = {}
    for label in CALLS["attention"]():
        group = tune.group_of(label)
        if group is not None:
            lengths = label.partition("lengths ")[2].partition(",")[0]
            served.setdefault(group, set()).add(max(map(int, lengths.split())))
    if INTERPRETED:  # other tiles, and fewer calls
        return
    assert served.keys() == set(tune.ORDER)
    for longest in served.values():
        low = 0
        for up_to in tune.LONGEST.values():
            assert any(low < n <= up_to for n in longest)
            low = up_to


def test_calls_that_keep_the_built_in_settings_are_not_validated():
    assert tune.group_of("heads of 26, lengths 5 32, dropout 0.1") == tune.Group(32, True)
    assert tune.group_of("2 heads of 26, padded on the left, lengths 31 0 65") == GROUPS[1]
    assert tune.group_of("heads of 26, anti_causal, lengths 5 32") is None
    assert tune.group_of("heads of 64, mask of blocks of 64, lengths 256 31") is None
    assert tune.group_of("no token, dropout 0.1") is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="times on a GPU")
def test_on_this_gpu(tmp_path, monkeypatch):
    """The whole, with two candidates of each kernel."""
    monkeypatch.setenv(settings.VARIABLE, str(tmp_path / "settings.json"))
    two = [Setting(64, 64, 4, 1), Setting(64, 64, 4, 2)]
    monkeypatch.setattr(tune, "CANDIDATES", dict.fromkeys(tune.CANDIDATES, two))
    monkeypatch.setattr(tune, "ORDER", GROUPS[:1])
    monkeypatch.setattr(tune, "TOKENS", 1 << 13)
    file, rows = tune.tune_this_gpu([32])
    assert settings.own(torch.cuda.get_device_name()).keys() >= {
        GROUPS[0].key(kernel, dtype) for kernel in FASTEST for dtype in configs.HALF
    }
    assert file.exists()
    assert len(rows) == 6
    assert all(row["after_us"] > 0 for row in rows)
