"""`Search` and `Eigenpair`: what a search for the largest eigenvalue is given, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt._support.deprecation import warn_renamed
from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.curvature.operator import Operator

__all__ = ["UNCERTAINTY", "Eigenpair", "Search"]

UNCERTAINTY = 0.01
"""Probability that a largest eigenvalue lies above its ``upper_bound``."""


@dataclass(frozen=True)
class Search:
    """What every method of search is given; the arguments of ``top_eigenpair`` explain the fields."""

    operator: Operator
    inner: InnerProduct
    tol: float
    seed: int
    keep: bool
    most_vectors: int

    def small_enough(self, residual: float, value: float, scale: float) -> bool:
        """Return whether the residual is within ``tol`` of the value, or both are rounding of zero."""
        # A value that is itself below the rounding of the products cannot be distinguished from zero.
        floor = 10 * torch.finfo(self.operator.dtype).eps * scale
        return residual <= self.tol * abs(value) or max(residual, abs(value)) <= floor


@dataclass(frozen=True)
class Eigenpair:
    r"""The largest eigenvalue of a symmetric operator, its vector, and how accurate they are.

    With a preconditioner P it is that of :math:`PH`, which is that of the symmetric
    :math:`A = P^{1/2}HP^{1/2}`; without one A is H.

    Attributes:
        value: the Ritz value; at most the largest eigenvalue, up to rounding.
        vector: the Ritz vector x ``(d,)``, on the operator's device: :math:`PHx = \lambda x`
            in the limit, and :math:`|x| = 1` in the Euclidean norm.
        absolute_residual: :math:`|Av - \mathtt{value}\,v|` for the unit vector v along
            :math:`P^{-1/2}x`: an eigenvalue of A lies within this distance of ``value``.
        products: the number of products with the operator.
        converged: whether ``relative_residual`` is at most ``tol``.
        upper_bound: an upper bound of the largest eigenvalue, wrong with probability at most 0.01 over
            the random starts; ``None`` for searches that are too short, or do not start uniformly on
            the sphere. For k products and
            :math:`\epsilon = (\ln(2\cdot1.648\sqrt d/0.01)/(2k-1))^2 < 1/2` it is
            :math:`\theta + \epsilon(\theta-\theta_{\min})/(1-2\epsilon)`, where :math:`\theta_{\min}`
            is the smallest Ritz value seen and k counts up to the first restart. By Kuczyński &
            Woźniakowski (*Estimating the largest eigenvalue by the power and Lanczos algorithms with
            a random start*, 1992, Theorem 4.2), :math:`\lambda_1 - \theta \le
            \epsilon(\lambda_1-\lambda_d)` fails with probability at most
            :math:`1.648\sqrt d\,e^{-\sqrt\epsilon(2k-1)}`. Theirs is for a positive definite matrix
            and an error relative to :math:`\lambda_1`; a shift, which Lanczos does not see, extends it
            to any matrix. Applied to -A too, it bounds the unknown :math:`\lambda_d`. Where the
            Krylov space is exhausted, the value is exact, and this is ``value + absolute_residual``.
        subspace: with ``keep=True``, what the next search starts from: covectors ``(k, d)``,
            orthonormal: nine Ritz vectors, best first, and a direction to explore. Else ``None``.
    """

    value: float
    vector: Tensor
    absolute_residual: float
    products: int
    converged: bool
    upper_bound: float | None = None
    subspace: Tensor | None = None

    @property
    def relative_residual(self) -> float:
        """The residual over ``|value|``; zero where the value is."""
        return self.absolute_residual / abs(self.value) if self.value else 0.0

    @property
    def residual(self) -> float:
        """Deprecated: the absolute residual, whereas other results call the relative one so."""
        warn_renamed("Eigenpair.residual", "absolute_residual or relative_residual")
        return self.absolute_residual
