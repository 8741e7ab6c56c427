"""Slow, obvious references that several test modules compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.curvature import Operator

LOSSES = [nn.MSELoss(), nn.CrossEntropyLoss(), nn.HuberLoss(delta=0.3)]

# Products in float64 lose a few digits to the d-term sums: 1e-8 is the promise, 1e-12 what is seen.
PRODUCT = 1e-10


def eye(operator: Operator) -> Tensor:
    return torch.eye(operator.shape[0], dtype=operator.dtype)


class Diagonal(Operator):
    """A diagonal matrix of any size."""

    def __init__(self, values: Tensor) -> None:
        super().__init__(len(values), values.dtype, values.device)
        self.values = values

    def product(self, vector: Tensor) -> Tensor:
        return self.values * vector


class Dense(Operator):
    """A given symmetric matrix as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix.shape[0], matrix.dtype, matrix.device)
        self.matrix = matrix
        self.products = 0

    def product(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.matrix @ vector


def dense_hessians(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], x: Tensor, y: Tensor
) -> Tensor:
    """Return the Hessian of each sample ``(n, d, d)``, row by row by double backpropagation."""
    parameters = list(model.parameters())
    hessians = []
    for i in range(len(x)):
        loss = loss_fn(model(x[i : i + 1]), y[i : i + 1])
        gradient = torch.cat(
            [g.reshape(-1) for g in torch.autograd.grad(loss, parameters, create_graph=True)]
        )
        rows = []
        for entry in gradient:
            parts = torch.autograd.grad(
                entry, parameters, retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        hessians.append(torch.stack(rows))
    return torch.stack(hessians)


def dense_gauss_newtons(
    model: nn.Module, loss_fn: Callable[[Any, Any], Tensor], x: Tensor, y: Tensor
) -> Tensor:
    """Return each sample's J^T L J ``(n, d, d)``, with J row by row and L entry by entry."""
    parameters = list(model.parameters())
    found = []
    for i in range(len(x)):
        outputs = model(x[i : i + 1])
        rows = [
            torch.cat(
                [g.reshape(-1) for g in torch.autograd.grad(z, parameters, retain_graph=True)]
            )
            for z in outputs.reshape(-1)
        ]
        jacobian = torch.stack(rows)
        bend = torch.autograd.functional.hessian(
            lambda z, i=i: loss_fn(z, y[i : i + 1]), outputs.detach()
        ).reshape(len(rows), len(rows))
        found.append(jacobian.T @ bend @ jacobian)
    return torch.stack(found)


def with_spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """Return a symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(square)[0]
    return (basis * values) @ basis.T


def covariance(hessians: Tensor) -> Tensor:
    """Return (1/n) sum H_i^2 - H^2, as the definition reads."""
    mean = hessians.mean(0)
    return torch.stack([h @ h for h in hessians]).mean(0) - mean @ mean


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def small_network(activation: type[nn.Module] = nn.Tanh) -> nn.Module:
    """Return 38 parameters in float64, smooth unless asked otherwise."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 3)).double()


def small_data(n: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return x, y


def quadratic_pairs(k: int, d: int = 12) -> tuple[Tensor, Tensor]:
    """Return k gradient changes and steps ``(k, d)`` of a quadratic, eigenvalues from 1 to 20."""
    generator = torch.Generator().manual_seed(4)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    steps = torch.randn(k, d, generator=generator, dtype=torch.float64)
    scales = torch.linspace(1, 20, d, dtype=torch.float64)
    return steps @ (basis * scales) @ basis.T, steps


def bfgs_inverse(changes: Tensor, steps: Tensor, gamma: float) -> Tensor:
    """Return the inverse BFGS matrix ``(d, d)``, updated pair by pair as the textbook has it."""
    identity = torch.eye(steps.shape[1], dtype=steps.dtype)
    matrix = gamma * identity
    for y, s in zip(changes, steps, strict=True):
        rho = 1 / (y @ s)
        left = identity - rho * torch.outer(s, y)
        matrix = left @ matrix @ left.T + rho * torch.outer(s, s)
    return matrix


def two_loop(changes: Tensor, steps: Tensor, gamma: float, vector: Tensor) -> Tensor:
    """Return that matrix times ``vector`` by the two-loop recursion (Nocedal, 1980)."""
    pairs = list(zip(changes, steps, strict=True))
    shares, result = [], vector.clone()
    for y, s in reversed(pairs):
        shares.append(s @ result / (y @ s))
        result = result - shares[-1] * y
    result = gamma * result
    for (y, s), share in zip(pairs, reversed(shares), strict=True):
        result = result + (share - y @ result / (y @ s)) * s
    return result


class SineOnce(torch.autograd.Function):
    """A sine by a kernel that can be differentiated only once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].cos()
