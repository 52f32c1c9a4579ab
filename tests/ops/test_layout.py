"""SequenceLayout: any key-padding mask packs and pads back; what is refused."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from tinybert_fast.ops import SequenceLayout


@st.composite
def masks(draw):
    """(B, N) masks of any pattern, no sequence and no position included."""
    batch, width = draw(st.integers(0, 5)), draw(st.integers(0, 9))
    cells = draw(st.lists(st.booleans(), min_size=batch * width, max_size=batch * width))
    return torch.tensor(cells, dtype=torch.bool).view(batch, width)


@settings(max_examples=150, deadline=None)
@given(mask=masks())
def test_any_mask_packs_and_pads_back(mask):
    batch, width = mask.shape
    layout = SequenceLayout.from_mask(mask)
    places = [(b, n) for b in range(batch) for n in range(width) if mask[b, n]]  # row-major
    lengths = mask.sum(1).tolist()

    assert (layout.batch_size, layout.width, layout.total) == (batch, width, len(places))
    assert layout.lengths == tuple(lengths)
    assert layout.max_length == max(lengths, default=0)
    assert layout.cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(batch + 1)]
    assert layout.rows.tolist() == [b * width + n for b, n in places]
    assert layout.sequences.tolist() == [b for b, _ in places]
    assert layout.columns.tolist() == [n for _, n in places]
    assert layout.positions.tolist() == [int(mask[b, :n].sum()) for b, n in places]
    first = [next((i for i, (c, _) in enumerate(places) if c == b), -1) for b in range(batch)]
    assert layout.first_rows.tolist() == first
    assert layout.is_full == bool(mask.all())
    assert layout.starts_padded == any(mask[b].any() and not mask[b, 0] for b in range(batch))
    columns = [[n for n in range(width) if mask[b, n]] for b in range(batch)]
    longest_first = sorted(range(batch), key=lambda b: (-lengths[b], b))
    assert layout.work.tolist() == [[b, lengths[b], sum(lengths[:b]), 0] for b in longest_first]
    starts = [min(of_row, default=0) for of_row in columns]
    assert layout.padded_work.tolist() == [[b, lengths[b], starts[b], 0] for b in longest_first]
    assert layout.has_holes == any(c and c[-1] - c[0] + 1 != len(c) for c in columns)
    kinds = {"cu_seqlens": torch.int32, "sequences": torch.int32, "positions": torch.int32,
             "work": torch.int32, "padded_work": torch.int32, "rows": torch.int64,
             "columns": torch.int64, "first_rows": torch.int64}  # fmt: skip
    assert {name: getattr(layout, name).dtype for name in kinds} == kinds

    x = torch.arange(batch * width * 3.0).view(batch, width, 3)
    packed = layout.pack(x)
    assert torch.equal(packed, x[mask])
    assert torch.equal(layout.pad(packed, fill=-7.0), x.masked_fill(~mask[..., None], -7.0))
    assert torch.equal(layout.pack(layout.pad(packed)), packed)


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), max_size=5), extra=st.integers(0, 3))
def test_lengths_are_right_padded_masks(lengths, extra):
    width = max(lengths, default=0) + extra
    mask = torch.arange(width) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    assert_same(SequenceLayout.from_lengths(lengths, width), SequenceLayout.from_mask(mask))


def assert_same(a, b):
    for name in ("batch_size", "width", "lengths", "max_length", "starts_padded", "has_holes"):
        assert getattr(a, name) == getattr(b, name)
    for name in ("cu_seqlens", "rows", "sequences", "positions", "work", "padded_work"):
        assert torch.equal(getattr(a, name), getattr(b, name))


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), max_size=5))
def test_cu_seqlens_are_lengths(lengths):
    want = SequenceLayout.from_lengths(lengths)
    assert_same(SequenceLayout.from_cu_seqlens(want.cu_seqlens), want)


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([0, 4, 3]), r"never decrease; got \[0, 4, 3\]"),
        (torch.tensor([1, 4]), r"begin with 0"),
        (torch.tensor([0.0, 4.0]), r"int32 \(batch \+ 1,\); got torch.float32 \(2,\)"),
        (torch.zeros(0, dtype=torch.int32), r"got torch.int32 \(0,\)"),
        (torch.zeros(1, 2, dtype=torch.int32), r"got torch.int32 \(1, 2\)"),
    ],
)
def test_refuses_cu_seqlens(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        SequenceLayout.from_cu_seqlens(cu_seqlens)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), (2, 0)], ids=str)
def test_full(shape):
    layout = SequenceLayout.full(*shape)
    assert layout.is_full
    assert_same(layout, SequenceLayout.from_mask(torch.ones(shape)))


def test_work_is_longest_first():
    """Equal lengths in the batch's order, empty sequences last, padding on the left."""
    mask = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 1, 1], [0, 1, 1, 1]])
    layout = SequenceLayout.from_mask(mask)
    packed = [[2, 3, 2, 0], [4, 3, 7, 0], [0, 2, 0, 0], [3, 2, 5, 0], [1, 0, 2, 0]]
    padded = [[2, 3, 0, 0], [4, 3, 1, 0], [0, 2, 2, 0], [3, 2, 2, 0], [1, 0, 0, 0]]
    assert (layout.work.tolist(), layout.padded_work.tolist()) == (packed, padded)


MAKERS = {
    "from_mask": lambda: SequenceLayout.from_mask(torch.arange(12).view(3, 4) % 5 > 1),
    "from_cu_seqlens": lambda: SequenceLayout.from_cu_seqlens(torch.tensor([0, 3, 3, 8])),
    "from_lengths": lambda: SequenceLayout.from_lengths((3, 0, 5)),
    "full": lambda: SequenceLayout.full(3, 5),
}


@pytest.mark.parametrize("maker", MAKERS)
def test_rows_of_work_are_16_aligned_bytes(maker):
    layout = MAKERS[maker]()
    for work in (layout.work, layout.padded_work):
        assert work.shape == (3, 4)
        assert work.is_contiguous()
        assert work.data_ptr() % 16 == 0


class Calls(TorchFunctionMode):
    """The names of torch's functions and methods that the block calls."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("maker", MAKERS)
def test_waits_for_the_device_at_most_once(maker):
    """Where lengths are not on the host yet; and a full batch copies nothing to the device."""
    with Calls() as calls:
        MAKERS[maker]()
    waits = {"tolist", "item", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__index__"}
    assert [name for name in calls.names if name in waits] == (
        ["tolist"] if maker in ("from_mask", "from_cu_seqlens") else []
    )
    if maker == "full":  # a CUDA graph could not hold a copy
        assert not {"tensor", "to", "as_tensor"} & set(calls.names)


@pytest.mark.parametrize("maker", [*MAKERS, "of_capacity"])
def test_outlives_inference_mode(maker):
    """A backward may save what a layout holds, and what it makes at first use, wherever it is."""
    capacity = functools.partial(SequenceLayout.of_capacity, dummies=1, spare=4)
    makers = MAKERS | {"of_capacity": lambda: capacity(torch.tensor([3, 0, 5]), 5, 8)}
    with torch.inference_mode():
        inside = makers[maker]()
    for layout in (inside, makers[maker]()):
        with torch.inference_mode():
            parts = (layout, layout.counted)
            made = [getattr(x, n) for x in parts for n in ("columns", "first_rows", "firsts")]
        held = [x for part in parts for x in vars(part).values() if torch.is_tensor(x)]
        assert len(held) >= len(made)
        leaf = torch.ones(1, requires_grad=True)
        (leaf * torch.cat([x.flatten() for x in (layout.dead, *held, *made)])).sum().backward()
        for x in held:
            (leaf * x).sum().backward()


def test_width_defaults_to_the_longest():
    assert SequenceLayout.from_lengths((2, 5, 1)).width == 5


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float32], ids=str)
def test_mask_dtypes(dtype):
    mask = torch.tensor([[0, 1, 1], [1, 0, 0]])
    assert_same(SequenceLayout.from_mask(mask.to(dtype)), SequenceLayout.from_mask(mask > 0))


@pytest.mark.parametrize("lengths", [(2, 0, 3), (3, 3)], ids=["ragged", "full"])
def test_gradients_pass(lengths):
    layout = SequenceLayout.from_lengths(lengths, 3)
    x = torch.randn(len(lengths), 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.pack, x)
    assert torch.autograd.gradcheck(layout.pad, layout.pack(x).detach().requires_grad_())


def test_padding_gets_no_gradient():
    layout = SequenceLayout.from_mask(torch.tensor([[0, 1, 1], [1, 0, 0]]))
    x = torch.randn(2, 3, 4, requires_grad=True)
    layout.pack(x).sum().backward()
    assert x.grad[..., 0].tolist() == [[0, 1, 1], [1, 0, 0]]


def test_pads_other_dtypes():
    layout = SequenceLayout.from_lengths((1, 2))
    assert layout.pad(torch.tensor([7, 8, 9]), fill=-100).tolist() == [[7, -100], [8, 9]]
    real = layout.pad(torch.ones(3, dtype=torch.bool), fill=False)
    assert real.tolist() == [[True, False], [True, True]]


def test_refuses():
    for shape in ((3,), (2, 3, 3), (2, 1, 3, 3)):
        with pytest.raises(ValueError, match=r"2 dimensions \(batch, width\); got shape"):
            SequenceLayout.from_mask(torch.ones(shape))
    for lengths in ((2, 4), (-1, 2)):
        with pytest.raises(ValueError, match=r"lengths must lie in 0\.\.3"):
            SequenceLayout.from_lengths(lengths, 3)
    layout = SequenceLayout.from_lengths((1, 2))
    with pytest.raises(ValueError, match=r"shape \(2, 2, \.\.\.\) to pack; got \(2, 3\)"):
        layout.pack(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"expected 3 packed rows; got a tensor of shape \(2, 2\)"):
        layout.pad(torch.ones(2, 2))
