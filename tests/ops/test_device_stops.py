"""Values that only the device sees and that nobody waits for: it says which, and stops."""

import pytest
import torch

from tinybert_fast.testing.proofs import prove_stops_the_device

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MASKING = (
    "ids = torch.full((2, 20), {id}, device='cuda');"
    "rule = ops.MaskingRule.of(50, 4, range(5), device='cuda');"
    "ops.mlm_mask(ids, rule, seed=1, capacity={capacity}, allow_empty_rows=True, impl='native')"
)
EMBEDDING = (
    "case = operands.embedding_layer_norm(device='cuda');"
    "case.operands[0][3] = 1000;"
    "case.run({impl!r})"
)
HEAD = (
    "case = operands.linear_cross_entropy(9, 5, 8, 7, device='cuda');"
    "case.operands[{operand}][1] = 9;"
    "case.run({impl!r})"
)
ROWS, LABELS = 3, 4  # of the operands of linear_cross_entropy
PYTORCH = "Assertion"  # of its own kernels, which name no operator
STOPS = [  # op, impl, call, what the device prints
    ("mlm_mask", "native", MASKING.format(id=50, capacity=6),
     "mlm_mask: input_ids[0, 0] is 50; expected 0 to 49, the vocabulary"),
    ("mlm_mask", "native", MASKING.format(id=9, capacity=5),
     "mlm_mask: 6 tokens are masked and capacity is 5"),
    ("embedding_layer_norm", "triton", EMBEDDING.format(impl="triton"),
     "embedding_layer_norm: an id outside its table"),
    ("embedding_layer_norm", "torch", EMBEDDING.format(impl="torch"), PYTORCH),
    ("linear_cross_entropy", "triton", HEAD.format(operand=ROWS, impl="triton"), PYTORCH),
    ("linear_cross_entropy", "torch", HEAD.format(operand=ROWS, impl="torch"), PYTORCH),
    ("linear_cross_entropy", "torch", HEAD.format(operand=LABELS, impl="torch"), PYTORCH),
]  # fmt: skip


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU raises instead, as each op's tests show")
@pytest.mark.parametrize(("op", "impl", "call", "message"), STOPS)
def test_stops(op, impl, call, message):
    prove_stops_the_device(call, message)


STOPPED = "def error(): raise torch.AcceleratorError('CUDA error')\ntorch.cuda.synchronize = error"


@pytest.mark.parametrize("call", ["print('sorry')", STOPPED], ids=["nothing stops", "no message"])
def test_proof_fails(call):
    with pytest.raises(AssertionError, match="a CUDA error, and 'sorry' in what it says"):
        prove_stops_the_device(call, "sorry")


def test_proof_of_an_error_and_its_message():
    prove_stops_the_device(f"{STOPPED}; print('sorry')", "sorry")


@pytest.mark.parametrize("call", [call for *_, call, _ in STOPS])
def test_calls_are_sound_but_for_one_value(call, monkeypatch):
    """On a CPU each raises for that value alone."""
    sound = call.replace("'cuda'", "'cpu'").replace("'native'", "'reference'")
    sound = sound.replace("'triton'", "'torch'")
    from tinybert_fast import ops
    from tinybert_fast.testing import operands

    refused = pytest.raises(
        (ValueError, IndexError, RuntimeError), match=r"capacity|vocabulary|rang"
    )
    with refused:
        exec(sound, {"torch": torch, "ops": ops, "operands": operands})
