"""benchmarks/gpu_calls.py: the calls that compute-sanitizer watches leave out no form of a kernel.

That they launch every kernel is seen in tests/ops/test_triton_launches.py.
"""

from itertools import product

from tinybert_fast.benchmarks.gpu_calls import CHOSEN
from tinybert_fast.testing.validation import CALLS

ONE_TILE = 64  # the most tokens of a sequence that every table of settings has in one tile
SEVERAL = 128  # and beyond these every one has several


def calls(op):
    """The chosen ones, each with how many tiles its longest sequence has."""
    made = CALLS[op]()
    cases = [made[label]() for label in CHOSEN[op]]
    return [(case, tiles(case.options["layout"].max_length)) for case in cases]


def tiles(longest):
    return "one" if longest <= ONE_TILE else "several" if longest > SEVERAL else "either"


def side(case):
    mask = case.options.get("block_mask")
    return None if mask is None else mask.lists[6].shape[1]


def test_each_direction_in_one_tile_and_in_several():
    found = {(case.options.get("direction", "both"), of) for case, of in calls("attention")}
    assert found >= set(product(("both", "causal", "anti_causal"), ("one", "several")))


def test_each_side_of_blocks():
    for op in ("attention", "attention_score_mse"):
        assert {side(case) for case, _ in calls(op)} == {None, 64, 128}


def test_dropout_and_none_in_every_kernel_of_attention():
    found = {
        ("dropout_p" in case.options, of, side(case) is not None) for case, of in calls("attention")
    }
    assert found >= set(product((False, True), ("one", "several"), (False,)))
    assert found >= {(False, "several", True), (True, "several", True)}


def test_widths_and_relations_in_one_tile_and_in_several():
    found = {(case.operands[0].shape[-1], of) for case, of in calls("attention")}
    assert found >= set(product((26, 64), ("one", "several")))
    relations = {(len(case.operands), of) for case, of in calls("attention_relation_kl")}
    assert relations >= set(product((2, 4), ("one", "several")))  # with itself, of two


def test_forms_and_parts_of_the_attention_loss():
    options = [case.options for case, _ in calls("attention_score_mse")]
    found = {(of.get("form"), of.get("loss")) for of in options}
    assert found >= set(product(("direct", "gram"), ("full", "student")))
