"""`Search` and `Eigenpair`: options and result of a search for the largest eigenvalue."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from stableopt._support.deprecation import warn_renamed
from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.curvature.operator import Operator

__all__ = ["UNCERTAINTY", "Eigenpair", "Search"]

UNCERTAINTY = 0.002
"""Probability that a largest eigenvalue lies above its ``upper_bound``."""

GAP = 0.05
"""Distance above the value, relative to it. A search from a random start ends once an eigenvalue that
far above is ruled out. At 0.03 it takes about one product more."""

_MISS_PER_DIMENSION = 1e-6
"""Largest probability of a miss per dimension, below 2,000 dimensions, where products are cheap. One of
1,001 small networks (d = 76) drew a start with a component of 1e-5 along the top eigenvector."""


@dataclass(frozen=True)
class Search:
    """Operator, inner product and options of a search; see the arguments of ``top_eigenpair``."""

    operator: Operator
    inner: InnerProduct
    tol: float
    seed: int
    keep: bool
    most_vectors: int

    def is_small(self, residual: float, value: float, scale: float) -> bool:
        """Return whether the residual is at most ``tol`` times the value, or both are rounding."""
        # A value below the rounding of the products cannot be distinguished from zero.
        floor = 10 * torch.finfo(self.operator.dtype).eps * scale
        return residual <= self.tol * abs(value) or max(residual, abs(value)) <= floor

    def is_unlikely(self, miss_probability: float) -> bool:
        """Return whether a missed larger eigenvalue is improbable enough to end the search."""
        size = self.inner.whole_size(self.operator.shape[0])
        return miss_probability <= min(UNCERTAINTY, _MISS_PER_DIMENSION * size)

    def gap(self, value: float, scale: float) -> float:
        """Return the distance above ``value`` at which another eigenvalue must be ruled out."""
        eps = torch.finfo(self.operator.dtype).eps
        # Relative to a value that is zero up to rounding, every distance is rounding.
        return GAP * abs(value) if abs(value) > 10 * eps * scale else math.sqrt(eps) * scale


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
        converged: whether ``relative_residual`` is at most ``tol`` and, for a random start, an
            eigenvalue more than 5 % above ``value`` is ruled out, up to a probability of 0.002, or of
            1e-6 for each dimension where there are fewer than 2,000.
        upper_bound: an upper bound of the largest eigenvalue, wrong with probability at most 0.002
            over the random starts, for any spectrum. ``None`` for a start that is not uniform on the
            sphere (a given one, or with a preconditioner) and after a single product. It is the
            :math:`\lambda` with :math:`\sqrt{2d/(\pi K(\lambda))} = 0.002`, where
            :math:`K(\lambda) = \sum_j p_j(\lambda)^2` sums the search's orthonormal polynomials
            (:mod:`~stableopt.curvature.eigen.certificate`). If the Krylov space is exhausted, the
            value is exact and the bound is ``value + absolute_residual``, or the value plus rounding
            if that is larger.
        subspace: with ``keep=True``, the ``start`` of the next search: orthonormal covectors
            ``(k, d)``, nine Ritz vectors, best first, and a direction to explore. Else ``None``.
        covector: with a preconditioner, the covector r ``(d,)`` for which P r is along ``vector``.
    """

    value: float
    vector: Tensor
    absolute_residual: float
    products: int
    converged: bool
    upper_bound: float | None = None
    subspace: Tensor | None = None
    covector: Tensor | None = None

    @property
    def relative_residual(self) -> float:
        """The residual over ``|value|``; zero if the value is zero."""
        return self.absolute_residual / abs(self.value) if self.value else 0.0

    @property
    def residual(self) -> float:
        """Deprecated: the absolute residual. In other results, ``residual`` is relative."""
        warn_renamed("Eigenpair.residual", "absolute_residual or relative_residual")
        return self.absolute_residual
