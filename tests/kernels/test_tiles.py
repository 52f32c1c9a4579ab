"""What a launcher asks of strides, on meta tensors, which hold no numbers."""

import pytest
import torch

from tinybert_fast.kernels.attention.tiles import (
    WIDEST_TILE,
    addressable,
    alignment,
    as_addressable,
)


def meta(shape, strides):
    return torch.empty_strided(shape, strides, dtype=torch.float16, device="meta")


@pytest.mark.parametrize(
    ("shape", "strides", "fits"),
    [
        ((1 << 22, 12, 64), (768, 64, 1), True),  # 3.2e9 numbers in all
        ((64, 4096, 12, 64), (1 << 33, 768, 64, 1), True),  # sequences far apart
        ((64, 12, 64), (1 << 23, 64, 1), True),
        ((64, 12, 64), ((1 << 31) // WIDEST_TILE, 64, 1), False),  # a tile would pass 2^31
        ((64, 12, 64), (768, 1, 12), False),  # the numbers of a head are apart
    ],
)
def test_int64_where_a_tile_may_start_and_int32_inside(shape, strides, fits):
    x = meta(shape, strides)
    assert addressable(x) is fits
    assert addressable(as_addressable(x))
    assert (as_addressable(x) is x) is fits


@pytest.mark.parametrize(
    ("strides", "numbers"), [((312, 26, 1), 2), ((384, 32, 1), 16), ((780, 65, 1), 1)]
)
def test_numbers_that_can_be_loaded_at_a_time(strides, numbers):
    assert alignment(meta((8, 12, strides[1]), strides)) == numbers


def test_a_slice_that_begins_between_two_loads():
    store = torch.zeros(8 * 12 * 32 + 4, dtype=torch.float16)
    assert alignment(store[:-4].view(8, 12, 32)) == 16
    assert alignment(store[4:].view(8, 12, 32)) == 4
