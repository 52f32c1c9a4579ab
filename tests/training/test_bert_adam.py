"""BertAdam against the update of the official code, one parameter at a time."""

import pytest
import torch

from tinybert_fast.training.bert_adam import BertAdam


def official_step(p, g, state, *, lr, decay, b1=0.9, b2=0.999, eps=1e-6, limit=1.0):
    norm = g.norm()
    g = g * (limit / (norm + 1e-6)) if norm > limit else g
    state["m"] = b1 * state.get("m", 0.0) + (1 - b1) * g
    state["v"] = b2 * state.get("v", 0.0) + (1 - b2) * g * g
    return p - lr * (state["m"] / (state["v"].sqrt() + eps) + decay * p)


def test_follows_the_official_update():
    torch.manual_seed(0)
    shapes, decays, lrs = [(3, 4), (5,), (2, 2)], [0.01, 0.0, 0.01], [1e-2, 5e-3, 0.0]
    params = [torch.nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    unused = torch.nn.Parameter(torch.ones(2))
    groups = [
        {"params": [params[0], params[2], unused], "weight_decay": 0.01},
        {"params": [params[1]], "weight_decay": 0.0},
    ]
    optimizer = BertAdam(groups, lr=1.0)
    expected, states = [p.detach().clone() for p in params], [{} for _ in params]
    for lr in lrs:
        for group in optimizer.param_groups:
            group["lr"] = lr
        for size, p in zip((0.1, 10.0, 0.5), params):  # below and above the clipping norm
            p.grad = torch.randn_like(p) * size
        expected = [
            official_step(e, p.grad, s, lr=lr, decay=d)
            for e, p, s, d in zip(expected, params, states, decays)
        ]
        optimizer.step()
        for p, e in zip(params, expected):
            torch.testing.assert_close(p.data, e, rtol=1e-12, atol=1e-14)
    assert (unused == 1).all()
    assert unused not in optimizer.state


def test_state_goes_through_a_checkpoint():
    torch.manual_seed(0)
    runs = []
    for interrupted in (False, True):
        p = torch.nn.Parameter(torch.ones(3))
        optimizer = BertAdam([p], lr=0.1)
        for step in range(4):
            if interrupted and step == 2:
                saved = optimizer.state_dict()
                optimizer = BertAdam([p], lr=0.1)
                optimizer.load_state_dict(saved)
            p.grad = torch.tensor([1.0, 2.0, -3.0]) * (step + 1)
            optimizer.step()
        runs.append(p.detach())
    assert torch.equal(*runs)


def test_closure_and_refusal():
    p = torch.nn.Parameter(torch.ones(1))

    def closure():
        p.grad = torch.ones(1)
        return 7.0

    assert BertAdam([p]).step(closure) == 7.0
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        BertAdam([p], lr=-1)
