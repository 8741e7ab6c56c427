"""A small network, its data, and runs of L-BFGS on it in double precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(20, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(20, 2, generator=GENERATOR, dtype=torch.float64)


SEARCHES: list[str | None] = [None, "strong_wolfe"]
DIRECTIONS = ["compact", "two_loop"]


def network(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def closure_of(
    model: nn.Module, optimizer: torch.optim.Optimizer, losses: list[float] | None = None
) -> Callable[[], Tensor]:
    dtype = next(model.parameters()).dtype

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(X.to(dtype)), Y.to(dtype))
        loss.backward()
        if losses is not None:
            losses.append(loss.item())
        return loss.detach()  # torch's own float(loss) warns otherwise

    return closure


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def train(kind: Any, steps: int = 4, **options: Any) -> tuple[Tensor, list[float], Any]:
    """Return the parameters, every loss that the closure returned, and the optimizer."""
    model = network(options.pop("dtype", torch.float64))
    optimizer = kind(model.parameters(), **options)
    losses: list[float] = []
    closure = closure_of(model, optimizer, losses)
    for _ in range(steps):
        optimizer.step(closure)
    return flat(model), losses, optimizer
