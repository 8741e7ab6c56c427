r"""`StartPolynomials`: the probability that a search has missed an eigenvalue above a given point.

Every vector of a Lanczos basis is a polynomial of A times the start, :math:`q_j = p_j(A)\,q_1`, and the
search knows the :math:`p_j`: they are the recurrence that it runs. An eigenvector u of A with the
eigenvalue :math:`\lambda`, whose component in the start is :math:`w = |u^\top q_1|`, therefore has
:math:`|u^\top q_j| = |p_j(\lambda)|\,w`. The basis is orthonormal, so

.. math::

    w^2\,K(\lambda) \le 1, \qquad K(\lambda) = \textstyle\sum_j p_j(\lambda)^2

(1/K is the Christoffel function of the start's spectral measure). Uniformly on the sphere
:math:`P(w \le t) \le t\sqrt{2d/\pi}`. Beyond all Ritz values K rises, so a search from such a start has
missed an eigenvalue at or above :math:`\lambda` with probability at most
:math:`\sqrt{2d/(\pi K(\lambda))}`. This holds for any spectrum, after any number of products, and
through restarts. It also holds for a search that stops when the bound is small enough, because the bound
is on the start alone. The bounds of Kuczyński & Woźniakowski (1992) replace the :math:`p_j` by Chebyshev
polynomials, the worst case of all spectra.

Where a basis spans an invariant subspace up to rounding, the search goes on with a new random direction:
an independent start, whose probability multiplies the first one's.

No start finds two eigenvectors of one eigenvalue. :class:`Known` bounds *every* eigenvalue by a second
start, uniform on the complement of the basis Q. With :math:`T = Q^\top AQ`, B the compression of A to
the complement and :math:`\lambda_{\max}(B) \le b < x`, A has at most as many eigenvalues above x as

.. math:: T + C^\top (xI - B)^{-1} C \preceq T + \frac{C^\top C}{x - b}

(Haynsworth's inertia theorem, 1968), where C is what the images of Q have outside: a residual's square
over a gap.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Known", "StartPolynomials"]

_FARTHEST, _POINTS = 1e3, 64
"""How far a bound is sought above the largest Ritz value, relative to the scale of the numbers, and at
how many points: two rounds find the distance to 1 %."""


_APART, _BEYOND = -8, 17
"""Power of ten of the least distance of a bound from what bounds the complement, relative to the scale
of the numbers, and how many distances up to 1 are tried."""


class _Row(NamedTuple):
    column: Tensor
    beta: float
    weights: Tensor | None
    fresh: bool


@dataclass(frozen=True)
class StartPolynomials:
    """The recurrence of a Lanczos search, to be evaluated at points beyond its Ritz values.

    Attributes:
        size: the dimension d.
        rows: how the basis grew, row by row.
        deflated: rows of the basis before the start, to which it and all images are orthogonal: the
            operator is then A's compression to their complement.
    """

    size: int
    rows: tuple[_Row, ...] = ()
    deflated: int = 0

    def extended(
        self, column: Tensor, beta: float, *, weights: Tensor | None = None, fresh: bool = False
    ) -> StartPolynomials:
        """Return it for a basis that has grown by the row ``(A q - basis @ column) / beta``.

        Args:
            column: coordinates of ``A q`` in the basis so far, q its last row.
            beta: at least what rounding makes of a zero.
            weights: ``(k, held)``, if these combinations replace the rows before it.
            fresh: whether the new row is a random direction orthogonal to the basis after all.
        """
        return replace(self, rows=(*self.rows, _Row(column, beta, weights, fresh)))

    def missed(self, points: Tensor) -> Tensor:
        """Bound the probability that there is an eigenvalue at or above each of ``points`` ``(n,)``.

        The points are above all Ritz values.
        """
        rows = torch.zeros(self.deflated + 1, len(points), dtype=torch.float64)
        rows[-1] = 1.0
        largest = rows[-1]
        chances = torch.ones(len(points), dtype=torch.float64)
        for column, beta, weights, fresh in self.rows:
            following = (points * rows[-1] - column @ rows) / beta
            # At overflow a sum is infinite first, and afterwards not a number.
            largest = torch.fmax(largest, (rows * rows).sum(0) + following * following)
            if weights is not None:
                rows = weights @ rows
            if fresh:
                chances = chances * self._chance(largest)
                largest = following = torch.ones_like(largest)
                rows = torch.zeros_like(rows)
            rows = torch.cat([rows, following[None]])
        return chances * self._chance(largest)

    def upper_bound(
        self, largest: float, scale: float, uncertainty: float, nearest: float
    ) -> float | None:
        """Return a point above which an eigenvalue was missed with probability ``uncertainty`` at most.

        ``largest`` is the largest Ritz value, ``scale`` the size of the numbers, and ``nearest`` the
        least distance of the bound from it. ``None`` if the bound would be far beyond that size.
        """
        low, high = math.log(nearest), math.log(_FARTHEST * scale)
        for _ in range(2):
            gaps = torch.linspace(low, high, _POINTS, dtype=torch.float64).exp()
            likely = self.missed(largest + gaps) > uncertainty
            if bool(likely[-1]):
                return None
            first = int(likely.sum())  # K rises, so that the likely ones come first
            if first == 0:
                break
            low, high = (float(gap.log()) for gap in gaps[first - 1 : first + 1])
        return largest + float(gaps[first])

    def _chance(self, largest: Tensor) -> Tensor:
        return (2 * self.size / (math.pi * largest)).sqrt().clamp(max=1.0)


@dataclass(frozen=True)
class Known:
    """What is known of an operator inside a basis.

    Attributes:
        projected: T ``(m, m)``.
        outside: what the images of the basis have in directions outside it, one matrix ``(w, n)`` for
            each set of w orthonormal directions, of the first n rows.
    """

    projected: Tensor
    outside: tuple[Tensor, ...]

    def values(self, count: int) -> Tensor:
        """Return the largest eigenvalues of T ``(count,)``, largest first."""
        values: Tensor = torch.linalg.eigvalsh(self.projected)
        return values.flip(0)[:count]

    def bounds(self, outside: float, count: int, scale: float) -> Tensor:
        """Return upper bounds of the ``count`` largest eigenvalues of A, largest first.

        At any point x above b the larger of x and the j-th eigenvalue of the sum bounds the j-th
        eigenvalue of A. The least of several points counts.

        Args:
            outside: b, at least the largest eigenvalue of B.
            count: how many.
            scale: the size of the numbers.
        """
        gram = torch.zeros_like(self.projected)
        for rows in self.outside:  # which need not be orthogonal: |a + b|^2 <= 2 |a|^2 + 2 |b|^2
            gram[: rows.shape[1], : rows.shape[1]] += len(self.outside) * (rows.T @ rows)
        gaps = scale * torch.logspace(_APART, 0, _BEYOND, dtype=torch.float64)
        values = self.values(count)
        points = torch.cat([values[values > outside + gaps[0]], outside + gaps])
        shifted = self.projected + gram / (points - outside)[:, None, None]
        above = torch.linalg.eigvalsh(shifted).flip(1)[:, :count]
        found: Tensor = torch.maximum(above, points[:, None]).amin(0)
        return found
