"""The directions that second moments are restricted to, against dense matrices."""

from __future__ import annotations

import pytest
import torch
from oracles import Dense
from torch import Tensor

from stableopt.stability.mean_square.leading import leading_directions


def symmetric(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return (matrix + matrix.T) / 2


def test_they_contain_the_leading_eigenvectors_of_each() -> None:
    """Catches vectors of one operator that the other's push out of the basis."""
    first, second = (torch.linspace(0, 1, 60, dtype=torch.float64) for _ in range(2))
    first[:3], second[-2:] = torch.tensor([5.0, 7.0, 9.0]), torch.tensor([20.0, 30.0])
    basis = leading_directions([Dense(torch.diag(d)) for d in (first, second)], 4, seed=0)
    assert basis.shape == (60, 8)
    eye = torch.eye(60, dtype=torch.float64)
    assert torch.allclose(basis.T @ basis, eye[:8, :8], atol=1e-12)
    # Eight products leave residuals of about 1e-3 where the rest of the spectrum is 5 to 30 times less.
    lost = (eye - basis @ basis.T).norm(dim=0)
    assert float(lost[[1, 2, 58, 59]].max()) < 1e-2


@pytest.mark.parametrize("matrix", [torch.eye(12), torch.zeros(12, 12)], ids=["identity", "zero"])
def test_multiple_eigenvalues_have_orthonormal_vectors(matrix: Tensor) -> None:
    """Catches a division by zero: the Krylov space of any start has one dimension."""
    basis = leading_directions([Dense(matrix.double())] * 2, 3, seed=0)
    assert torch.allclose(basis.T @ basis, torch.eye(6, dtype=torch.float64), atol=1e-12)


def test_more_than_there_are_dimensions() -> None:
    """Catches an index beyond the space: the basis is of all of it."""
    basis = leading_directions([Dense(symmetric(5, seed)) for seed in (0, 1)], 9, seed=0)
    assert torch.allclose(basis @ basis.T, torch.eye(5, dtype=torch.float64), atol=1e-12)
