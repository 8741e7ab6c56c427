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
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["StartPolynomials"]

_FARTHEST, _POINTS = 1e3, 64
"""How far a bound is sought above the largest Ritz value, relative to the scale of the numbers, and at
how many points: two rounds find the distance to 1 %."""


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
    """

    size: int
    rows: tuple[_Row, ...] = ()

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
        rows = torch.ones(1, len(points), dtype=torch.float64)
        largest = rows[0]
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
