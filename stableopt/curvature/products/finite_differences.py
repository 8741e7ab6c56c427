r"""`CentralDifferences`: derivatives of a gradient for models without a second derivative.

.. math:: D_h = \frac{g(h) - g(-h)}{2h} = g'(0) + \frac{h^2}6 g'''(0) + \dots

The step h balances rounding, :math:`\sigma/(\sqrt2 h)`, against the cubic term. :math:`\sigma` is
estimated from third differences of g over points so close that everything else vanishes in them (Moré &
Wild, *Estimating computational noise*, 2011). From a first guess, h then moves by factors of four to
where two neighbouring steps agree best. Their disagreement is the reported error; above a tenth the
difference is refused.

Behind ReLU or max-pooling the gradient jumps at kinks. Differences over long steps then agree with one
another on an average over many pieces, which is not the Hessian. With ``kinks`` steps start short, and
every difference is checked by the second one: :math:`|g(h) - 2g(0) + g(-h)|/2h` vanishes with h where g
is smooth, and holds the jumps otherwise. The step shrinks until they are gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from stableopt.curvature.autodiff import central_difference
from stableopt.curvature.errors import DifferenceError

__all__ = ["CentralDifferences", "DifferenceError"]

Along = Callable[[float], Tensor]
"""The gradient ``(d,)`` at a distance from the point, along one direction."""

_ROUNDINGS = 32
"""Spacing of the points that show the noise, in roundings of the parameters."""

_FACTOR = 4.0
"""Between neighbouring steps."""

_RUNGS = 6
"""The most steps tried beyond the first two."""

_TOLERATED = 0.1
"""Relative disagreement of two steps above which a difference is refused."""

_SHORT, _SHORTEST = 1e-6, 1e-11
"""Steps with kinks, relative to the point, in double precision. Rounding leaves 1e-4 of a difference
over the shortest."""

_JUMP_FREE = 1e-4
"""Relative size of the second difference at which the step stays as it is."""


class CentralDifferences:
    """Derivatives along directions, with one step for all of them.

    Args:
        kinks: whether the gradient jumps. It must then be in double precision, and a derivative takes
            at least three gradients.

    Attributes:
        step: h; ``None`` before the first derivative, which chooses it.
        error: the largest disagreement seen with a second step, relative to the largest derivative.
            The first derivative, the second, the fourth, and so on are checked; with ``kinks`` all, and
            these twice.

    >>> differences = CentralDifferences()
    >>> at = torch.ones(1, dtype=torch.float64)
    >>> slope = differences.along(lambda h: (at + h).exp(), size=1.0)
    >>> abs(float(slope) - math.e) < 1e-8, differences.error < 1e-8
    (True, True)
    """

    def __init__(self, *, kinks: bool = False) -> None:
        self.kinks = kinks
        self.step: float | None = None
        self.error = 0.0
        self._largest: Tensor | None = None  # the norm of the largest derivative, on the device
        self._count = 0

    def along(self, gradient: Along, size: float) -> Tensor:
        """Return the derivative of ``gradient`` at distance 0.

        Args:
            gradient: the gradient along a direction of norm 1.
            size: the norm of the parameters; steps are small relative to it.

        Raises:
            DifferenceError: if a second step disagrees by more than a tenth.
        """
        self._count += 1
        if self.kinks:
            slope, disagreement = self._between_kinks(gradient, size or 1.0)
        else:
            slope, disagreement = self._smooth(gradient, size or 1.0)
        # The product of a vector that the matrix nearly annihilates is all rounding.
        self._largest = self._largest_with(slope)
        if disagreement > 0:
            largest = float(self._largest)
            relative = disagreement / largest if largest > 0 else math.inf
            self.error = max(self.error, relative)
        # Written so that an error that is not a number is refused.
        if not self.error <= _TOLERATED:
            raise DifferenceError(
                f"differences of the gradient at two steps disagree by {self.error:.0%}: it jumps, or"
                " is mostly noise. Measure in double precision by dtype=torch.float64, or on a smooth"
                " twin of the model"
            )
        return slope

    def _largest_with(self, slope: Tensor) -> Tensor:
        """Return the norm of the largest derivative, that of ``slope`` included."""
        norm = slope.norm()
        return norm if self._largest is None else torch.fmax(self._largest.to(norm), norm)

    def _smooth(self, gradient: Along, size: float) -> tuple[Tensor, float]:
        """Return the derivative, and its distance from that over a second step, 0 if there is none."""
        if self.step is None:
            self.step, slope, second = _chosen(gradient, size)
            return slope, float((slope - second).norm())
        slope = central_difference(gradient, self.step)
        # Checking every product would double its cost.
        if self._count & (self._count - 1):
            return slope, 0.0
        second = central_difference(gradient, 2 * self.step)
        return slope, float((slope - second).norm())

    def _between_kinks(self, gradient: Along, size: float) -> tuple[Tensor, float]:
        """Return the derivative over the step that shows the least of a jump, and the jump over it."""
        center = gradient(0.0)
        checked = self._count & (self._count - 1) == 0

        def over(step: float) -> tuple[Tensor, float]:
            ahead, behind = gradient(step), gradient(-step)
            jump = float(((ahead - center) + (behind - center)).norm())
            return (ahead - behind) / (2 * step), jump / (2 * step)

        best: tuple[Tensor, float] | None = None
        step = self.step = self.step or _SHORT * size
        while True:
            slope, jump = over(step)
            accepted = _JUMP_FREE * float(self._largest_with(slope))
            if jump <= accepted and checked:
                # Jumps on both sides may cancel in the second difference.
                shorter, other = over(step / _FACTOR)
                jump = max(jump, other, float((slope - shorter).norm()))
            if best is None or jump < best[1]:
                best, self.step = (slope, jump), step
            if jump <= accepted or step <= _SHORTEST * size:
                return best
            step /= _FACTOR


def _noise(gradient: Along, size: float) -> float:
    r"""Return the norm of the rounding errors in one gradient.

    The k-th difference of independent errors of variance :math:`\sigma^2` has variance
    :math:`\binom{2k}k\sigma^2`: 20 for k = 3.
    """
    spacing = _ROUNDINGS * size * torch.finfo(gradient(0.0).dtype).eps
    first, second, third, fourth = (gradient(j * spacing) for j in range(4))
    rounding = torch.finfo(first.dtype).eps * float(first.norm())
    spread = float((fourth - 3 * third + 3 * second - first).norm())
    return max(spread / math.sqrt(20), rounding)


def _chosen(gradient: Along, size: float) -> tuple[float, Tensor, Tensor]:
    """Return a step, the difference over it, and the difference over a neighbouring step."""
    noise, eps = _noise(gradient, size), torch.finfo(gradient(0.0).dtype).eps

    def difference(step: float) -> Tensor:
        return central_difference(gradient, step)

    step = size * eps ** (1 / 3)
    low, high = difference(step), difference(_FACTOR * step)
    best = (float((high - low).norm()), step, low, high)
    # Disagreement beyond the noise comes from the cubic term and asks for a smaller step.
    downwards = best[0] > 2 * noise / step
    for _ in range(_RUNGS):
        # Along a direction without a cubic term the step would grow without bound.
        if not downwards and noise / step < eps ** (2 / 3) * float(low.norm()):
            break
        if downwards:
            step /= _FACTOR
            low, high = difference(step), low
        else:
            step *= _FACTOR
            low, high = high, difference(_FACTOR * step)
        found = (float((high - low).norm()), step, low, high)
        if not found[0] < best[0]:
            break
        best = found
    disagreement, step, low, high = best
    if noise / step > disagreement / 2:
        return _FACTOR * step, high, low
    return step, low, high
