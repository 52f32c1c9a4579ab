"""The teacher's numbers: int8 by its definition, fp8's blocks, bf16 and int8 in training, loading
when needed.
"""

import copy

import pytest
import torch
from torch import nn
from transformers import BertForSequenceClassification

import tinybert_fast as tbf
from tinybert_fast.modules.feed_forward_fp8 import FeedForwardFp8
from tinybert_fast.testing.tiny_models import tiny_config
from tinybert_fast.training import teacher as teacher_module
from tinybert_fast.training.matches import LayerMatches
from tinybert_fast.training.teacher import (
    Int8Linear,
    Teacher,
    bf16_linears,
    check_teacher_dtype,
    classify,
    fp8_feed_forwards,
    int8_linears,
    join_projections,
    record,
)

MATCHES = LayerMatches.parse("0:0,1:2,2:4")


def model(**changes):
    torch.manual_seed(0)
    config = tiny_config(num_hidden_layers=4, initializer_range=0.2, **changes)
    return BertForSequenceClassification(config).eval().requires_grad_(False)


def batch():
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(9) < torch.tensor([9, 4, 1, 6])[:, None]
    ids = torch.randint(5, 25, mask.shape, generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


@pytest.mark.parametrize("rows", [0, 1, 33], ids=str)
def test_int8_is_its_definition(rows):
    torch.manual_seed(0)
    dense, x = nn.Linear(48, 24), torch.randn(rows, 48)
    if rows > 1:
        x[1], x[2, 3] = 0.0, 500.0  # a row without a scale, and an outlier
    got = Int8Linear(dense)(x)
    scale_w = dense.weight.abs().amax(1) / 127
    scale_x = x.abs().amax(1, keepdim=True) / 127
    integers_w = (dense.weight / scale_w[:, None]).round()
    integers_x = (x / scale_x.clamp(min=1e-12)).round()
    sums = integers_x.double() @ integers_w.double().T  # exact: integers below 2**53
    want = sums * scale_x.double() * scale_w.double() + dense.bias.double()
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)
    assert Int8Linear(dense)(x.view(1, rows, 48)).shape == (1, rows, 24)


def test_int8_rows_do_not_depend_on_each_other():
    torch.manual_seed(0)
    quantised, x = Int8Linear(nn.Linear(48, 24)), torch.randn(7, 48)
    spoilt = x.clone()
    spoilt[3] *= 1e4
    assert torch.equal(quantised(spoilt)[:3], quantised(x)[:3])
    assert torch.equal(quantised(x[4:]), quantised(x)[4:])


def test_int8_is_the_encoder_and_packed_or_padded():
    plain = model()
    exact = classify(plain, batch()).logits
    quantised = int8_linears(copy.deepcopy(plain))
    layers = [m for m in quantised.modules() if isinstance(m, Int8Linear)]
    assert len(layers) == 6 * 4
    left = [name for name, m in quantised.named_modules() if type(m) is nn.Linear]
    assert left == ["bert.pooler.dense", "classifier"]
    logits = classify(quantised, batch()).logits
    assert 0 < (logits - exact).abs().max() < 0.1 * exact.abs().max()
    packed, padded = MATCHES.teacher_capture(), MATCHES.teacher_capture()
    record(quantised, batch(), padded)
    tbf.accelerate(quantised)
    torch.testing.assert_close(classify(quantised, batch()).logits, logits, rtol=1e-2, atol=1e-2)
    record(quantised, batch(), packed)
    for kind in ("hidden", "queries", "keys"):
        for m, states in getattr(packed, kind).items():
            other = packed.layout.pack(getattr(padded, kind)[m])
            # A number that lies between two integers may be rounded to either.
            assert (states - other).norm() < 0.02 * other.norm()


WIDTHS = {"hidden_size": 32, "intermediate_size": 64}  # that fp8's kernels take


def test_fp8_is_the_feed_forward_blocks_packed_or_padded():
    plain = model(**WIDTHS)
    exact = classify(plain, batch()).logits
    rounded = fp8_feed_forwards(copy.deepcopy(plain))
    blocks = [m for m in rounded.modules() if isinstance(m, FeedForwardFp8)]
    assert len(blocks) == 4
    left = [m for m in rounded.modules() if type(m) is nn.Linear]
    assert len(left) == 4 * 4 + 2
    assert {m.weight.dtype for m in left} == {torch.bfloat16}
    dense = plain.bert.encoder.layer[1].intermediate.dense
    restored = blocks[1].inner.float() * blocks[1].inner_scale[:, None]
    assert ((restored - dense.weight).abs() <= dense.weight.abs() / 16 + 1e-4).all()
    packed, padded, truth = (MATCHES.teacher_capture() for _ in range(3))
    record(plain, batch(), truth)
    with torch.autocast("cpu", torch.bfloat16):
        logits = classify(rounded, batch()).logits
        record(rounded, batch(), padded)
        tbf.accelerate(rounded)
        fast = classify(rounded, batch()).logits
        record(rounded, batch(), packed)
    assert 0 < (logits - exact).norm() < 0.1 * exact.norm()
    assert 0 < (fast - exact).norm() < 0.1 * exact.norm()
    for kind in ("hidden", "queries", "keys"):
        for m, states in getattr(packed, kind).items():
            other, want = (packed.layout.pack(getattr(x, kind)[m]) for x in (padded, truth))
            assert (states - want).norm() < 0.08 * want.norm()
            assert (other - want).norm() < 0.08 * want.norm()


def test_fp8_moves_and_is_copied_as_a_module():
    rounded = fp8_feed_forwards(model(**WIDTHS))
    again = copy.deepcopy(rounded).to("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(classify(again, batch()).logits, classify(rounded, batch()).logits)


def test_refusals():
    with pytest.raises(ValueError, match=r"teacher_dtype fp8: .* on GPUs, not on cpu; take bf16"):
        check_teacher_dtype("fp8", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"multiples of 16; got 24, \d+, 24; take bf16"):
        fp8_feed_forwards(model())
    with pytest.raises(ValueError, match=r"two linear layers and erf GELU; this one has .*ReLU"):
        fp8_feed_forwards(model(**WIDTHS, hidden_act="relu"))
    with pytest.raises(ValueError, match="two linear layers and erf GELU"):
        fp8_feed_forwards(int8_linears(model(**WIDTHS)))
    with pytest.raises(ValueError, match="'int4'; expected one of fp32, bf16, int8, fp8"):
        check_teacher_dtype("int4", torch.device("cpu"))
    with pytest.raises(ValueError, match="int8 is for CPUs, and this run is on cuda; take bf16"):
        check_teacher_dtype("int8", torch.device("cuda"))
    with pytest.raises(ValueError, match="runs on a CPU, and this one is on meta"):
        int8_linears(model().to("meta"))


def test_projections_are_joined_of_what_is_taken_as_it_is(monkeypatch):
    """An accelerated teacher in bf16 on a GPU, for which the CPU stands in; the user's is left."""
    monkeypatch.setattr(teacher_module, "pays_to_prepare_together", lambda weight: True)

    def places(model):
        return [p.data_ptr() for p in model.parameters()]

    plain = model()
    fast = tbf.accelerate(copy.deepcopy(plain))
    for left in (bf16_linears(copy.deepcopy(plain)), fast):
        before = places(left)
        assert places(join_projections(left)) == before
    joined = join_projections(bf16_linears(fast))
    heads = joined.bert.encoder.layer[1].attention.self
    size = heads.query.weight.nbytes
    assert heads.value.weight.data_ptr() == heads.query.weight.data_ptr() + 2 * size
    before = places(joined)
    assert places(join_projections(joined)) == before


@pytest.mark.parametrize(
    ("dtype", "convert"), [("fp32", lambda x: x), ("bf16", bf16_linears), ("int8", int8_linears)]
)
def test_a_teacher_is_loaded_once_and_only_if_needed(dtype, convert):
    loads = []

    def load():
        loads.append(model())
        return loads[-1]

    teacher = Teacher(tiny_config(), load, dtype, tbf.accelerate)
    assert teacher.config.hidden_size == 24
    assert not loads
    asked = teacher.asked
    assert teacher.base_model is teacher.exact.base_model
    assert len(loads) == 1
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        want = classify(convert(tbf.accelerate(model())), batch()).logits
        assert torch.equal(classify(asked, batch()).logits, want)
    exact = classify(teacher.exact, batch()).logits  # not rounded with it
    assert torch.equal(exact, classify(tbf.accelerate(model()), batch()).logits)
    words = "bert.embeddings.word_embeddings.weight"
    assert asked.get_parameter(words) is teacher.exact.get_parameter(words)
    teacher.forget(asked=False)
    assert teacher.asked is asked
    assert len(loads) == 1
    teacher.forget(asked=True)
    assert teacher.asked is not asked
    assert len(loads) == 2
