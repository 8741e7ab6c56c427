r"""`first_rise`: how far along a direction a loss stays at or below its start.

The share t of a step at which :math:`L(t) > L(0)` for the first time is bracketed by doubling or halving
and then bisected. The mean slope :math:`(L(t)-L(0))/t` is a straight line of t on a quadratic, so that
two losses give its root: trials on both sides of the root replace most bisections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass

__all__ = ["Rise", "first_rise"]

_BESIDE = 1 / 40
"""Relative distance of the trials on both sides of the expected root: their bracket is 5 % wide."""

_UPHILL = 4
"""Losses above the start, at ever shorter distances, after which it may be where the loss rises."""


@dataclass(frozen=True)
class Rise:
    """Where a loss along a direction rises above its start.

    Attributes:
        share: the distance of the crossing, from the line through both ends of the bracket.
        low: the largest distance tried below it where the loss had not risen; 0 if there is none.
        high: the smallest distance tried where the loss had risen; infinity if there is none.
        passes: losses evaluated.
    """

    share: float
    low: float
    high: float
    passes: int


def first_rise(
    loss_at: Callable[[float], float],
    base: float,
    start: float,
    *,
    tol: float,
    passes: int,
    slope: float | None = None,
) -> Rise:
    """Bracket the first crossing until ``1 - low / high < tol``, or ``passes`` losses are spent.

    It gives up where the loss rises from the start.

    Args:
        loss_at: the loss at a distance. A loss that is not finite has risen.
        base: the loss at distance 0.
        start: the first distance tried.
        tol: the relative width of the bracket.
        passes: the largest number of losses.
        slope: the slope of the loss at distance 0, where known.

    >>> rise = first_rise(lambda t: (t - 1) ** 2, 1.0, 0.7, tol=1 / 16, passes=10)
    >>> round(rise.share, 6), rise.passes      # the loss is back at its start at t = 2
    (2.0, 5)
    """
    slopes = {} if slope is None else {0.0: slope}
    low, high, spent = 0.0, math.inf, 0
    t, expected, farthest = start, None, 2.0
    while spent < passes and 0 < t < math.inf:
        slopes[t] = (loss_at(t) - base) / t
        spent += 1
        risen = not slopes[t] <= 0  # as a loss that is not a number
        low, high = (low, min(high, t)) if risen else (max(low, t), high)
        if low > 0 and 1 - low / high < tol:
            break
        if low == 0 and spent >= _UPHILL and _rises(slopes):
            break
        # A line that was wrong, as where the loss bends between the ends, is not asked twice.
        line = None if expected not in (None, risen) else _line(slopes, low, high)
        t, expected = _next(line, low, high, slopes, farthest)
        farthest *= 1.0 if 0 < low < high < math.inf else 2.0
    return Rise(_root(slopes, low, high), low, high, spent)


def _rises(slopes: dict[float, float]) -> bool:
    """Whether the mean slopes at the smallest two distances point to a slope at 0 that is not below."""
    finite = sorted((t, slope) for t, slope in slopes.items() if math.isfinite(slope))
    if len(finite) < 2:
        return False  # with more of them not finite, the start may be below a wall
    (first, one), (second, two) = finite[:2]
    return not one - first * (two - one) / (second - first) < 0


def _next(
    line: float | None, low: float, high: float, tried: Container[float], farthest: float
) -> tuple[float, bool | None]:
    """Return the next distance to try, and whether the loss is expected to have risen there.

    Args:
        line: the crossing by a line through two losses, or ``None`` for none.
        low: the lower end of the bracket.
        high: the upper end.
        tried: the distances tried before.
        farthest: the largest factor to go outside of the distances tried.
    """
    if low == 0:
        blind = high / 2  # a bracket from 0 on has no relative width
    elif high == math.inf:
        blind = 2 * low
    else:
        blind = (low + high) / 2
    if line is not None:
        # First beyond the crossing as seen from the closer end.
        sides = (1 + _BESIDE, True), (1 - _BESIDE, False)
        for factor, risen in sides if 2 * line < low + high else reversed(sides):
            t = min(max(factor * line, high / farthest), low * farthest or math.inf)
            if low < t < high and t not in tried:
                return t, risen if t == factor * line else None
    return blind, None


def _line(slopes: dict[float, float], low: float, high: float) -> float | None:
    """Return where the line through the mean slopes at the two closest distances is zero."""
    finite = [t for t in slopes if math.isfinite(slopes[t])]
    near = [t for t in (low, high) if t in finite]
    if len(near) < 2:
        end = low or high
        near = sorted(finite, key=lambda t: abs(t - end))[:2]
    if len(near) < 2:
        return None
    first, second = sorted(near)
    rise = slopes[second] - slopes[first]
    if not rise > 0:
        return None
    root = first - slopes[first] * (second - first) / rise
    return root if 0 < root < math.inf else None


def _root(slopes: dict[float, float], low: float, high: float) -> float:
    """Return the crossing: inside of the bracket where there is one, else its known end."""
    if low == 0 or high == math.inf:
        return low or high
    root = _line(slopes, low, high)
    return (low + high) / 2 if root is None else min(max(root, low), high)
