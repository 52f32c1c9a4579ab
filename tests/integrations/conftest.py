"""Small BERTs at the real widths, and batches with every kind of padding."""

import copy

import pytest
import torch
import transformers
from transformers import BertConfig

import tinybert_fast as tbf

BATCH, WIDTH, VOCABULARY = 4, 9, 97

# Real positions of a 9-wide row; every mask has a full row, so that the width is used.
FULL, RIGHT, ONE = range(9), range(6), range(1)
MASKS = {
    "right": (FULL, RIGHT, range(4), range(7)),
    "left": (FULL, range(3, 9), range(8, 9), range(5, 9)),
    "holes": (FULL, (0, 2, 3, 6), (0, 8), (0, 1, 5)),
    "hole_first": (FULL, (1, 2, 5), RIGHT, (0, 7)),
    "one_token": (FULL, ONE, ONE, RIGHT),
    "empty_row": (FULL, (), range(3), ()),
    "full": (FULL,) * 4,
}
# What a pooler reads is defined by Transformers only where each row is empty or starts at column 0.
POOLABLE = ("right", "holes", "one_token", "full")


def mask_of(name):
    """int64 (B, N)."""
    mask = torch.zeros(BATCH, WIDTH, dtype=torch.int64)
    for row, columns in zip(mask, MASKS[name]):
        row[list(columns)] = 1
    return mask


def batch_of(name, **more):
    generator = torch.Generator().manual_seed(len(name))
    shape = (BATCH, WIDTH)
    return {
        "input_ids": torch.randint(1, VOCABULARY, shape, generator=generator),
        "token_type_ids": torch.randint(2, shape, generator=generator),
        "attention_mask": mask_of(name),
        **more,
    }


def config_of(width=312, **changes):
    """2 layers of TinyBERT-4L (312 wide, heads of 26) or TinyBERT-6L (768 wide, heads of 64)."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": 2,
        "num_attention_heads": 12,
        "intermediate_size": {312: 1200, 768: 3072}.get(width, 2 * width),
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.05,  # far from the flat attention of a fresh model
        **changes,
    }
    return BertConfig(**settings)


def pair_of(name, width=312, *, config=None, accelerate=None, **changes):
    """The same weights twice, in eval mode: Transformers' own class, and accelerated."""
    torch.manual_seed(0)
    plain = getattr(transformers, name)(config or config_of(width, **changes)).eval()
    with torch.no_grad():  # biases start at 0, where a lost one would not show
        for parameter in plain.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return plain, tbf.accelerate(copy.deepcopy(plain), **(accelerate or {}))


def assert_same_gradients(ours, theirs, relative=2e-5):
    """Per parameter, in norm. A gradient that is zero in exact arithmetic (the key bias: softmax
    ignores it) is measured against the model's largest."""
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    scale = max(g.norm() for g in expected.values() if g is not None)
    for name, parameter in ours.named_parameters():
        want = expected[name]
        if want is None:
            assert parameter.grad is None or parameter.grad.norm() == 0, name
            continue
        error = (parameter.grad - want).norm()
        assert error <= relative * max(want.norm(), 2e-3 * scale), (name, error / want.norm())


class Cases:
    """What the tests of this folder build with."""

    masks, poolable, vocabulary, shape = tuple(MASKS), POOLABLE, VOCABULARY, (BATCH, WIDTH)
    batch, config, pair = staticmethod(batch_of), staticmethod(config_of), staticmethod(pair_of)
    same_gradients = staticmethod(assert_same_gradients)


@pytest.fixture
def cases():
    return Cases


def pytest_generate_tests(metafunc):
    if "padding" in metafunc.fixturenames:
        metafunc.parametrize("padding", MASKS)
    if "poolable" in metafunc.fixturenames:
        metafunc.parametrize("poolable", POOLABLE)
