"""Launch settings: what a call gets, and the file of one's own."""

import itertools
import json
import warnings

import pytest
import torch

from tinybert_fast.kernels import configs, settings
from tinybert_fast.kernels.settings import ANY, Key, Setting
from tinybert_fast.ops.block_mask import SIDES

DEVICE = torch.device("cuda")
CHOSEN = Setting(32, 128, 2, 3)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv(settings.VARIABLE, str(tmp_path / "settings.json"))
    return tmp_path / "settings.json"


def scores(**changes):
    given = {"device": DEVICE, "dtype": torch.bfloat16, "width": 26, "longest": 128,
             "dropout": True, "load_bytes": 16, "pattern": "all"}  # fmt: skip
    return configs.Scores(**{**given, **changes})


CALLS = tuple(
    itertools.product(
        [*configs.HALF, torch.float32],
        [1, 26, 32, 64, 65, 128],  # wide
        [1, 64, 65, 512, 1 << 20],  # long
        ["all", "direction", "blocks"],
    )
)


@pytest.mark.parametrize("family", configs.FAMILIES)
def test_every_call_is_served(family):
    with configs.forced(configs.FAMILIES[family]):
        for dtype, width, longest, pattern in CALLS:
            call = scores(dtype=dtype, width=width, longest=longest, pattern=pattern)
            kernels = dict.fromkeys(("forward", "dq", "dkdv"), 32)  # the least side of a tile
            if pattern == "all":
                kernels |= dict.fromkeys(("relation_statistics", "relation_gradient"), 32)
            if width <= 64 and pattern != "direction":
                forms = ("direct",) if pattern == "blocks" else ("direct", "gram")
                kernels |= dict.fromkeys(forms, configs.SMALLEST_DOT)
            for kernel, least in kernels.items():
                setting = configs.attention(kernel, call)
                assert min(setting[:2]) >= least, (kernel, call, setting)
            for kernel in ("one_tile", "relation_one_tile"):
                one = configs.attention_if_served(kernel, call)
                held = one is None or (
                    pattern != "blocks" and one.block_m == one.block_n >= longest
                )
                assert held, (kernel, call, one)


def test_an_entry_is_of_one_kernel_head_dtype_and_dropout():
    table = {
        **configs.FAMILIES[90],
        Key("dq", 32, torch.bfloat16, True): {128: CHOSEN, ANY: Setting(64, 64, 4, 1)},
    }
    with configs.forced(table):
        assert configs.attention("dq", scores()) == CHOSEN
        for other in (
            {"longest": 129}, {"dtype": torch.float16}, {"dropout": False}, {"width": 33},
        ):  # fmt: skip
            assert configs.attention("dq", scores(**other)) != CHOSEN
        assert configs.attention("dkdv", scores()) != CHOSEN


def test_narrow_loads_have_no_pipeline():
    with configs.forced(configs.FAMILIES[90]):
        assert configs.attention("forward", scores()).num_stages > 1
        assert configs.attention("forward", scores(load_bytes=4)).num_stages == 1


@pytest.mark.parametrize(
    ("each", "sequences", "heads", "walked"),
    [
        (12, 200, 12, 12),  # 2 programs to an SM
        (12, 101, 12, 2),  # 12 heads each would keep one SM of 100 busy for twice as long
        (12, 8, 12, 1),  # every head has an SM
        (3, 1000, 16, 2),  # what divides them
        (1, 1000, 12, 1),
    ],
)
def test_a_program_walks_as_many_heads_as_end_soonest(each, sequences, heads, walked, monkeypatch):
    monkeypatch.setattr(configs, "processors", lambda device: 100)
    setting = configs.filling(CHOSEN._replace(heads_each=each), sequences, heads, DEVICE)
    stages = CHOSEN.num_stages if walked > 1 else 1  # one head has nothing to fetch ahead
    assert setting == CHOSEN._replace(heads_each=walked, num_stages=stages)


def test_a_tile_divides_every_block_of_a_mask():
    for family in (*configs.FAMILIES.values(), configs.INTERPRETED_TABLE):
        found = [by for key, by in family.items() if key.pattern == "blocks"]
        assert found
        for setting in (setting for by_length in found for setting in by_length.values()):
            assert all(side % block == 0 for side in SIDES for block in setting[:2])


def test_a_file_of_ones_own_goes_first(file):
    entry = {Key("dq", 32, torch.float16, False): {64: CHOSEN, ANY: Setting(64, 64, 4, 1)},
             Key("one_tile", 32, torch.float16, False): {}}  # fmt: skip
    file.write_text(json.dumps({"H100": settings.entries_of(entry)}))
    assert settings.own("H100") == entry
    assert settings.own("another GPU") == {}


def test_a_named_file_that_is_missing_is_said(file, tmp_path, monkeypatch):
    """That of everyone's home may be missing, and mostly is."""
    with pytest.warns(UserWarning, match=r"TINYBERT_FAST_SETTINGS=.*settings\.json is no file"):
        assert settings.own("H100") == {}
    monkeypatch.delenv(settings.VARIABLE)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert settings.own("H100") == {}


def test_a_device_has_ones_own_before_its_familys(file, monkeypatch):
    key = Key("dq", 32, torch.float16, False)
    file.write_text(json.dumps({"H100": settings.entries_of({key: {ANY: CHOSEN}})}))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    found = configs._table.__wrapped__(DEVICE)
    assert found == {**configs.FAMILIES[90], key: {ANY: CHOSEN}}


@pytest.mark.parametrize(
    ("key", "by_length"),
    [
        (Key("dkv", 32, torch.float16, True), {ANY: CHOSEN}),  # no such kernel
        (Key("dq", 32, torch.float16, True), {64: CHOSEN}),  # longer sequences have none
        (Key("dq", 32, torch.float16, True), {ANY: Setting(48, 64, 4, 1)}),
        (Key("forward", 32, torch.float16, True), {ANY: Setting(256, 64, 8, 1)}),
        (Key("dq", 32, torch.float16, True, "blocks"), {ANY: Setting(128, 64, 8, 1)}),
        (Key("one_tile", 32, torch.float16, True), {128: Setting(64, 64, 4, 1)}),
        (Key("one_tile", 32, torch.float16, True, "blocks"), {64: Setting(64, 64, 4, 1)}),
        (Key("one_tile", 32, torch.float16, True), {64: Setting(64, 64, 4, 1, 0)}),
        (Key("dq", 32, torch.float16, True), {ANY: Setting(64, 64, 4, 1, 2)}),
    ],
)
def test_an_entry_that_would_be_wrong_is_refused(key, by_length, file):
    file.write_text(json.dumps({"H100": settings.entries_of({key: by_length})}))
    with pytest.raises(ValueError, match=r"settings\.json is no table of launch settings"):
        settings.own("H100")


@pytest.mark.parametrize(
    ("capability", "served"),
    [((8, 0), False), ((8, 9), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)],
)
def test_which_gpus_take_a_product_with_its_gelu(capability, served, monkeypatch):
    """Those that load by TMA and have the shared memory."""
    monkeypatch.setattr(configs, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    x = torch.empty(4, 768, dtype=torch.bfloat16)
    assert (configs.linear_gelu(x, 3072) is not None) is served
    for other, columns in ((x.float(), 3072), (x[:, :764], 3072), (x, 3070), (x[:0], 3072)):
        assert configs.linear_gelu(other, columns) is None


def test_the_tables_are_such():
    for family in (*configs.FAMILIES.values(), configs.INTERPRETED_TABLE):
        assert settings.table_of(settings.entries_of(family)) == family


@pytest.mark.parametrize("text", ["{", "[]", '{"H100": [{"kernel": "dq"}]}', '{"H100": 3}'])
def test_a_damaged_file_is_refused(text, file):
    file.write_text(text)
    with pytest.raises(ValueError, match=r"settings\.json is no table of launch settings"):
        settings.own("H100")


@pytest.mark.parametrize("itemsize", [2, 4])
def test_rows_in_flight_fit(itemsize, monkeypatch):
    monkeypatch.setattr(configs, "INTERPRETED", False)
    deepest = {}
    for columns in (*range(8, 8193, 8), 1001, 4097):
        found = configs.rows.__wrapped__("backward", columns, itemsize)
        row = configs.cdiv(columns, found.block_n) * found.block_n * itemsize
        held = configs.IN_FLIGHT * found.block_m * row * (found.stages - 1)
        assert held <= configs.IN_FLIGHT_BYTES, (columns, found)
        deepest[columns] = found.stages
    assert all(deepest[columns] == configs.MOST_STAGES for columns in (312, 384, 768, 1024))
    assert 1 in deepest.values() or itemsize == 2
