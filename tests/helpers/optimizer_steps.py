"""Optimizers by name, real steps with them, and their preconditioners as dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch_optimizer
from torch import Tensor, nn

import stableopt
from stableopt import UpdateRule

Data = tuple[Tensor, Tensor]
MSE = nn.MSELoss()

KINDS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "Adam": lambda params: torch.optim.Adam(params, lr=0.01),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "NAdam": lambda params: torch.optim.NAdam(params, lr=0.01),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr=0.01),
    "LBFGS": lambda params: torch.optim.LBFGS(params, lr=0.5, max_iter=3),
    "stableopt.LBFGS": lambda params: stableopt.LBFGS(params, lr=0.5, max_iter=3),
    "Yogi": torch_optimizer.Yogi,
    "AdaBelief": torch_optimizer.AdaBelief,
    "Adahessian": torch_optimizer.Adahessian,
    "Apollo": torch_optimizer.Apollo,
    "Shampoo": torch_optimizer.Shampoo,
}


def take(optimizer: torch.optim.Optimizer, model: nn.Module, data: Data, steps: int = 1) -> None:
    for _ in range(steps):

        def closure() -> Tensor:
            loss = MSE(model(data[0]), data[1])
            params = [p for p in model.parameters() if p.requires_grad]
            graph = isinstance(optimizer, torch_optimizer.Adahessian)
            gradients = torch.autograd.grad(loss, params, create_graph=graph)
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient.clone()  # a view could not be worked on in place
            return loss

        closure()
        if isinstance(optimizer, torch.optim.LBFGS):
            optimizer.step(closure)
        else:
            optimizer.step()


def dense(rule: UpdateRule, d: int = 38) -> Tensor:
    assert rule.preconditioner is not None
    rows = torch.eye(d, dtype=torch.float64)
    return torch.stack([rule.preconditioner @ row for row in rows], dim=1)


def top(matrix: Tensor) -> float:
    return float(torch.linalg.eigvals(matrix).real.max())
