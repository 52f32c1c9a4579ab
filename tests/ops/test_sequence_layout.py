"""sequence_layout: each implementation against what the mask says, contract, compilation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinybert_fast.ops import SequenceLayout, sequence_layout
from tinybert_fast.ops.sequence_layout import sequence_extents
from tinybert_fast.testing.proofs import implementations

IMPLS = [*implementations("sequence_layout"), "reference"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(0, 5),
    width=st.sampled_from([0, 1, 2, 31, 128, 129, 300]),
    density=st.sampled_from([0.0, 0.05, 0.6, 1.0]),
    seed=st.integers(0, 99),
)
def test_says_what_the_mask_says(batch, width, density, seed):
    source = torch.Generator().manual_seed(seed)
    real = torch.rand(batch, width, generator=source) < density
    want = [(b, n) for b in range(batch) for n in range(width) if real[b, n]]
    for impl in IMPLS:
        layout = SequenceLayout.from_mask(real.to(DEVICE), impl=impl)
        assert layout.rows.tolist() == [b * width + n for b, n in want]
        assert layout.sequences.tolist() == [b for b, _ in want]
        ranks = [int(real[b, :n].sum()) for b, n in want]
        assert layout.positions.tolist() == ranks
        columns = [row.nonzero().flatten().tolist() for row in real]
        assert list(layout.lengths) == [len(row) for row in columns]
        starts = {b: start for b, _, start, _ in layout.padded_work.tolist()}
        assert starts == {b: row[0] if row else 0 for b, row in enumerate(columns)}
        assert layout.starts_padded == any(row and row[0] for row in columns)
        holes = any(row and row[-1] - row[0] + 1 != len(row) for row in columns)
        assert layout.has_holes == holes
        assert (layout.rows.dtype, layout.sequences.dtype) == (torch.int64, torch.int32)


def test_contract_and_compilation(impl):
    real = (torch.arange(12, device=DEVICE).view(3, 4) % 5 > 1).contiguous()
    stops = torch.tensor([0, *real.sum(1).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    total = int(stops[-1])
    space = torch.ops.tinybert_fast
    torch.library.opcheck(space.sequence_extents.default, (real, impl))
    torch.library.opcheck(space.sequence_layout.default, (real, stops, total, impl))

    def run(real):
        return sequence_extents(real, impl), *sequence_layout(real, stops, total, impl)

    whole = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(whole(real), run(real)))


def test_refuses():
    with pytest.raises(ValueError, match=r"dtype torch\.int64 is not one of torch\.bool"):
        sequence_extents(torch.ones(2, 3, dtype=torch.int64), "reference")


def test_refuses_what_would_be_written_beyond(impl):
    real = torch.ones(2, 3, dtype=torch.bool, device=DEVICE)
    stops = torch.tensor([0, 3, 6], dtype=torch.int32, device=DEVICE)
    for bad, total in ((stops.long(), 6), (stops[:2], 6), (stops, 7), (stops, -1)):
        with pytest.raises(ValueError, match="cu_seqlens must be int32"):
            sequence_layout(real, bad, total, impl)
    for bad in (real.T, real[0]):
        with pytest.raises(ValueError, match="real must be bool"):
            sequence_extents(bad, impl)


@pytest.mark.skipif("native" not in IMPLS, reason="needs the compiled module")
def test_a_wrong_running_sum_stays_inside():
    """The sum is on the device and nobody waits for it: rows that it sends beyond are dropped."""
    real = torch.ones(64, 512, dtype=torch.bool, device=DEVICE)
    stops = torch.arange(65, dtype=torch.int32, device=DEVICE) * 512
    rows, _, _ = sequence_layout(real, stops, 3, "native")
    assert rows.tolist() == [0, 1, 2]
    rows, _, _ = sequence_layout(real, stops - 5, 3, "native")
    assert rows.tolist() == [5, 6, 7]
