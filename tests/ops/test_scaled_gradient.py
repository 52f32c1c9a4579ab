"""scaled_gradient, of the backward of every loss: one product in fp32, rounded once."""

import pytest
import torch

from tinybert_fast.ops import dispatch
from tinybert_fast.ops.loss import _scaled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPLS = ["torch", *(["triton"] if dispatch.UNAVAILABLE["triton"] is None else [])]
HALF = [torch.float16] if dispatch.INTERPRETED else [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 2, 26), (4, 3000)], ids=str)
def test_is_rounded_once(shape, dtype, impl):
    """By a factor that half precision does not have."""
    gradient = torch.randn(shape, device=DEVICE).to(dtype)
    factor = torch.tensor(1 / 3, device=DEVICE)
    got = _scaled(gradient, factor, dtype, impl)
    torch.testing.assert_close(got, (gradient.float() * factor).to(dtype), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_contract(impl):
    gradient = torch.randn(2, 4, 3, device=DEVICE).transpose(1, 2)  # strides of its own
    operands = (gradient, torch.ones((), device=DEVICE), torch.float32, impl)
    torch.library.opcheck(torch.ops.tinybert_fast.scaled_gradient.default, operands)
