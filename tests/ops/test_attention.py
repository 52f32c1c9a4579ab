"""attention: values and gradients, gradcheck, contract, compilation, dropout, memory, refusal."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from tinybert_fast import ops
from tinybert_fast.ops.attention import LIMITS, attention_of_stack
from tinybert_fast.ops.dispatch import INTERPRETED
from tinybert_fast.testing import proofs
from tinybert_fast.testing.budgets import SLACK, assert_within_budget
from tinybert_fast.testing.operands import DTYPES, LENGTHS, Case, attention, dropout, leaves, normal
from tinybert_fast.tuned import attention as tuned

attention_module = importlib.import_module("tinybert_fast.ops.attention")
DIRECTIONS = ["both", "causal", "anti_causal"]
WIDTHS = [26, 64]  # head widths of TinyBERT-4 and TinyBERT-6
N = 7  # the longest sequence of LENGTHS

# Real positions of a 7-wide row.
MASKS = {
    "right": (range(7), range(4), range(1)),
    "left": (range(7), range(3, 7), range(6, 7)),
    "holes": (range(7), (0, 2, 5), (1, 3)),
    "empty": (range(7), (), range(2)),
}


def mask_of(name):
    mask = torch.zeros(3, N, dtype=torch.bool)
    for row, columns in zip(mask, MASKS[name]):
        row[list(columns)] = True
    return mask


def random_pairs(*batch):
    """Allowed pairs, of which query 1 has none."""
    allowed = normal((*batch, N, N), 8) > 0
    allowed[..., 1, :] = False
    return allowed


def random_blocks(*batch, device="cpu"):
    return ops.BlockMask.from_dense(random_pairs(*batch).to(device))


def patchwork(side, *batch, device="cpu"):
    """Blocks that are full, partial and empty, queries and keys without a partner. A kernel's tile
    may be a part of a block, and no part looks like another.
    """
    size = side * 3 // 2
    allowed = normal((*batch, size, size), 8) > 0.5
    allowed[..., :side, :side] = True
    allowed[..., side:, side:] = False
    allowed[..., side // 2 : side // 2 + 32, side:] = False
    allowed[..., 40, :] = False
    allowed[..., :, size - 1] = False
    return ops.BlockMask.from_dense(allowed.to(device), side)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("lengths", LENGTHS)
def test_matches_reference(lengths, width, direction, dtype, fast, device):
    case = attention(LENGTHS[lengths], width=width, direction=direction, dtype=dtype, device=device)
    assert_within_budget(case, fast)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shared", [True, False], ids=["one_mask", "mask_per_sequence"])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_matches_reference_with_block_mask(lengths, shared, direction, dtype, fast, device):
    lengths = LENGTHS[lengths]
    block_mask = random_blocks(*() if shared else (len(lengths),), device=device)
    case = attention(lengths, direction=direction, dtype=dtype, device=device)
    case = case.with_options(block_mask=block_mask, scale=0.5)
    assert_within_budget(
        case, fast, 2 * SLACK["attention"]
    )  # scores of 10, whose rounding is P's error


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize(
    ("side", "direction", "shared"),
    [(64, "both", True), (64, "causal", False), (64, "anti_causal", True), (128, "both", False)],
)
def test_blocks_of_a_mask(side, direction, shared, dropout_p, fast, device):
    """Lengths that end in a full, a partial and an empty block of the mask."""
    mask = patchwork(side, *() if shared else (4,), device=device)
    lengths = (side + 6, 31, 0, side * 3 // 2)
    case = attention(lengths, heads=1, direction=direction, device=device, block_mask=mask)
    if fast == "torch":  # it draws its own cells
        dropout_p = 0.0
    assert_within_budget(case.with_options(**dropout(dropout_p, device=device)), fast)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_window_globals_and_random_blocks(direction, dropout_p, fast, device):
    pattern = ops.BlockPattern(window=40, global_tokens=(0, 130), random_blocks=1)
    mask = ops.BlockMask.from_pattern(pattern, 400, device=device)
    if fast == "torch":  # it draws its own cells
        dropout_p = 0.0
    options = {"block_mask": mask, "direction": direction, **dropout(dropout_p, device=device)}
    assert_within_budget(attention((400, 0, 65, 193), heads=1, device=device, **options), fast)


def test_defaults_of_torch_do_not_matter(counted, device):
    """The compiled module writes fp32 on the CPU, whatever is default."""
    case = attention((70, 33), heads=1, device=device, **dropout(0.1, device=device))
    want = ops.attention(*case.operands, **case.options, impl=counted)
    try:
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        got = ops.attention(*case.operands, **case.options, impl=counted)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    torch.testing.assert_close(got, want, rtol=0.0, atol=0.0)


def test_only_listed_blocks_are_computed():
    """A window of 64 to either side and one global token: 3 of 32 blocks of most rows, and one."""
    size, heads, width = 2048, 2, 32
    pattern = ops.BlockPattern(window=64, global_tokens=(0,))
    lists = list(ops.BlockMask.from_pattern(pattern, size).lists)
    q, k, v, grad = (torch.randn(size, heads, width) for _ in range(4))
    call = (torch.tensor([0, size], dtype=torch.int32), None, size, 0.2, "both", 0.0, None, 0)
    counts = []
    for masks in (lists, [torch.ones(size, size, dtype=torch.bool)]):
        with FlopCounterMode(display=False) as flops:
            out, lse, rng = tuned.forward(q, k, v, *call, masks)
            tuned.backward(grad, q, k, v, out, lse, rng, *call, masks)
        counts.append(flops.get_total_flops())
    share = len(lists[1]) / (size // 64) ** 2
    assert share < 0.16
    assert counts[0] == pytest.approx(share * counts[1], rel=1e-6)


@pytest.mark.parametrize("batch", [(), (3,)], ids=["one_mask", "mask_per_sequence"])
def test_dense_masks_and_lists_say_the_same(batch):
    case = attention()
    for impl in ("torch", "reference"):
        dense = case.with_options(block_mask=random_pairs(*batch)).run(impl)
        lists = case.with_options(block_mask=random_blocks(*batch)).run(impl)
        torch.testing.assert_close(lists, dense, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_several_tiles(direction, dropout_p, counted, device):
    """Interpreted, a tile is 32 wide: a length below, at, between and beyond its multiples."""
    options = {"direction": direction, "dropout_p": dropout_p, "device": device}
    assert_within_budget(attention((31, 32, 0, 70, 129), width=26, **options), counted)
    assert_within_budget(attention((5, 32), width=26, **options), counted)  # one tile


@pytest.mark.parametrize("give", [(), (0, 1), (2,)], ids=["nothing", "queries_keys", "values"])
@pytest.mark.parametrize(
    ("lengths", "options"),
    [
        ((5, 32, 0, 9), {"dropout_p": 0.1}),  # one tile
        ((31, 70), {"dropout_p": 0.1}),
        ((31, 70), {"direction": "causal"}),
        ((31, 70), {"block_mask": True}),
    ],
    ids=["one_tile", "two_kernels", "a_direction", "blocks"],
)
def test_of_a_stack(lengths, options, give, counted, device):
    """Heads of 26 padded to 32: what is given is 26 wide, and its gradient adds to attention's."""
    options = dict(options)
    blocks = options.pop("block_mask", False)
    case = attention(lengths, heads=2, width=32, device=device, **options)
    options = {**case.options, "impl": counted, "scale": 26**-0.5}
    if blocks:
        options["block_mask"] = patchwork(64, device=device)
    stack = torch.stack([x.detach() for x in case.operands], 1)
    stack[..., 26:] = 0.0
    upstream = normal(case.operands[0].shape, 9, device=device)
    upstream[..., 26:] = 0.0
    found = []
    for stacked in (True, False):
        x = stack.clone().requires_grad_()
        if stacked:
            out, *given = attention_of_stack(x, give=give, width=26, **options)
        else:
            out = ops.attention(*x.unbind(1), **options)
            given = [x[:, i, :, :26] if i in give else None for i in range(3)]
        assert [y is not None for y in given] == [i in give for i in range(3)]
        scalar = (out * upstream).sum() + sum(y.sin().sum() for y in given if y is not None)
        found.append((out, *torch.autograd.grad(scalar, x)))
    torch.testing.assert_close(*found)


def test_of_a_stack_nobody_reads(counted, device):
    """Of the output: only what was given has a gradient."""
    stack = normal((7, 3, 2, 8), 1, device=device).requires_grad_()
    layout = ops.SequenceLayout.from_lengths((5, 2), device=device)
    _, queries, *_ = attention_of_stack(stack, layout=layout, give=(0,), impl=counted)
    (gradient,) = torch.autograd.grad(queries.sum(), stack)
    want = torch.zeros_like(stack)
    want[:, 0] = 1.0
    torch.testing.assert_close(gradient, want)


@pytest.mark.parametrize("padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("scale", [None, 0.3], ids=str)
def test_heads_widened_to_whole_units(scale, padded, counted, device, monkeypatch):
    """As a GPU reads long sequences: kernels see heads of 32, nobody else does."""
    seen, forward = [], attention_module._forward

    def noted(q, *rest):
        seen.append(q.shape[-1])
        return forward(q, *rest)

    monkeypatch.setattr(attention_module, "_forward", noted)
    monkeypatch.setattr(attention_module, "_missing", lambda q, *call: -q.shape[-1] % 8)
    options = {"padded": padded, "dropout_p": 0.1, "device": device, "scale": scale}
    assert_within_budget(attention((5, 32, 0), 2, 26, **options), counted)
    assert set(seen) == {32}


def test_which_heads_are_widened():
    """On a GPU those of long sequences, for its kernels alone."""
    for width, size, longest, impl, missing in (
        (26, 2, 129, "triton", 6), (26, 4, 129, "triton", 2), (32, 2, 129, "triton", 0),
        (26, 2, 128, "triton", 0), (26, 2, 129, "torch", 0),
    ):  # fmt: skip
        q = SimpleNamespace(shape=(4, 2, width), is_cuda=True, element_size=lambda size=size: size)
        assert attention_module._missing(q, longest, impl) == missing
    assert attention_module._missing(torch.zeros(4, 2, 26), 512, "triton") == 0


@pytest.mark.parametrize("mask", MASKS)
def test_padded_rows_where_they_are(mask, counted, device):
    """Strided as Transformers hands them over: the packed result bit for bit, zeros around it."""
    mask = mask_of(mask).to(device)
    layout = ops.SequenceLayout.from_mask(mask)
    views = [x.detach().transpose(1, 2) for x in leaves(*((3, 2, N, 26),) * 3, device=device)]
    padded = [x.requires_grad_() for x in views]
    packed = [layout.pack(x.detach()).requires_grad_() for x in views]
    options = {"layout": layout, **dropout(0.1, device=device), "impl": counted}
    got, want = ops.attention(*padded, **options), ops.attention(*packed, **options)
    assert torch.equal(got, layout.pad(want))
    upstream = normal(got.shape, 9, device=device)
    gradients = torch.autograd.grad(got, padded, upstream)
    packed_gradients = torch.autograd.grad(want, packed, layout.pack(upstream))
    for ours, theirs in zip(gradients, packed_gradients):
        assert torch.equal(ours, layout.pad(theirs))


@pytest.mark.parametrize("padded", [True, False], ids=["sequences", "rows"])
def test_offsets_beyond_2_to_the_31(padded, counted, device, tmp_path):
    """Sequences, or rows, so far apart that int32 cannot count the numbers between them."""
    rows, heads, width = (40 if padded else 300), 1, 16
    if padded:
        shape, strides = (2, rows, heads, width), (2**31, heads * width, width, 1)
    else:
        shape, strides = (rows, heads, width), (2**23, width, 1)  # 300 * 2^23 > 2^31
    size = sum((n - 1) * stride for n, stride in zip(shape, strides)) + 1
    if device == "cpu":  # a file of which a few pages are written
        store = np.memmap(tmp_path / "store", np.float16, "w+", shape=(3, size))
        stores = torch.from_numpy(store)
    else:
        stores = torch.empty(3, size, dtype=torch.float16, device=device)
    far = [store.as_strided(shape, strides) for store in stores]
    near = [normal(shape, seed, torch.float16, device) for seed in range(3)]
    for ours, values in zip(far, near):
        ours.copy_(values)
    layout = None if padded else ops.SequenceLayout.from_lengths((9, 291), device=device)
    got, want = (
        Case(ops.attention, tuple(x.requires_grad_() for x in operands), {"layout": layout})
        for operands in (far, near)
    )
    upstream = normal(shape, 9, torch.float16, device)
    for ours, theirs in zip(*(torch.autograd.grad(
        case.function(counted)(*case.operands), case.operands, upstream) for case in (got, want)
    )):  # fmt: skip
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("lengths", "direction", "mask"),
    [
        ((31, 40, 0, 33, 70, 40, 1), "both", False),
        ((31, 40, 0, 33, 70, 40, 1), "anti_causal", False),
        ((5, 32, 9, 0, 32), "causal", False),  # one tile
        ((31, 40, 0, 33, 70, 40, 1), "both", True),  # of each sequence its own
    ],
    ids=["two_kernels", "a_direction", "one_tile", "blocks"],
)
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "packed"])
def test_order_of_the_work_list_changes_no_bit(padded, lengths, direction, mask, counted, device):
    case = attention(
        lengths, heads=1, padded=padded, direction=direction, dropout_p=0.1, device=device
    )
    if mask:
        block_mask = patchwork(64, len(lengths), device=device)
        case = case.with_options(block_mask=block_mask)
    layout = case.options["layout"]
    lists = {"work": layout.work, "padded_work": layout.padded_work}
    by_number = {name: table[table[:, 0].argsort()] for name, table in lists.items()}
    assert not torch.equal(by_number["work"], layout.work)
    want = case.with_options(layout=replace(layout, **by_number)).run(counted)
    torch.testing.assert_close(case.run(counted), want, rtol=0.0, atol=0.0)


def test_two_runs_give_the_same_bits(counted, device):
    case = attention((31, 70), dropout_p=0.1, device=device)
    torch.testing.assert_close(case.run(counted), case.run(counted), rtol=0.0, atol=0.0)


@pytest.mark.skipif(not INTERPRETED, reason="forces a setting of the interpreter's table")
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_heads_of_a_program_change_no_bit(direction, counted, device):
    from tinybert_fast.kernels import configs
    from tinybert_fast.kernels.settings import Key

    options = {"direction": direction, "dropout_p": 0.1, "device": device}
    case = attention((5, 32, 0, 9), heads=4, width=32, **options)  # loads of 16 bytes
    pattern = "all" if direction == "both" else "direction"
    key = Key("one_tile", 32, torch.float32, True, pattern)
    found = []
    for each in (1, 2, 3, 4):  # 3 does not divide 4
        setting = configs.SMALL._replace(heads_each=each)
        with configs.forced({**configs.INTERPRETED_TABLE, key: {32: setting}}):
            found.append(case.run(counted))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("scratch", [1, 30, 80], ids=["a_head", "a_head_of_5", "a_sequence"])
def test_blocks_of_scores(scratch, device, monkeypatch):
    """However the heads and sequences are split, nothing is lost or counted twice."""
    monkeypatch.setattr(tuned, "SCRATCH", scratch)
    for lengths in LENGTHS.values():
        case = attention(lengths, heads=3, width=2, device=device)
        case = case.with_options(block_mask=random_blocks(device=device))
        assert_within_budget(case, "torch")
    proofs.prove_gradient(attention((2, 3, 2), 3, 2, dropout_p=0.25, device=device), "torch")


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("mask", MASKS)
def test_equals_scaled_dot_product_attention(mask, direction, exact):
    """Padded (B, N, H, D) under a key mask; padding rows are zero. Causal is over ranks."""
    mask = mask_of(mask)
    q, k, v = leaves(*((3, N, 2, 26),) * 3, dtype=torch.float64)
    layout = ops.SequenceLayout.from_mask(mask)
    options = {"layout": layout, "direction": direction, "scale": 0.3}
    got = ops.attention(q, k, v, **options, impl=exact)
    allowed = mask[:, None, None, :].expand(-1, 1, N, N)
    if direction != "both":
        triangle = torch.ones(N, N, dtype=torch.bool)
        allowed = allowed & (triangle.tril() if direction == "causal" else triangle.triu())
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    want = F.scaled_dot_product_attention(*heads_first, attn_mask=allowed, scale=0.3)
    want = want.transpose(1, 2)
    assert got[~mask].count_nonzero() == 0
    torch.testing.assert_close(got[mask], want[mask])
    upstream = normal((int(mask.sum()), 2, 26), 9, torch.float64)
    for ours, theirs in zip(
        torch.autograd.grad(got[mask], (q, k, v), upstream),
        torch.autograd.grad(want[mask], (q, k, v), upstream),
    ):
        torch.testing.assert_close(ours, theirs)


def test_padded_without_a_layout_is_all_real(impl, device):
    q, k, v = leaves(*((2, 3, 2, 26),) * 3, device=device)
    full = ops.SequenceLayout.full(2, 3, device)
    want = ops.attention(q, k, v, layout=full, impl=impl)
    assert torch.equal(ops.attention(q, k, v, impl=impl), want)


def test_query_without_a_key(impl, device):
    """Zero row, zero gradient, and no NaN next to it."""
    case = attention((N,), device=device, block_mask=random_blocks(device=device))
    found = case.run(impl)
    assert found["value"][1].count_nonzero() == 0
    assert found["dq"][1].count_nonzero() == 0
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("options", [{}, {"direction": "causal"}, {"dropout_p": 0.25}], ids=str)
def test_gradients(options, exact, device):
    proofs.prove_gradient(attention((1, 3, 0, 2), 2, 3, device=device, **options), exact)


@pytest.mark.parametrize(
    "options", [{}, {"direction": "anti_causal"}, {"dropout_p": 0.25}, {"block": True}], ids=str
)
@pytest.mark.parametrize("lengths", ["ragged", "nothing"])
def test_contract(lengths, options, fast, device):
    options = dict(options)
    if options.pop("block", False):
        options["block_mask"] = random_blocks(device=device)
    proofs.prove_contract(attention(LENGTHS[lengths], device=device, **options), fast)


@pytest.mark.parametrize(
    "options", [{}, {"direction": "causal"}, {"dropout_p": 0.25}, {"block": True}], ids=str
)
def test_compiles_whole(options, fast, device):
    options = dict(options)
    if options.pop("block", False):
        options["block_mask"] = random_blocks(device=device)
    proofs.prove_compiles(attention(device=device, **options), fast)


def test_reference_gradient_under_a_fast_forward(fast, device):
    proofs.prove_pair(attention(device=device, direction="causal"), fast)


def probabilities(impl, device, n=32, heads=3, lengths=2, **options):
    """Dropped probabilities (B, H, n, n) of flat scores: with v = 1, they are the output itself."""
    zero = torch.zeros(lengths, n, heads, n, device=device)
    v = torch.eye(n, device=device)[None, :, None].expand(lengths, n, heads, n)
    options = {**dropout(0.1, device=device), **options}
    return ops.attention(zero, zero, v, impl=impl, **options).transpose(1, 2)


def test_cells_are_dropped_or_scaled(impl, device):
    cells = probabilities(impl, device) * 32
    scale = 256 / (256 - 26)  # the exact rate of 0.1 in 8 bits
    torch.testing.assert_close(cells, torch.where(cells < 0.5, 0.0, scale))
    rate, expected = (cells < 0.5).double().mean(), 26 / 256
    assert abs(rate - expected) < 5 * (expected * (1 - expected) / cells.numel()) ** 0.5


def test_dropout_is_a_function_of_seed_and_site(impl, device):
    cells = probabilities(impl, device)
    assert torch.equal(cells, probabilities(impl, device))
    assert not torch.equal(cells, probabilities(impl, device, site=4))
    planes = cells.flatten(0, 1)
    assert len({tuple(plane.flatten().tolist()) for plane in planes}) == len(planes)


def test_drops_the_cells_of_the_reference(counted, device):
    """Bit for bit, over several tiles and the edges of the 16-cell groups."""
    got, want = (probabilities(i, device, n=70) for i in (counted, "reference"))
    assert torch.equal(got == 0, want == 0)


def test_reference_drops_the_same_cells_in_every_layout():
    """Bit for bit: a cell's fate depends on sequence, head and ranks, not on where padding is."""
    lengths = (4, 0, 3, 1)
    packed = attention(lengths, dropout_p=0.3)
    want = packed.function("reference")(*packed.operands)
    for width, shift in ((4, False), (6, False), (9, True)):  # tight, right-padded, left-padded
        mask = torch.zeros(4, width, dtype=torch.bool)
        for row, n in zip(mask, lengths):
            row[width - n if shift else 0 : width if shift else n] = True
        layout = ops.SequenceLayout.from_mask(mask)
        case = packed.with_options(layout=layout)
        operands = [layout.pad(x.detach(), fill=float("nan")) for x in packed.operands]
        padded = case.op(*operands, **case.options, impl="reference")
        assert torch.equal(layout.pack(padded), want)


def test_dropout_holds_no_scores_of_the_whole_batch(monkeypatch):
    """16 sequences of 2 heads of 64 * 64 scores: 0.5 MB; a block is a 32nd of them, six times."""
    monkeypatch.setattr(tuned, "SCRATCH", 64 * 64)
    case, scores = attention((64,) * 16, heads=2, width=1, dropout_p=0.1), 16 * 2 * 64 * 64 * 4
    with proofs.LiveBytes() as live:
        case.run("torch")
    assert live.peak < scores
    monkeypatch.undo()  # where one block may hold them all, the instrument sees them
    with proofs.LiveBytes() as whole:
        case.run("torch")
    assert whole.peak > scores


def test_triton_refuses():
    refuses = LIMITS.triton.refuses
    assert refuses(width=128, scale=0.1) is None
    assert "heads of 129 numbers are wider than 128" in refuses(width=129)
    assert "scale=0.0 is not positive" in refuses(scale=0.0)
    assert "give BlockMask.from_dense(mask)" in refuses(dense_mask=True)


def test_refuses_triton_on_a_cpu():
    case = attention()
    if INTERPRETED:
        case, reason = case.to(torch.bfloat16), "interpreter computes bf16 wrongly"
    else:
        reason = "(no CUDA device|not installed|device cpu is not one of cuda)"
    with pytest.raises(ValueError, match=f"impl='triton' cannot serve this call: .*{reason}"):
        case.run("triton")


def test_refuses():
    packed = attention((2, 3))
    q, k, v = packed.operands
    layout = packed.options["layout"]
    padded = torch.ones(2, 3, 2, 26)

    def refuses(match, *operands, **options):
        with pytest.raises(ValueError, match=match):
            ops.attention(*operands, **options)

    refuses(r"share one shape.*k \(4, 2, 26\)", q, k[:4], v, layout=layout)
    refuses(r"packed \(T, H, D\) or padded", q[0], k[0], v[0], layout=layout)
    refuses("float32 on cpu, torch.float64 on cpu", q, k.double(), v, layout=layout)
    refuses("need layout=", q, k, v)
    there = ops.SequenceLayout.from_lengths((2, 3), device="meta")
    refuses("layout is on meta, the first operand on cpu", q, k, v, layout=there)
    nowhere = torch.zeros(2, dtype=torch.int64, device="meta")
    refuses("seed is on meta", q, k, v, layout=layout, dropout_p=0.1, seed=nowhere)
    refuses("float32 on cpu, torch.float32 on meta", q, k.to("meta"), v, layout=layout)
    refuses("dtype torch.int64 is not one of", *(x.long() for x in (q, k, v)), layout=layout)
    refuses(r"leading sizes \(5,\)", q[:4], k[:4], v[:4], layout=layout)
    refuses(r"leading sizes \(2, 3\)", *(padded[:, :2],) * 3, layout=layout)
    refuses("direction='left' is not one of", q, k, v, layout=layout, direction="left")
    for wrong in (torch.ones(3, 3), torch.ones(3, dtype=torch.bool), torch.ones(2, 3) > 0,
                  torch.ones(3, 3, 3) > 0, torch.ones(1, 2, 3, 3) > 0):  # fmt: skip
        refuses(r"bool \(N, N\) or \(2, N, N\)", q, k, v, layout=layout, block_mask=wrong)
    for wrong in (torch.ones(2, 2) > 0, torch.ones(3, 4, 4) > 0):
        mask = ops.BlockMask.from_dense(wrong)
        refuses("must hold 1 or 2 masks of size N >= 3", q, k, v, layout=layout, block_mask=mask)
    refuses("needs seed, a contiguous int64 tensor", q, k, v, layout=layout, dropout_p=0.1)
    seed = torch.zeros(2, dtype=torch.int64)
    refuses("cannot be expressed in 8 bits", q, k, v, layout=layout, dropout_p=1e-3, seed=seed)
    for rate in (-0.1, 1.0, 1.5):
        refuses("dropout_p", q, k, v, layout=layout, dropout_p=rate, seed=seed)
    refuses("draws another mask", q, k, v, layout=layout, dropout_p=0.1, seed=seed,
            impl=("torch", "reference"))  # fmt: skip
