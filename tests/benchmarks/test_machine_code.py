"""Machine code of the default attention kernels for sm_90: no spill, tensor cores, wide loads."""

import pytest
import torch

from tinybert_fast.benchmarks import machine_code
from tinybert_fast.ops.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels are not compiled")

# Instructions per score of the forward at heads of 32.
LIMIT, LIMIT_WITH_DROPOUT = 22, 34


def rows(head, dropout_p, longest):
    found = machine_code.attention_kernels(90, head, torch.bfloat16, dropout_p, longest)
    return {one["pass"]: one for one in (machine_code.row(f, 90, torch.bfloat16) for f in found)}


@pytest.mark.parametrize("longest", [128, 512], ids=["one_tile", "two_kernels"])
@pytest.mark.parametrize("head", [32, 64])
def test_default_settings_compile_well(head, longest):
    passes = {128: {"forward", "backward, one tile"}}.get(
        longest, {"forward", "backward, dq", "backward, dk and dv"}
    )
    found = rows(head, 0.1, longest)
    assert found.keys() == passes
    for one in found.values():
        assert one["stack_bytes"] == one["spill_bytes"] == 0, one
        assert one["load_bytes"] == 16, one
        assert one["tensor_core"] > 0, one
        assert one["tensor_core_kind"] == "HGMMA", one
    if head == 32:
        assert found["forward"]["per_element"] <= LIMIT_WITH_DROPOUT


def test_forward_without_dropout():
    assert rows(32, 0.0, 512)["forward"]["per_element"] <= LIMIT


def test_narrow_strides_show():
    """Heads of 26, as a model without padded heads hands them over: 4 bytes at a time."""
    assert rows(26, 0.0, 64)["forward"]["load_bytes"] == 4
