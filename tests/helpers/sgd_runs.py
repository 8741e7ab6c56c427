"""A small network, its data, and runs of SGD on it, tracked or not."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import stableopt

ARITHMETIC = [
    dict(
        zip(("momentum", "dampening", "nesterov", "weight_decay", "maximize"), values, strict=True)
    )
    for values in itertools.product((0, 0.9), (0, 0.3), (False, True), (0, 0.1), (False, True))
]


def accepted(options: dict[str, Any]) -> bool:
    """Whether torch documents the combination as allowed."""
    nesterov_fits = options["momentum"] > 0 and options["dampening"] == 0
    return nesterov_fits or not options["nesterov"]


def name_of(options: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items() if value is not None)


def random_tensors(shapes: Iterable[Any], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def same(left: list[Tensor] | type[Exception], right: list[Tensor] | type[Exception]) -> bool:
    if isinstance(left, type) or isinstance(right, type):
        return left is right
    return len(left) == len(right) and all(map(torch.equal, left, right))


X = torch.linspace(-1, 1, 12).reshape(6, 2)
Y = X.sum(1, keepdim=True).sin()


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    with torch.no_grad():
        for p, value in zip(
            model.parameters(),
            random_tensors([p.shape for p in model.parameters()], torch.float32, seed=5),
            strict=True,
        ):
            p.copy_(value)
    return model


def backward(model: nn.Module, step: int) -> Tensor:
    rows = slice(step % 3, step % 3 + 3)
    loss = nn.functional.mse_loss(model(X[rows]), Y[rows])
    loss.backward()
    return loss.detach()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def fit(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int] = range(4)
) -> list[Tensor]:
    for step in steps:
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return weights(model)


def track(optimizer: stableopt.SGD, model: nn.Module, **options: Any) -> stableopt.StabilityMonitor:
    # 9 parameters: 9 products reach any eigenvalue, so that nothing is left to converge.
    return optimizer.track(model, nn.MSELoss(), (X, Y), **{"every": 1, **options})
