"""A small network, its data, and runs of L-BFGS on it in single precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

DIRECTIONS = ["compact", "two_loop"]
SEARCHES: list[str | None] = [None, "strong_wolfe"]


GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 3, generator=GENERATOR)
Y = torch.randn(12, 2, generator=GENERATOR)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def closure_of(model: nn.Module, optimizer: Any) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(X), Y)
        loss.backward()
        return loss

    return closure


def repeat(times: int, action: Callable[[], Any]) -> list[Any]:
    return [action() for _ in range(times)]
