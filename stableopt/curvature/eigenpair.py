"""What a search for the top eigenpair returns, and how it may fail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

__all__ = ["Eigenpair", "NonFiniteError", "Preconditioner", "small_enough"]


class NonFiniteError(ArithmeticError):
    """A product with the operator was not finite."""


class Preconditioner(Protocol):
    """A symmetric positive definite matrix ``(d, d)`` known by its products."""

    def __matmul__(self, vector: Tensor, /) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``."""


@dataclass(frozen=True)
class Eigenpair:
    r"""The largest eigenvalue of a symmetric operator, and what is known of its accuracy.

    With a preconditioner P it is that of :math:`PH`, which is that of the symmetric
    :math:`P^{1/2}HP^{1/2}`; read the residual as that of the latter.

    Attributes:
        value: the Ritz value; at most the largest eigenvalue, up to rounding.
        vector: the unit Ritz vector x ``(d,)``, on the operator's device: :math:`PHx = \lambda x`
            in the limit, with :math:`|x| = 1` in the plain Euclidean norm.
        residual: ``|A v - value v|``: an eigenvalue of A lies within this distance of ``value``.
            With a preconditioner :math:`A = P^{1/2}HP^{1/2}` and :math:`v = P^{-1/2}x`, scaled to 1.
        products: how many products with the operator it took.
        converged: whether ``residual <= tol * |value|`` was reached.
    """

    value: float
    vector: Tensor
    residual: float
    products: int
    converged: bool


def small_enough(residual: float, value: float, scale: float, tol: float, eps: float) -> bool:
    """Return whether the residual is within ``tol`` of the value, or both within rounding of zero."""
    # A value that is itself below the rounding of the products is zero, as far as can be told.
    floor = 10 * eps * scale
    return residual <= tol * abs(value) or max(residual, abs(value)) <= floor
