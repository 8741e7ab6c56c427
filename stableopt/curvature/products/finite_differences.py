r"""Derivatives of a gradient by central differences, for models without a second derivative.

.. math:: D_h = \frac{g(h) - g(-h)}{2h} = g'(0) + \frac{h^2}6 g'''(0) + \dots

The step h weighs rounding, :math:`\sigma/(\sqrt2 h)`, against the cubic term. :math:`\sigma` is seen in
third differences of g over points so near that all else vanishes in them (Moré & Wild, *Estimating
computational noise*, 2011); from a first guess h is then moved, fourfold at a time, to where two
neighbouring steps agree best. How far they disagree is the error that is reported, and beyond a tenth
nothing is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CentralDifferences", "DifferenceError"]

Along = Callable[[float], Tensor]
"""The gradient ``(d,)`` at a distance from the point, along one direction."""

_ROUNDINGS = 32
"""Spacing of the points that show the noise, in roundings of the parameters."""

_FACTOR = 4.0
"""Between neighbouring steps."""

_RUNGS = 6
"""Steps looked at, at most, beyond the first two."""

_TOLERATED = 0.1
"""Relative disagreement of two steps beyond which a difference says nothing."""


class DifferenceError(RuntimeError):
    """Central differences at two steps disagree: the gradient jumps, or is mostly noise."""


class CentralDifferences:
    """Derivatives along directions, with one step for all of them.

    Attributes:
        step: h; ``None`` before the first derivative, along which it is chosen.
        error: the largest disagreement with a second step that was seen, relative to the largest
            derivative. It is looked for at the first derivative, the second, the fourth, and so on.

    >>> differences = CentralDifferences()
    >>> at = torch.ones(1, dtype=torch.float64)
    >>> slope = differences.along(lambda h: (at + h).exp(), size=1.0)
    >>> abs(float(slope) - math.e) < 1e-8, differences.error < 1e-8
    (True, True)
    """

    def __init__(self) -> None:
        self.step: float | None = None
        self.error = 0.0
        self._largest = 0.0
        self._count = 0

    def along(self, gradient: Along, size: float) -> Tensor:
        """Return the derivative of ``gradient`` at distance 0.

        Args:
            gradient: the gradient along a direction of norm 1.
            size: the norm of the parameters, against which a step is small.

        Raises:
            DifferenceError: if a second step disagrees by a tenth.
        """
        self._count += 1
        if self.step is None:
            self.step, slope, second = _chosen(gradient, size or 1.0)
        else:
            slope = _difference(gradient, self.step)
            # At every product it would double the price.
            checked = self._count & (self._count - 1) == 0
            second = _difference(gradient, 2 * self.step) if checked else slope
        # A vector that the matrix takes to nearly nothing leaves nothing but rounding.
        self._largest = max(self._largest, float(slope.norm()))
        disagreement = float((slope - second).norm())
        if disagreement > 0:
            relative = disagreement / self._largest if self._largest > 0 else math.inf
            self.error = max(self.error, relative)
        if self.error > _TOLERATED:
            raise DifferenceError(
                f"differences of the gradient at two steps disagree by {self.error:.0%}: it jumps, or"
                " is mostly noise. Measure in double precision by dtype=torch.float64, or on a smooth"
                " twin of the model"
            )
        return slope


def _difference(gradient: Along, step: float) -> Tensor:
    return (gradient(step) - gradient(-step)) / (2 * step)


def _noise(gradient: Along, size: float) -> float:
    r"""Return the norm of the rounding errors in one gradient.

    The k-th difference of independent errors of variance :math:`\sigma^2` has
    :math:`\binom{2k}k\sigma^2`: 20 for k = 3.
    """
    spacing = _ROUNDINGS * size * torch.finfo(gradient(0.0).dtype).eps
    first, second, third, fourth = (gradient(j * spacing) for j in range(4))
    rounding = torch.finfo(first.dtype).eps * float(first.norm())
    spread = float((fourth - 3 * third + 3 * second - first).norm())
    return max(spread / math.sqrt(20), rounding)


def _chosen(gradient: Along, size: float) -> tuple[float, Tensor, Tensor]:
    """Return a step, the difference over it, and that over a neighbouring one."""
    noise, eps = _noise(gradient, size), torch.finfo(gradient(0.0).dtype).eps
    step = size * eps ** (1 / 3)
    low, high = _difference(gradient, step), _difference(gradient, _FACTOR * step)
    best = (float((high - low).norm()), step, low, high)
    # What disagrees by more than noise does so by the cubic term: a smaller step.
    downwards = best[0] > 2 * noise / step
    for _ in range(_RUNGS):
        # Along a direction without a cubic term it would grow for ever.
        if not downwards and noise / step < eps ** (2 / 3) * float(low.norm()):
            break
        if downwards:
            step /= _FACTOR
            low, high = _difference(gradient, step), low
        else:
            step *= _FACTOR
            low, high = high, _difference(gradient, _FACTOR * step)
        found = (float((high - low).norm()), step, low, high)
        if not found[0] < best[0]:
            break
        best = found
    disagreement, step, low, high = best
    if noise / step > disagreement / 2:
        return _FACTOR * step, high, low
    return step, low, high
