"""Runs of the library on a given device, for `simulated_device.on_both`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from simulated_device import Counting
from torch import Tensor, nn

import stableopt
from stableopt.curvature import (
    GaussNewton,
    Hessian,
    NonUniformity,
    Operator,
    Problem,
    top_eigenpair,
)

MSE = nn.MSELoss()


def network(device: str, hidden: int = 1) -> nn.Module:
    """Return a network of 2 + 2 ``hidden`` parameter tensors."""
    torch.manual_seed(0)
    widths = [3] + [4] * hidden
    layers = [module for a, b in pairwise(widths) for module in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(4, 2)).to(device)


def samples(device: str, n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, generator=generator)
    return x.to(device), torch.stack([x.sum(1).sin(), x[:, 0] * x[:, 1]], 1).to(device)


OPERATORS: dict[str, Any] = {
    "hessian": Hessian,
    "gauss_newton": GaussNewton,
    "structured": lambda problem: NonUniformity(problem, method="structured"),
    "vmap": lambda problem: NonUniformity(problem, method="vmap"),
    "loop": lambda problem: NonUniformity(problem, method="loop"),
    "gauss-newton": lambda problem: NonUniformity(problem, method="gauss-newton"),
}


def products(device: str, name: str, **options: Any) -> Tensor:
    """Return products with three vectors."""
    operator: Operator = OPERATORS[name](Problem(network(device), MSE, samples(device), **options))
    vectors = torch.randn(operator.shape[0], 3, generator=torch.Generator().manual_seed(2))
    return torch.stack([operator @ v for v in vectors.to(device).T]).cpu()


def eigenpair(device: str, name: str) -> dict[str, float]:
    """Return what the solver finds, its products and the reads of the host."""
    operator = OPERATORS[name](Problem(network(device), MSE, samples(device)))
    operator @ torch.ones(operator.shape[0], device=device)
    with Counting() as transfers:
        found = top_eigenpair(operator, tol=1e-4)
    return {"value": found.value, "products": found.products, "reads": transfers.to_host}


def measured(device: str, quantity: str, optimizer: str | None = None) -> dict[str, Any]:
    model = network(device)
    asked: dict[str, Any] = {"lr": 0.1}
    if optimizer is not None:
        stepped = getattr(torch.optim, optimizer)(model.parameters(), lr=0.01)
        MSE(model(samples(device)[0]), samples(device)[1]).backward()
        stepped.step()
        asked = {"optimizer": stepped}
    margins = stableopt.measure(
        model, MSE, samples(device), batch_size=4, quantities=(quantity,), tol=1e-5, **asked
    )
    return _numbers(margins.record())


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, (int, float)) and "seconds" not in name and "overhead" not in name
    }
