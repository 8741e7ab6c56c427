"""Sharpness and non-uniformity of models whose values are known in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import covariance, dense_hessians
from torch import Tensor, nn

from stableopt.curvature import (
    Hessian,
    NonUniformity,
    Problem,
    top_eigenpair,
)


def test_scalar_chain_has_closed_sharpness_and_non_uniformity() -> None:
    """Y = theta x through a product of weights, half squared loss: with G = sum (theta / w_l)^2,
    H_i = G x_i^2 at the minimum, so a = G mean(x^2) and s = G std(x^2).
    """

    class Chain(nn.Module):
        def __init__(self, weights: list[float]) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor(weights, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return self.w.prod() * x

    weights = [0.7, -1.3, 2.0]
    theta = math.prod(weights)
    x = torch.linspace(-1, 2, 11, dtype=torch.float64)
    problem = Problem(Chain(weights), lambda z, y: 0.5 * (z - y).square().mean(), (x, theta * x))
    slope = sum((theta / w) ** 2 for w in weights)
    a = top_eigenpair(Hessian(problem), tol=1e-10).value
    s = math.sqrt(top_eigenpair(NonUniformity(problem), tol=1e-10).value)
    assert a == pytest.approx(slope * float((x**2).mean()), rel=1e-10)
    assert s == pytest.approx(slope * float((x**2).std(correction=0)), rel=1e-10)


def test_orthogonal_jacobians() -> None:
    """Samples in k_1, ..., k_m groups see orthogonal parameters: with f_i = J_i^2 w^2 / 2,
    a = k_max / n and s = k_max sqrt(n - 1) / n for J_i = sqrt(k_i) e_i.
    """
    k = torch.tensor([5.0, 2.0, 3.0, 1.0], dtype=torch.float64)
    n = len(k)
    model = nn.Linear(n, 1, bias=False).double()
    x = torch.diag(k.sqrt())
    data = (x, torch.zeros(n, 1, dtype=torch.float64))
    problem = Problem(model, lambda z, y: 0.5 * (z - y).square().mean(), data)
    assert top_eigenpair(Hessian(problem), tol=1e-9).value == pytest.approx(5 / n, rel=1e-10)
    s = math.sqrt(top_eigenpair(NonUniformity(problem), tol=1e-9).value)
    assert s == pytest.approx(5 * math.sqrt(n - 1) / n, rel=1e-10)


def test_matrix_factorisation() -> None:
    """Half ||U V^T - M||^2 at U V^T = M has largest eigenvalue sigma_1(U)^2 + sigma_1(V)^2."""

    class Factors(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            generator = torch.Generator().manual_seed(3)
            self.u = nn.Parameter(torch.randn(4, 2, generator=generator, dtype=torch.float64))
            self.v = nn.Parameter(torch.randn(5, 2, generator=generator, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return (self.u @ self.v.T).expand(len(x), 4, 5)

    model = Factors()
    target = (model.u @ model.v.T).detach()[None]
    problem = Problem(
        model,
        lambda z, y: 0.5 * (z - y).square().sum((1, 2)).mean(),
        (torch.zeros(1, 1, dtype=torch.float64), target),
    )
    u, v = model.u.detach(), model.v.detach()
    expected = torch.linalg.matrix_norm(u, 2) ** 2 + torch.linalg.matrix_norm(v, 2) ** 2
    pair = top_eigenpair(Hessian(problem), tol=1e-10)
    assert pair.converged
    assert pair.value == pytest.approx(float(expected), rel=1e-10)


def test_eigenvalues_of_a_network_against_dense_ones(
    network: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    """Catches a wrong matrix and a wrong search at once; 1e-6 is the promise."""
    hessians = dense_hessians(network, nn.MSELoss(), *data)
    problem = Problem(network, nn.MSELoss(), data)
    for operator, dense in (
        (Hessian(problem), hessians.mean(0)),
        (NonUniformity(problem), covariance(hessians)),
    ):
        expected = float(torch.linalg.eigvalsh(dense)[-1])
        pair = top_eigenpair(operator, tol=1e-8)
        assert pair.converged
        assert pair.value == pytest.approx(expected, rel=1e-10)
