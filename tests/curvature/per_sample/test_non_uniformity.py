"""The covariance of preconditioned per-sample Hessians."""

from __future__ import annotations

import pytest
import torch
from oracles import Dense, dense_hessians, relative_error, small_data, small_network
from torch import nn

from stableopt.curvature import NonUniformity, Problem, top_eigenpair


@pytest.mark.parametrize("method", ["auto", "vmap", "loop"])
def test_with_a_preconditioner_against_dense(method) -> None:
    """Catches P left out of the inner product, or applied outside of the sum over samples."""
    network, data = small_network(), small_data()
    problem = Problem(network, nn.MSELoss(), data)
    hessians = dense_hessians(network, nn.MSELoss(), *data)
    size = problem.num_params
    root = torch.randn(size, size, dtype=torch.float64) / size**0.5
    p = root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)
    mean = hessians.mean(0)
    expected = torch.stack([h @ p @ h for h in hessians]).mean(0) - mean @ p @ mean
    operator = NonUniformity(problem, method=method, preconditioner=Dense(p))
    eye = torch.eye(size, dtype=torch.float64)
    assert relative_error(operator @ eye, expected) < 1e-11


def test_a_diagonal_preconditioner_either_way() -> None:
    """Limiting case: a diagonal P as an operator, and as coordinates of the problem."""
    network, data = small_network(), small_data()
    problem = Problem(network, nn.MSELoss(), data)
    roots = [torch.rand_like(p) + 0.5 for p in problem.theta()]
    diagonal = problem.flatten([root**2 for root in roots])
    scaled = top_eigenpair(NonUniformity(problem.transformed(scale=roots)), tol=1e-9).value
    d = diagonal.sqrt()
    operator = NonUniformity(problem, preconditioner=Dense(torch.diag(diagonal)))
    matrix = d[:, None] * (operator @ torch.eye(len(d), dtype=torch.float64)) * d
    # The residual of 1e-9 enters the eigenvalue squared.
    assert scaled == pytest.approx(float(torch.linalg.eigvalsh(matrix)[-1]), rel=1e-10)


def test_a_structured_product_takes_no_preconditioner() -> None:
    """Catches a preconditioner that is silently left out."""
    problem = Problem(small_network(), nn.MSELoss(), small_data())
    with pytest.raises(ValueError, match="preconditioner"):
        NonUniformity(problem, method="structured", preconditioner=Dense(torch.eye(38)))
