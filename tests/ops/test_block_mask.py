"""block_mask: the lists say what the dense mask said; order; refusal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinybert_fast.ops import BlockMask
from tinybert_fast.reference.block_mask import block_mask as reference
from tinybert_fast.testing.operands import normal


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(0, 280),
    masks=st.integers(1, 3),
    side=st.sampled_from([64, 128]),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    seed=st.integers(0, 9),
)
def test_lists_say_what_the_mask_said(size, masks, side, density, seed):
    source = torch.Generator().manual_seed(seed)
    dense = torch.rand(masks, size, size, generator=source) < density
    dense[:, : side + 1, :side] = True  # a full block, and a partial one beneath it
    lists = BlockMask.from_dense(dense, side)
    assert torch.equal(lists.dense, dense)
    assert all(x.dtype == torch.int32 for x in lists.lists)


def test_lists_of_one_mask():
    """Worked by hand: blocks of 64, P partial, F full."""
    dense = torch.zeros(140, 140, dtype=torch.bool)
    dense[:64, 64:128] = True  # F at (0, 1)
    dense[0, 0] = True  # P at (0, 0)
    dense[128:, 128:] = True  # F at (2, 2): all of its cells below 140
    dense[139, 64 + 33] = True  # P at (2, 1)
    *by_query, _, _, _, cells = BlockMask.from_dense(dense).lists
    offsets, blocks, tiles = (x.tolist() for x in by_query[:3])
    assert offsets == [[0, 1, 2, 2, 2, 3, 4]]
    assert blocks == [0, 1, 1, 2]
    assert tiles == [0, -1, 1, -1]
    by_key = [x.tolist() for x in BlockMask.from_dense(dense).lists[3:6]]
    assert by_key == [[[0, 1, 1, 2, 3, 3, 4]], [0, 2, 0, 2], [0, 1, -1, -1]]
    assert cells.shape == (2, 64, 2)
    assert cells[0, 0].tolist() == [1, 0]
    assert cells[1, 139 - 128].tolist() == [0, 1 << (33 - 32)]


def test_the_last_bit_of_a_word():
    dense = torch.zeros(64, 64, dtype=torch.bool)
    dense[3, 31] = dense[4, 63] = True
    assert torch.equal(BlockMask.from_dense(dense).dense[0], dense)


def test_refuses():
    square = normal((4, 4), 0) > 0
    for wrong in (square.int(), square[:3], square[0], square[None, None]):
        with pytest.raises(ValueError, match=r"expected bool \(N, N\) or \(B, N, N\); got"):
            BlockMask.from_dense(wrong)
    narrow = tuple(reference(square[None], 32))  # what no kernel walks
    for lists in (narrow, narrow[:6], tuple(x.long() for x in BlockMask.from_dense(square).lists)):
        with pytest.raises(ValueError, match="seven int32 tensors on one device"):
            BlockMask(4, lists)
    with pytest.raises(ValueError, match="side=48 is not one of"):
        BlockMask.from_dense(square, side=48)
