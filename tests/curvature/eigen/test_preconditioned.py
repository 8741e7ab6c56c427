"""The top eigenpair of P H from products with P, against dense generalised eigenproblems."""

from __future__ import annotations

import pytest
import torch
from oracles import Dense
from torch import Tensor

from stableopt.curvature import Eigenpair, Operator, top_eigenpair


def symmetric(values: Tensor, seed: int) -> Tensor:
    """Return a dense symmetric float64 matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(values.double()) @ basis.T
    return (matrix + matrix.T) / 2


def preconditioners(size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "identity": torch.eye(size, dtype=torch.float64),
        "diagonal": torch.diag(torch.rand(size, generator=generator, dtype=torch.float64) + 0.1),
        "dense": symmetric(torch.linspace(0.2, 4, size), seed=1),
        "condition 1e6": symmetric(torch.logspace(-3, 3, size), seed=2),
    }


class Diagonal:
    """A preconditioner that is neither an operator nor a tensor: it only has ``@``."""

    def __init__(self, entries: Tensor) -> None:
        self.entries = entries
        self.products = 0

    def __matmul__(self, vector: Tensor) -> Tensor:
        self.products += 1
        return self.entries * vector


def dense_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


def true_residual(pair: Eigenpair, hessian: Tensor, precondition: Tensor) -> float:
    """Return the residual of P^(1/2) H P^(1/2), formed with the root of P."""
    root = dense_root(precondition)
    y = torch.linalg.solve(root, pair.vector)
    y /= y.norm()
    return float((root @ (hessian @ (root @ y)) - pair.value * y).norm())


@pytest.mark.parametrize("vectors", [40, 4])
@pytest.mark.parametrize("name", preconditioners(1))
def test_it_is_the_largest_eigenvalue_of_the_dense_matrix(name: str, vectors: int) -> None:
    """Catches a product with P in the wrong place, and orthogonality in the wrong inner product.

    The error in the value is of the order of the residual squared, 1e-12; conditioning of the root
    of P, 1e3, and rounding leave 1e-8 ample.
    """
    size = 60
    hessian = symmetric(torch.linspace(-3, 2, size), seed=0)
    precondition = preconditioners(size)[name]
    root = dense_root(precondition)
    expected = float(torch.linalg.eigvalsh(root @ hessian @ root)[-1])
    operator = Dense(hessian)
    pair = top_eigenpair(
        operator, preconditioner=precondition, most_vectors=vectors, tol=1e-6, max_iter=20000
    )
    assert pair.converged
    assert pair.value == pytest.approx(expected, rel=1e-8)
    assert pair.products == operator.products
    # x solves P H x = lambda x as it stands, and is of unit length in the plain norm.
    assert float(pair.vector.norm()) == pytest.approx(1, abs=1e-12)
    residual = precondition @ (hessian @ pair.vector) - pair.value * pair.vector
    # |P^(1/2) e| for the residual e of y, over |P^(1/2) y|: at most the root of P's condition, 1e3.
    assert float(residual.norm()) <= 1e-6 * pair.value * 1e3 + 1e-9


def test_restarts_in_the_inner_product() -> None:
    """Catches a restart that combines the vectors but not the covectors: it needs several bases."""
    precondition = symmetric(torch.linspace(0.5, 1.5, 300), seed=5)
    unroot = torch.linalg.inv(dense_root(precondition))
    hessian = unroot @ symmetric(torch.linspace(0, 1, 300), seed=4) @ unroot
    pair = top_eigenpair(Dense(hessian), preconditioner=precondition, tol=1e-7, max_iter=1000)
    assert pair.products > 80  # two restarts at the least, or the test is too easy
    assert pair.value == pytest.approx(1.0, rel=1e-8)


@pytest.mark.parametrize("vectors", [40, 4])
def test_the_residual_is_that_of_the_symmetric_matrix(vectors: int) -> None:
    """Catches a residual in the plain norm, which bounds no distance to an eigenvalue."""
    hessian = symmetric(torch.linspace(-1, 1, 60), seed=0)
    precondition = preconditioners(60)["diagonal"]
    for tol in (0.1, 1e-3):
        pair = top_eigenpair(
            Dense(hessian),
            preconditioner=precondition,
            most_vectors=vectors,
            tol=tol,
            max_iter=5000,
        )
        true = true_residual(pair, hessian, precondition)
        # 1e-6: the cancellation in the true residual of a vector with a residual of 1e-3.
        assert pair.absolute_residual == pytest.approx(true, rel=1e-6)


def test_a_preconditioner_of_one_changes_nothing() -> None:
    """Catches a preconditioned search that differs from the plain one. Only the grouping of
    operations differs, and Lanczos does not amplify its rounding in the converged value.
    """
    hessian = symmetric(torch.linspace(-1, 1, 100), seed=0)
    plain = top_eigenpair(Dense(hessian), tol=1e-6)
    identity = Diagonal(torch.ones(100, dtype=torch.float64))
    pair = top_eigenpair(Dense(hessian), preconditioner=identity, tol=1e-6)
    assert pair.value == pytest.approx(plain.value, rel=1e-12)
    assert pair.products == plain.products


@pytest.mark.parametrize("vectors", [40, 4])
def test_one_product_with_each_an_iteration(vectors: int) -> None:
    """Catches products with P other than one an iteration and one for the start."""
    operator = Dense(symmetric(torch.linspace(-1, 1, 100), seed=0))
    precondition = Diagonal(torch.linspace(0.5, 2, 100, dtype=torch.float64))
    pair = top_eigenpair(operator, preconditioner=precondition, most_vectors=vectors, max_iter=500)
    assert pair.products == operator.products
    assert precondition.products <= pair.products + 1


def test_a_warm_start_is_a_vector_of_p_h() -> None:
    """Catches a start taken for a covector: from the eigenvector itself the first values are right."""
    hessian = symmetric(torch.linspace(0.1, 1, 200), seed=0)
    precondition = preconditioners(200)["condition 1e6"]
    operator = Dense(hessian)
    cold = top_eigenpair(operator, preconditioner=precondition, tol=1e-3)
    operator.products = 0
    warm = top_eigenpair(
        operator, preconditioner=precondition, tol=1e-3, start=cold.vector, max_iter=2
    )
    assert warm.products == operator.products == 2
    # The noise of 0.05 costs its square, 0.0025, of the value.
    assert warm.value == pytest.approx(cold.value, rel=0.005)


@pytest.mark.parametrize("vectors", [40, 4])
@pytest.mark.parametrize(
    "entries", [[1.0, -2.0, 1.0], [-1.0, -1.0, -1.0], [1.0, 1.0, float("nan")]]
)
def test_a_preconditioner_that_is_not_positive_definite_is_named(
    entries: list[float], vectors: int
) -> None:
    """Catches the root of a negative number, which would be an eigenvalue of NaN."""
    operator = Dense(torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    precondition = Diagonal(torch.tensor(entries))
    # Only a direction of negative curvature of P shows it: this seed's search meets one.
    with pytest.raises(ValueError, match=r"preconditioner=Diagonal: r\^T P r is (-|nan)"):
        top_eigenpair(operator, preconditioner=precondition, most_vectors=vectors, tol=1e-6, seed=1)


def test_single_precision_and_a_bad_condition() -> None:
    """Catches a rounded square below zero taken for an indefinite P: it is 1e6 against 1e-7."""
    size = 400
    entries = torch.logspace(-3, 3, size, dtype=torch.float64)
    hessian = symmetric(torch.linspace(-1, 2, size), seed=0)
    expected = torch.linalg.eigvalsh(entries.sqrt()[:, None] * hessian * entries.sqrt())[-1]
    pair = top_eigenpair(
        Dense(hessian.float()), preconditioner=Diagonal(entries.float()), tol=1e-4, max_iter=300
    )
    assert pair.converged
    assert pair.value == pytest.approx(float(expected), rel=1e-4)


class Zero(Operator):
    def product(self, vector: Tensor) -> Tensor:
        return torch.zeros_like(vector)


def test_a_zero_operator_has_the_value_zero() -> None:
    """Catches a covector of zero taken for an indefinite P."""
    precondition = Diagonal(torch.ones(5))
    pair = top_eigenpair(Zero(5, torch.float32, torch.device("cpu")), preconditioner=precondition)
    assert pair.value == 0.0
    assert pair.converged
