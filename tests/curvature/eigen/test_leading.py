"""Several eigenpairs at once, from the iteration that one eigenpair comes from too."""

from __future__ import annotations

import pytest
import torch
from oracles import Dense
from torch import Tensor

from stableopt.curvature import NonFiniteError, Operator, top_eigenpair
from stableopt.curvature.eigen import leading_eigenpairs


def symmetric(size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return (matrix + matrix.T) / 2


def test_one_of_many_is_the_top_after_as_many_products() -> None:
    """Limiting case: before a restart both read one iteration, from the same start."""
    operator = Dense(symmetric(60))
    pairs = leading_eigenpairs(operator, 5)
    top = top_eigenpair(operator, tol=1e-14, max_iter=10)
    assert pairs.products == top.products == 10
    # The same arithmetic: only the signs of vectors, and the order of one sum, may differ.
    assert float(pairs.values[0]) == pytest.approx(top.value, rel=1e-14)
    assert float(pairs.absolute_residuals[0]) == pytest.approx(top.absolute_residual, rel=1e-9)


@pytest.mark.parametrize("matrix", [torch.eye(12), torch.zeros(12, 12)], ids=["identity", "zero"])
def test_a_multiple_eigenvalue_has_orthonormal_vectors(matrix: Tensor) -> None:
    """Catches a division by zero: the Krylov space of any start has one dimension."""
    pairs = leading_eigenpairs(Dense(matrix.double()), 4)
    assert torch.allclose(pairs.values, matrix.diagonal()[:4].double())
    eye = torch.eye(4, dtype=torch.float64)
    assert torch.allclose(pairs.vectors.T @ pairs.vectors, eye, atol=1e-12)


def test_more_pairs_than_dimensions() -> None:
    """Catches an index beyond the space: as many pairs come back as there are."""
    pairs = leading_eigenpairs(Dense(torch.diag(torch.tensor([1.0, 3.0]).double())), 5)
    assert pairs.values.tolist() == pytest.approx([3.0, 1.0])


def test_small_values_in_single_precision_do_not_underflow() -> None:
    """Catches norms whose squares vanish: below 1e-23 in float32."""
    values = 1e-30 * torch.linspace(-1, 1, 200)
    values[3] = 2e-30
    pairs = leading_eigenpairs(Dense(torch.diag(values)), 20)
    # As accurate as the residual squared over the gap, and float32.
    assert float(pairs.values[0]) == pytest.approx(2e-30, rel=1e-5)


def test_products_that_are_not_finite_are_reported() -> None:
    """Catches a NaN that LAPACK would turn into an obscure error."""

    class Broken(Operator):
        def product(self, vector: Tensor) -> Tensor:
            return vector * float("nan")

    with pytest.raises(NonFiniteError, match="product 1 with Broken"):
        leading_eigenpairs(Broken(3, torch.float32, torch.device("cpu")), 2)
