"""The optimizer of the official TinyBERT (and first BERT) code, for runs that have to follow it
step by step.

    g <- g * min(1, 1 / |g|)                      each parameter by its own norm
    m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2
    p <- p - lr (m / (sqrt(v) + eps) + decay p)   no bias correction

AdamW differs in correcting the bias of m and v and in clipping by the norm of all gradients
together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class BertAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 5e-5,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
    ) -> None:
        if lr < 0 or eps < 0 or weight_decay < 0:
            raise ValueError(
                f"lr, eps and weight_decay must not be negative, got {lr}, {eps}, {weight_decay}"
            )
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "weight_decay": weight_decay,
                "max_grad_norm": max_grad_norm,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {
                        "exp_avg": torch.zeros_like(p),
                        "exp_avg_sq": torch.zeros_like(p),
                    }
            grads = [p.grad for p in params]
            first = [self.state[p]["exp_avg"] for p in params]
            second = [self.state[p]["exp_avg_sq"] for p in params]
            beta1, beta2 = group["betas"]
            if group["max_grad_norm"] > 0:
                limit = group["max_grad_norm"]
                scales = [
                    (limit / (norm + 1e-6)).clamp(max=1.0) for norm in torch._foreach_norm(grads)
                ]
                grads = list(torch._foreach_mul(grads, scales))
            torch._foreach_lerp_(first, grads, 1 - beta1)
            torch._foreach_mul_(second, beta2)
            torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
            root = torch._foreach_sqrt(second)
            torch._foreach_add_(root, group["eps"])
            update = torch._foreach_div(first, root)
            if group["weight_decay"] > 0:
                torch._foreach_add_(update, params, alpha=group["weight_decay"])
            torch._foreach_add_(params, update, alpha=-group["lr"])
        return loss
