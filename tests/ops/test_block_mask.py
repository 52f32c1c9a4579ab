"""block_mask: the lists say what the dense mask or the pattern said; order; refusal."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinybert_fast.ops import BlockMask, BlockPattern
from tinybert_fast.reference.block_mask import block_mask as reference
from tinybert_fast.testing.operands import normal
from tinybert_fast.testing.proofs import implementations

IMPLS = [*implementations("block_mask"), "reference"]
CASES = int(os.environ.get("TINYBERT_FAST_FUZZ_CASES", "80"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=CASES, deadline=None)
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
    want = reference(dense, side)
    for impl in IMPLS:
        lists = BlockMask.from_dense(dense.to(DEVICE), side, impl)
        assert torch.equal(lists.dense.cpu(), dense)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(lists.lists, want))


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


def test_outlives_inference_mode(impl):
    dense = torch.rand(70, 70, device=DEVICE) < 0.5
    with torch.inference_mode():
        made = BlockMask.from_dense(dense, impl=impl)
        moved = made.to("meta")
    assert not any(x.is_inference() for x in (*made.lists, *moved.lists))


def test_the_last_bit_of_a_word():
    dense = torch.zeros(64, 64, dtype=torch.bool)
    dense[3, 31] = dense[4, 63] = True
    assert torch.equal(BlockMask.from_dense(dense).dense[0], dense)


@st.composite
def patterns(draw):
    """(pattern, size, options) of one or several masks."""
    side = draw(st.sampled_from([64, 128]))
    size = draw(st.integers(0, 400))
    rule = BlockPattern(
        window=draw(st.sampled_from([None, 0, 3, 63, 64, 100, 2**63 - 1])),
        window_blocks=draw(st.sampled_from([None, 0, 1])),
        global_tokens=tuple(draw(st.lists(st.integers(0, 450), max_size=3))),
        random_blocks=draw(st.integers(0, 3)),
        seed=draw(st.integers(0, 2**63 - 1)),
        side=side,
    )
    source = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    masks = draw(st.integers(1, 3))
    options = {}
    if draw(st.booleans()):
        steps = torch.rand(masks, size, generator=source) < 0.02
        options["documents"] = steps.cumsum(1).int().to(DEVICE)
    if draw(st.booleans()):
        options["lengths"] = torch.randint(0, size + 1, (masks,), generator=source).to(DEVICE)
    if draw(st.booleans()):
        options["dense"] = (torch.rand(masks, size, size, generator=source) < 0.9).to(DEVICE)
    return rule, size, options


@settings(max_examples=CASES, deadline=None)
@given(patterns())
def test_patterns(call):
    rule, size, options = call
    options = {"device": DEVICE, **options}
    want = BlockMask.from_pattern(rule, size, **options, impl="reference")
    for impl in IMPLS[:-1]:
        got = BlockMask.from_pattern(rule, size, **options, impl=impl)
        for a, b in zip(got.lists, want.lists, strict=True):
            assert torch.equal(a, b)


def allowed(rule, size, **options):
    return BlockMask.from_pattern(rule, size, **options).dense[0]


def test_rules_by_hand():
    i, j = torch.meshgrid(torch.arange(200), torch.arange(200), indexing="ij")
    assert torch.equal(allowed(BlockPattern(window=5), 200), (i - j).abs() <= 5)
    blocks = BlockPattern(window_blocks=1)
    assert torch.equal(allowed(blocks, 200), (i // 64 - j // 64).abs() <= 1)
    one = BlockPattern(global_tokens=(3, 900))
    assert torch.equal(allowed(one, 200), (i == 3) | (j == 3))
    assert bool(allowed(BlockPattern(), 200).all())
    documents = (torch.arange(200) // 70)[None].int()
    assert torch.equal(allowed(BlockPattern(), 200, documents=documents), i // 70 == j // 70)
    lengths = torch.tensor([130])
    inside = (i < 130) & (j < 130)
    pruned = BlockMask.from_pattern(BlockPattern(), 200, lengths=lengths)
    assert torch.equal(pruned.dense[0], inside)
    assert len(pruned.lists[1]) == 9 < 16  # the fourth row and column of blocks are left out
    assert torch.equal(allowed(BlockPattern.longformer(8, [0]), 200), (
        ((i - j).abs() <= 4) | (i == 0) | (j == 0)
    ))  # fmt: skip


def test_random_blocks_are_new_to_their_row():
    rule = BlockPattern.bigbird(global_blocks=1, random_blocks=2, seed=9)
    size = 64 * 20
    found = allowed(rule, size).view(20, 64, 20, 64)
    assert bool((found.all(3).all(1) == found.any(3).any(1)).all())  # whole blocks
    whole = found.all(3).all(1)
    r = torch.arange(20)
    known = ((r[:, None] - r).abs() <= 1) | (r[:, None] == 0) | (r == 0)
    assert bool(whole[known].all())
    extra = (whole & ~known).sum(1)
    assert extra[1:].tolist() == [2] * 19
    other = allowed(BlockPattern.bigbird(global_blocks=1, random_blocks=2, seed=10), size)
    assert not torch.equal(other, found.reshape(size, size))
    few = allowed(BlockPattern.bigbird(global_blocks=1, random_blocks=9), 64 * 4)
    assert bool(few.all())  # fewer are left than asked for


@pytest.mark.skipif(len(IMPLS) == 1, reason="the compiled module is not here")
def test_contract():
    probe = torch.empty(0, dtype=torch.bool, device=DEVICE)
    numbers = (100, 2, 64, False, 5, -1, 1, 7)
    conditions = (probe, None, None, None, torch.tensor([90, 3], device=DEVICE), None, *numbers)
    space = torch.ops.tinybert_fast
    torch.library.opcheck(space.block_mask_kinds.default, (*conditions, "native"))
    kinds = space.block_mask_kinds.default(*conditions, "native")
    sizes = (int((kinds > 0).sum()), int((kinds == 1).sum()))
    torch.library.opcheck(space.block_mask_lists.default, (kinds, *sizes, *conditions, "native"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockPattern(window=-1), "window=-1; expected an integer from 0"),
        (lambda: BlockPattern(random_blocks=-2), "random_blocks=-2"),
        (lambda: BlockPattern(global_tokens=(-1,)), "global_tokens=-1; expected an integer from 0"),
        (lambda: BlockPattern(side=32), "side=32 is not one of"),
        (
            lambda: BlockMask.from_pattern(BlockPattern(), -1),
            "size=-1; expected an integer from 0 to",
        ),
        (lambda: allowed(BlockPattern(), 9, lengths=torch.tensor([10])), "must lie in 0..9"),
        (lambda: allowed(BlockPattern(), 9, lengths=torch.tensor([1.0])), "lengths must be"),
        (
            lambda: allowed(BlockPattern(), 3, documents=torch.tensor([[0, 2, 1]])),
            "documents must not decrease",
        ),
        (lambda: allowed(BlockPattern(), 3, documents=torch.zeros(3).int()), "documents must be"),
        (
            lambda: allowed(
                BlockPattern(), 3, lengths=torch.tensor([1, 2]), dense=torch.ones(1, 3, 3) > 0
            ),
            "dense must be",
        ),
        (
            lambda: allowed(BlockPattern(), 3, lengths=torch.tensor([1]), device="meta"),
            "is on cpu, the first operand on meta|device meta is not one of",
        ),
    ],
)
def test_pattern_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


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
