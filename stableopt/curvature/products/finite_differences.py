r"""`CentralDifferences`: derivatives of a gradient for models without a second derivative.

.. math:: D_h = \frac{g(h) - g(-h)}{2h} = g'(0) + \frac{h^2}6 g'''(0) + \dots

The step h balances rounding, :math:`\sigma/(\sqrt2 h)`, against the cubic term. The noise
:math:`\sigma` is estimated from third differences of g at points so close that only noise differs (Moré
& Wild, *Estimating computational noise*, 2011). From a first guess, h moves by factors of four to where
two neighbouring steps agree best. Their disagreement is the reported error; above a tenth, an error is
raised.

With ReLU or max-pooling the gradient jumps at kinks. Differences over long steps then agree on an
average over many smooth pieces, which is not the Hessian. With ``kinks``, steps start short, and every
difference is checked by the second difference :math:`|g(h) - 2g(0) + g(-h)|/2h`, which vanishes with h
where g is smooth and contains the jumps elsewhere. The step shrinks until there are none.
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
"""Spacing of the points that measure the noise, in roundings of the parameters."""

_FACTOR = 4.0
"""Ratio of neighbouring steps."""

_RUNGS = 6
"""Most steps tried after the first two."""

_TOLERATED = 0.1
"""Relative disagreement of two steps above which :class:`DifferenceError` is raised."""

_SHORT, _SHORTEST = 1e-6, 1e-11
"""First and shortest step with kinks, relative to the point, in double precision. Over the shortest,
rounding is 1e-4 of a difference."""

_JUMP_FREE = 1e-4
"""Relative size of the second difference up to which a step crosses no kink."""


class CentralDifferences:
    """Derivatives along directions, all with the same step.

    Args:
        kinks: whether the gradient has jumps. It must then be in double precision, and a derivative
            takes at least three gradients.

    Attributes:
        step: h; ``None`` before the first derivative, which chooses it.
        error: the largest disagreement with a second step, relative to the largest derivative. The
            first, second, fourth, eighth derivative and so on have a second step. With ``kinks``, the
            second difference also checks every derivative.

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
        self._largest_norm: Tensor | None = None  # of a derivative, on the device
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
        # A derivative much smaller than the largest is mostly rounding: errors are relative to the
        # largest.
        self._largest_norm = self._largest_norm_with(slope)
        if disagreement > 0:
            largest = float(self._largest_norm)
            relative = disagreement / largest if largest > 0 else math.inf
            self.error = max(self.error, relative)
        # Negated, so that NaN raises too.
        if not self.error <= _TOLERATED:
            raise DifferenceError(
                f"differences of the gradient at two steps disagree by {self.error:.0%}: the gradient"
                " jumps, or is mostly noise. Measure in double precision by dtype=torch.float64, or on a"
                " smooth twin of the model"
            )
        return slope

    def _largest_norm_with(self, slope: Tensor) -> Tensor:
        """Return the largest norm of a derivative so far, including ``slope``."""
        norm = slope.norm()
        return norm if self._largest_norm is None else torch.fmax(self._largest_norm.to(norm), norm)

    @property
    def _has_second_step(self) -> bool:
        """Whether this derivative has a second step: the first, second, fourth, eighth and so on."""
        return self._count & (self._count - 1) == 0

    def _smooth(self, gradient: Along, size: float) -> tuple[Tensor, float]:
        """Return the derivative, and its distance from that over a second step, if any; else 0."""
        if self.step is None:
            self.step, slope, second = _choose_step(gradient, size)
            return slope, float((slope - second).norm())
        slope = central_difference(gradient, self.step)
        if not self._has_second_step:  # a second step doubles the cost
            return slope, 0.0
        second = central_difference(gradient, 2 * self.step)
        return slope, float((slope - second).norm())

    def _between_kinks(self, gradient: Along, size: float) -> tuple[Tensor, float]:
        """Return the derivative over the step with the smallest jump, and that jump."""
        center = gradient(0.0)

        def difference(step: float) -> tuple[Tensor, float]:
            ahead, behind = gradient(step), gradient(-step)
            jump = float(((ahead - center) + (behind - center)).norm())
            return (ahead - behind) / (2 * step), jump / (2 * step)

        best: tuple[Tensor, float] | None = None
        step = self.step = self.step or _SHORT * size
        while True:
            slope, jump = difference(step)
            accepted = _JUMP_FREE * float(self._largest_norm_with(slope))
            if jump <= accepted and self._has_second_step:
                # Jumps on both sides may cancel in the second difference.
                shorter_slope, shorter_jump = difference(step / _FACTOR)
                jump = max(jump, shorter_jump, float((slope - shorter_slope).norm()))
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
    third_difference = float((fourth - 3 * third + 3 * second - first).norm())
    return max(third_difference / math.sqrt(20), rounding)


def _choose_step(gradient: Along, size: float) -> tuple[float, Tensor, Tensor]:
    """Return a step, the difference over it, and the difference over a neighbouring step."""
    noise, eps = _noise(gradient, size), torch.finfo(gradient(0.0).dtype).eps

    def difference(step: float) -> Tensor:
        return central_difference(gradient, step)

    step = size * eps ** (1 / 3)
    low, high = difference(step), difference(_FACTOR * step)
    best = (float((high - low).norm()), step, low, high)
    # Disagreement beyond the noise comes from the cubic term: take a smaller step.
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
        candidate = (float((high - low).norm()), step, low, high)
        if not candidate[0] < best[0]:
            break
        best = candidate
    disagreement, step, low, high = best
    if noise / step > disagreement / 2:
        return _FACTOR * step, high, low
    return step, low, high
