"""Curvature in scaled coordinates, with weight decay and sign."""

from __future__ import annotations

import torch
from oracles import (
    PRODUCT,
    covariance,
    dense_hessians,
    eye,
    relative_error,
)
from torch import Tensor, nn

from stableopt.curvature import (
    Hessian,
    NonUniformity,
    Problem,
)


def test_transformed_coordinates(network: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    """Catches a scale applied on one side only, and a preconditioner outside the square in Sigma."""
    problem = Problem(network, nn.MSELoss(), data)
    hessians = dense_hessians(network, nn.MSELoss(), *data)
    scale, decay = [0.5, 2.0, 1.0, 0.1], [0.0, 0.3, 0.1, 0.2]
    sizes = [p.numel() for p in network.parameters()]
    repeats = torch.tensor(sizes)
    diagonal = torch.tensor(scale, dtype=torch.float64).repeat_interleave(repeats)
    shift = torch.tensor(decay, dtype=torch.float64).repeat_interleave(repeats)
    transformed = problem.transformed(sign=-1, scale=scale, weight_decay=decay)
    inside = diagonal[:, None] * hessians * diagonal
    expected = -inside.mean(0) + torch.diag(diagonal**2 * shift)
    assert relative_error(Hessian(transformed) @ eye(Hessian(transformed)), expected) < PRODUCT
    for method in ("structured", "vmap", "loop"):
        spread = NonUniformity(transformed, method=method)
        assert relative_error(spread @ eye(spread), covariance(inside)) < PRODUCT
