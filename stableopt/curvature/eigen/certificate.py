r"""`StartPolynomials`: the probability that a search has missed an eigenvalue above a given point.

Every vector of a Lanczos basis is a polynomial of A times the start, :math:`q_j = p_j(A)\,q_1`. The
Lanczos recurrence gives the :math:`p_j`. An eigenvector u of A with the eigenvalue :math:`\lambda`,
whose component in the start is :math:`w = |u^\top q_1|`, therefore has :math:`|u^\top q_j| =
|p_j(\lambda)|\,w`. The basis is orthonormal, so

.. math::

    w^2\,K(\lambda) \le 1, \qquad K(\lambda) = \textstyle\sum_j p_j(\lambda)^2

(1/K is the Christoffel function of the start's spectral measure). For a start uniform on the sphere,
:math:`P(w \le t) \le t\sqrt{2d/\pi}`. K increases above all Ritz values, so the search has missed an
eigenvalue at or above :math:`\lambda` with probability at most :math:`\sqrt{2d/(\pi K(\lambda))}`. This
holds for any spectrum, after any number of products, and through restarts. It also holds for a search
that stops when the bound is small enough, because the bound is on the start alone. The bounds of
Kuczyński & Woźniakowski (1992) replace the :math:`p_j` by Chebyshev polynomials, the worst case of all
spectra.

Where a basis spans an invariant subspace up to rounding, the search continues with a new random
direction. That is an independent start: its probability multiplies the first one's.

A single start finds at most one eigenvector of each eigenvalue. :class:`Deflation` bounds *every*
eigenvalue by a second start, uniform on the complement of the basis Q. With :math:`T = Q^\top AQ`, B the
compression of A to the complement and :math:`\lambda_{\max}(B) \le b < x`, A has at most as many
eigenvalues above x as

.. math:: T + C^\top (xI - B)^{-1} C \preceq T + \frac{C^\top C}{x - b}

(Haynsworth's inertia theorem, 1968), where C is the component of AQ orthogonal to Q. The last term is
a squared residual over a gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Deflation", "StartPolynomials"]

_FARTHEST, _POINTS = 1e3, 64
"""Largest distance of a bound above the largest Ritz value, relative to the scale of the numbers, and
the number of distances tried: two rounds find the distance to 1 %."""


_APART, _BEYOND = -8, 17
"""Power of ten of the smallest distance of a bound above b, relative to the scale of the numbers, and
the number of distances tried up to 1."""


class _Row(NamedTuple):
    column: Tensor
    beta: float
    weights: Tensor | None
    fresh: bool


@dataclass(frozen=True)
class StartPolynomials:
    """The recurrence of a Lanczos search, to be evaluated at points above its Ritz values.

    Attributes:
        size: the dimension d.
        rows: the recurrence, one entry for each row added to the basis after the start.
        deflated: rows of the basis before the start. The start and all products are orthogonal to them:
            the operator is then A's compression to their complement.
    """

    size: int
    rows: tuple[_Row, ...] = ()
    deflated: int = 0

    def extended(
        self, column: Tensor, beta: float, *, weights: Tensor | None = None, fresh: bool = False
    ) -> StartPolynomials:
        """Return the recurrence with one more row, ``(A q - basis @ column) / beta``.

        Args:
            column: coordinates of ``A q`` in the basis, whose last row is q.
            beta: the norm of the new row before division, or its rounding error if that is larger.
            weights: ``(k, rows)``, if these combinations replace the rows before the new one.
            fresh: whether the new row is instead a random direction orthogonal to the basis.
        """
        return replace(self, rows=(*self.rows, _Row(column, beta, weights, fresh)))

    def missed(self, points: Tensor) -> Tensor:
        """Bound the probability that there is an eigenvalue at or above each of ``points`` ``(n,)``.

        The points are above all Ritz values.
        """
        values = torch.zeros(self.deflated + 1, len(points), dtype=torch.float64, device="cpu")
        values[-1] = 1.0
        largest = values[-1]
        probability = torch.ones_like(points)
        for column, beta, weights, fresh in self.rows:
            following = (points * values[-1] - column @ values) / beta
            # At overflow the sum becomes infinite, then NaN, which fmax ignores.
            largest = torch.fmax(largest, (values * values).sum(0) + following * following)
            if weights is not None:
                values = weights @ values
            if fresh:
                probability = probability * self._miss_probability(largest)
                largest = following = torch.ones_like(largest)
                values = torch.zeros_like(values)
            values = torch.cat([values, following[None]])
        return probability * self._miss_probability(largest)

    def upper_bound(
        self, largest: float, scale: float, uncertainty: float, nearest: float
    ) -> float | None:
        """Return a point above which an eigenvalue was missed with probability at most ``uncertainty``.

        Args:
            largest: the largest Ritz value.
            scale: the scale of the numbers. The bound is ``None`` if it would be far larger.
            uncertainty: the probability.
            nearest: the smallest distance of the bound from ``largest``.
        """
        low, high = math.log(nearest), math.log(_FARTHEST * scale)
        for _ in range(2):
            gaps = torch.linspace(low, high, _POINTS, dtype=torch.float64, device="cpu").exp()
            too_likely = self.missed(largest + gaps) > uncertainty
            if bool(too_likely[-1]):
                return None
            first = int(too_likely.sum())  # K increases: points that are too likely come first
            if first == 0:
                break
            low, high = (float(gap.log()) for gap in gaps[first - 1 : first + 1])
        return largest + float(gaps[first])

    def _miss_probability(self, christoffel_sum: Tensor) -> Tensor:
        return (2 * self.size / (math.pi * christoffel_sum)).sqrt().clamp(max=1.0)


@dataclass(frozen=True)
class Deflation:
    """An operator's projection on a basis Q, and its products' components outside Q.

    Attributes:
        projected: T ``(m, m)``.
        images_outside: one matrix ``(w, n)`` for each set of w orthonormal directions outside Q: the
            components of A q along them, for the first n rows q.
    """

    projected: Tensor
    images_outside: tuple[Tensor, ...]

    def eigenvalues(self, count: int) -> Tensor:
        """Return the largest eigenvalues of T ``(count,)``, largest first."""
        values: Tensor = torch.linalg.eigvalsh(self.projected)
        return values.flip(0)[:count]

    def bounds(self, complement_bound: float, count: int, scale: float) -> Tensor:
        """Return upper bounds of the ``count`` largest eigenvalues of A, largest first.

        At any point x above b, the larger of x and the j-th eigenvalue of T + C^T C / (x - b) bounds the
        j-th eigenvalue of A. The smallest bound over several points is returned.

        Args:
            complement_bound: b, at least the largest eigenvalue of B.
            count: the number of bounds.
            scale: the scale of the numbers.
        """
        gram = torch.zeros_like(self.projected)
        # Directions of different sets need not be orthogonal: |a + b|^2 <= 2 |a|^2 + 2 |b|^2.
        sets = len(self.images_outside)
        for images in self.images_outside:
            gram[: images.shape[1], : images.shape[1]] += sets * (images.T @ images)
        gaps = scale * torch.logspace(_APART, 0, _BEYOND, dtype=torch.float64, device="cpu")
        values = self.eigenvalues(count)
        nearest = complement_bound + gaps
        points = torch.cat([values[values > nearest[0]], nearest])
        shifted = self.projected + gram / (points - complement_bound)[:, None, None]
        shifted_values = torch.linalg.eigvalsh(shifted).flip(1)[:, :count]
        bounds: Tensor = torch.maximum(shifted_values, points[:, None]).amin(0)
        return bounds
