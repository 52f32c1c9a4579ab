"""accelerate(block_mask=): against Transformers with the same mask in 4 dimensions; refusal."""

import copy
import logging

import pytest
import torch
from transformers import BertForMaskedLM, BertModel

import tinybert_fast as tbf
from tinybert_fast.ops import BlockMask, BlockPattern
from tinybert_fast.testing.tiny_models import tiny_config

LENGTHS, WIDTH, VOCABULARY = (200, 130, 1), 200, 60
PATTERN = BlockPattern(window=20, global_tokens=(0,))


def model_of(cls=BertModel, **changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": WIDTH, "hidden_size": 24}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return cls(tiny_config(**sizes, **off, **changes))


def batch_of():
    source = torch.Generator().manual_seed(1)
    mask = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
    ids = torch.randint(5, VOCABULARY, mask.shape, generator=source)
    return {"input_ids": ids, "attention_mask": mask.long()}


def meets():
    i = torch.arange(WIDTH)
    return ((i[:, None] - i).abs() <= 20) | (i[:, None] == 0) | (i == 0)


@pytest.mark.parametrize("form", ["pattern", "lists"])
def test_as_transformers_with_a_mask_in_4_dimensions(form):
    batch, plain = batch_of(), model_of()
    real = batch["attention_mask"].bool()
    four = (meets()[None] & real[:, None, :])[:, None]
    fast = copy.deepcopy(plain)
    tbf.accelerate(fast, block_mask=PATTERN if form == "pattern" else BlockMask.from_dense(meets()))
    outputs = []
    for model, mask in ((fast, batch["attention_mask"]), (plain, four)):
        rows = model(batch["input_ids"], attention_mask=mask).last_hidden_state[real]
        (rows * torch.linspace(-1, 1, rows.numel()).view_as(rows)).sum().backward()
        outputs.append((rows.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    (got, got_grads), (want, want_grads) = outputs
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for a, b in zip(got_grads, want_grads):
        torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max()) + 1e-7, rtol=1e-4)
    everyone = copy.deepcopy(plain)(**batch).last_hidden_state[real]
    assert (everyone - want).abs().max() > 1e-3  # the mask matters


def test_settings_come_and_go():
    model, batch = model_of(), batch_of()
    plain = model(**batch).last_hidden_state
    real = batch["attention_mask"].bool()

    def differs():
        return float((model(**batch).last_hidden_state - plain)[real].detach().abs().max()) > 1e-4

    tbf.accelerate(model, block_mask=PATTERN)
    assert differs()
    assert not [name for name in model.state_dict() if "lists" in name]
    assert type(copy.deepcopy(model)).__name__ == "BertModel"
    tbf.accelerate(model, block_mask=BlockPattern(window=2))
    assert differs()
    tbf.accelerate(model)
    assert not differs()
    tbf.accelerate(model, block_mask=PATTERN)
    tbf.restore(model)
    assert not differs()
    assert not [name for name in vars(model) if name.startswith("fast_")]


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_trains_after_an_evaluation(impl):
    """Lists are made once, at the first forward, which may be in inference mode."""
    model, batch = model_of(), batch_of()
    tbf.accelerate(model, block_mask=PATTERN, impl=impl)
    with torch.inference_mode():
        want = model(**batch).last_hidden_state
    got = model(**batch).last_hidden_state
    got.sum().backward()
    assert torch.equal(got, want)


def test_refuses(caplog):
    model = model_of(attn_implementation="eager")
    with pytest.raises(ValueError, match="block_mask is Tensor; expected a BlockPattern or"):
        tbf.accelerate(model, block_mask=meets())
    tbf.accelerate(model, block_mask=PATTERN)
    batch = batch_of()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(ValueError, match="block_mask= needs packed rows, and this call cannot"),
    ):
        model(**batch, output_attentions=True)
    capture = tbf.Capture(attention=(1,))
    with pytest.raises(ValueError, match="a block mask"):
        model(**batch, capture=capture)
    tbf.accelerate(model, block_mask=BlockMask.from_dense(meets()[:64, :64]))
    with pytest.raises(ValueError, match="block_mask must hold 1 or 3 masks of size N >= 200"):
        model(**batch)


def test_masked_lm_trains_with_dropout():
    torch.manual_seed(0)
    model = BertForMaskedLM(
        tiny_config(vocab_size=VOCABULARY, max_position_embeddings=WIDTH, hidden_size=24)
    )
    tbf.accelerate(model, block_mask=BlockPattern.bigbird(3, 1, 1)).train()
    batch = batch_of()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
