"""Real MLM and NSP heads: Transformers' logits and the accuracy that is known of the model."""

import pytest

from tinybert_fast.benchmarks.real_heads import REACTIONS, TOKEN, installed, measure


def test_reactions_fall_into_tokens():
    assert all("".join(TOKEN.findall(reaction)) == reaction for reaction in REACTIONS)
    assert TOKEN.findall("C[Si]Cl%12>>Br-c1") == "C [Si] Cl %12 >> Br - c 1".split()


@pytest.mark.skipif(installed() is None, reason="pip install --no-deps rxnfp==0.1.0")
def test_accelerated_heads_are_those_of_transformers():
    found = measure(installed())
    assert found["unknown_tokens"] == 0
    apart = found["largest_difference"]
    assert apart["fp64"] < 1e-5
    assert apart["fp32"] < 1e-6 * found["largest_logit"]
    assert apart["fp32"] < 2 * apart["transformers_fp32_to_fp64"]
    assert found["accuracy"]["ours"] == found["accuracy"]["transformers"] > 0.8
