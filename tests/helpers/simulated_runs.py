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

MONITORED = ("sharpness", "preconditioned_sharpness", "realised_edge", "critical_sharpness")


def network(device: str, hidden: int = 1, width: int = 4) -> nn.Module:
    """Return a network of 2 + 2 ``hidden`` parameter tensors."""
    torch.manual_seed(0)
    widths = [3] + [width] * hidden
    layers = [module for a, b in pairwise(widths) for module in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(width, 2)).to(device)


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
    model = network(device, width=2)
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


def all_measured(device: str, names: list[tuple[str, str | None]]) -> dict[str, Any]:
    return {name: measured(device, name, optimizer) for name, optimizer in names}


def all_reads(device: str) -> dict[str, dict[str, int]]:
    """Return how often the host reads in a first measurement, but for once a product."""
    cases = {"4 tensors": (1, 12), "24 tensors": (11, 12), "48 samples": (1, 48)}
    return {
        quantity: {case: _reads(device, quantity, *size) for case, size in cases.items()}
        for quantity in ("sharpness", "non_uniformity")
    }


def _reads(device: str, quantity: str, hidden: int, n: int) -> int:
    model, data = network(device, hidden), samples(device, n)
    with Counting() as transfers:
        stableopt.measure(model, MSE, data, lr=0.1, batch_size=4, quantities=(quantity,), tol=1e-2)
    return transfers.to_host - transfers.places_in("eigen/inner_product.py")


def trained(device: str, name: str) -> dict[str, Any]:
    """Return what a tracked optimizer measures, the weights, and the reads of a later measurement."""
    model, (x, y) = network(device), samples(device)
    options = {"lr": 0.05} if name != "LBFGS" else {"lr": 0.5, "line_search_fn": "strong_wolfe"}
    if name in ("SGD", "GD", "LBFGS"):
        optimizer = getattr(stableopt, name)(model.parameters(), **options)
        monitor = optimizer.track(model, MSE, (x, y), every=2, batch_size=4, tol=1e-4)
    else:
        optimizer = getattr(torch.optim, name)(model.parameters(), **options)
        monitor = stableopt.StabilityMonitor(
            optimizer, model, MSE, (x, y), every=2, batch_size=4, tol=1e-4, quantities=MONITORED
        )
    records: list[dict[str, float]] = []
    for _ in range(6):

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = MSE(model(x), y)
            loss.backward()
            return loss

        with Counting() as transfers:
            optimizer.step(closure)
        if monitor.margins is not None:
            records.append(_numbers(monitor.margins.record()))
    products = sum(m.products for m in monitor.margins.measurements.values())
    return {
        "records": records,
        "weights": [p.detach().cpu() for p in model.parameters()],
        "products": products,
        "reads": transfers.to_host,
    }
