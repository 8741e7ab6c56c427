"""A linear model, its data, and short training runs to monitor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import stableopt
from stableopt import StabilityMonitor

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 2, generator=GENERATOR)
Y = X.sum(1, keepdim=True).sin()
MSE = nn.MSELoss()


def linear() -> nn.Linear:
    """Return a model of two parameters: two products find its sharpness, up to rounding."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.constant_(model.weight, 0.5)
    return model


def start(lr: float = 0.1, **options: Any) -> tuple[nn.Linear, stableopt.SGD, StabilityMonitor]:
    model = linear()
    optimizer = stableopt.SGD(model.parameters(), lr=lr)
    return model, optimizer, optimizer.track(model, MSE, (X, Y), **{"every": 1, **options})


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 1, rows: Any = slice(0, 4)
) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        MSE(model(X[rows]), Y[rows]).backward()
        optimizer.step()


def hooks_left(optimizer: torch.optim.Optimizer, model: nn.Module) -> int:
    return (
        len(optimizer._optimizer_step_post_hooks)
        + len(optimizer._optimizer_step_pre_hooks)
        + sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())
    )


class Grumpy:
    def __call__(self, step: int, record: dict[str, float]) -> None:
        raise OSError("disk full")

    def flush(self) -> None:
        raise OSError("disk full")

    def __repr__(self) -> str:
        raise RuntimeError("not even a name")
