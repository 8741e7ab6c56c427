r"""`first_rise`: how far along a direction a loss stays at or below its start.

The share t of a step at which :math:`L(t) > L(0)` for the first time is bracketed. The mean slope
:math:`m(t) = (L(t)-L(0))/t` minus the slope at 0 is proportional to t on a quadratic, and on losses of
networks about a power of t over many decades. In logarithms it is interpolated for the root of m: a
quadratic takes three losses, and a network four to six.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass

__all__ = ["Rise", "first_rise"]

_BESIDE = 1 / 40
"""Relative distance of the trials on both sides of the expected root: their bracket is 5 % wide."""

_FARTHEST_BESIDE = 0.15
"""The largest such distance, while the expected root still moves."""

_WITHIN, _SURE = 0.98, 0.1
"""Width of the last bracket, and least distance of its ends from the expected root, in tolerances."""

_BLIND = 8
"""Factor by which to go on where nothing is expected."""

_FARTHEST = 1000
"""The largest factor to go outside of the distances tried."""

_POWERS = (0.5, 4.0)
"""Powers of t to extrapolate with. Between trials on both sides of the root any power will do."""

_UPHILL = 4
"""Losses above the start, at ever shorter distances, after which it may be where the loss rises."""


@dataclass(frozen=True)
class Rise:
    """Where a loss along a direction rises above its start.

    Attributes:
        share: the distance of the crossing, interpolated.
        low: the largest distance tried below it where the loss had not risen; 0 if there is none.
        high: the smallest distance tried where the loss had risen; infinity if there is none.
        passes: losses evaluated.
        depth: how far the loss fell below its start at most, at the distances tried.
    """

    share: float
    low: float
    high: float
    passes: int
    depth: float = 0.0


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
    (2.0, 4)
    """
    slopes = {} if slope is None else {0.0: slope}
    low, high, spent, depth = 0.0, math.inf, 0, 0.0
    t, last, widths = start, None, [math.inf]
    while spent < passes and 0 < t < math.inf:
        slopes[t] = (loss_at(t) - base) / t
        spent, depth = spent + 1, max(depth, -slopes[t] * t)
        risen = not slopes[t] <= 0  # as a loss that is not a number
        low, high = (low, min(high, t)) if risen else (max(low, t), high)
        if low > 0 and 1 - low / high < tol:
            break
        if low == 0 and spent >= _UPHILL and _rises(slopes):
            break
        widths.append(high / low if low > 0 else math.inf)
        # An expectation that has not narrowed the bracket in two trials is not followed in the next.
        stalled = len(widths) > 2 and math.sqrt(widths[-3]) < widths[-1] < math.inf
        root = None if stalled else _root(slopes, low, high)
        certain = last is not None and root is not None and abs(math.log(root / last)) < 2 * _BESIDE
        moved = 0.0 if last is None or root is None else abs(math.log(root / last)) / 2
        near = certain or last is None or passes - spent <= 2
        offset = _BESIDE if near else min(max(moved, _BESIDE), _FARTHEST_BESIDE)
        t, last = _next(root, low, high, offset, tol, slopes), root
    root = _root(slopes, low, high) if 0 < low < high < math.inf else low or high
    return Rise(math.sqrt(low * high) if root is None else root, low, high, spent, depth)


def _rises(slopes: dict[float, float]) -> bool:
    """Whether the mean slopes at the smallest two distances point to a slope at 0 that is not below."""
    finite = sorted((t, slope) for t, slope in slopes.items() if math.isfinite(slope))
    if len(finite) < 2:
        return False  # with more of them not finite, the start may be below a wall
    (first, one), (second, two) = finite[:2]
    return not one - first * (two - one) / (second - first) < 0


def _next(
    root: float | None, low: float, high: float, offset: float, tol: float, tried: Container[float]
) -> float:
    """Return the next distance to try: beyond the expected root as seen from the closer end."""
    if root is not None:
        # From an end this close to the root, a trial beyond it makes the bracket as narrow as asked.
        ends = low / (1 - _WITHIN * tol), high * (1 - _WITHIN * tol)
        if low > 0 and ends[0] > root * (1 + _SURE * tol):
            t = ends[0]
        elif high < math.inf and ends[1] < root * (1 - _SURE * tol):
            t = ends[1]
        elif low > 0 and (high == math.inf or high / root > root / low):
            t = root * (1 + offset)
        else:
            t = root * (1 - offset)
        t = min(max(t, high / _FARTHEST if high < math.inf else 0.0), low * _FARTHEST or math.inf)
        if low < t < high and t not in tried:
            return t
    if low == 0:
        return high / _BLIND
    return low * _BLIND if high == math.inf else math.sqrt(low * high)


def _root(slopes: dict[float, float], low: float, high: float) -> float | None:
    """Return where the mean slope is expected to be zero, inside of the bracket."""
    known = sorted((t, m) for t, m in slopes.items() if math.isfinite(m))
    first = _slope_at_start(known)
    if first is None:
        return None
    # Logarithms of t, and of the mean slope's rise over the one it takes to reach zero.
    points = [(math.log(t), math.log1p(-m / first)) for t, m in known if t > 0 and m > first]
    below, above = [p for p in points if p[1] <= 0][-1:], [p for p in points if p[1] > 0][:1]
    if below and above:
        at = _interpolated(below[0], above[0], points)
    elif points:
        at = _extrapolated(sorted(points, key=lambda p: abs(p[1])))
    else:
        return None
    root = math.exp(at) if abs(at) < 700 else 0.0
    # It may be an end of the bracket, up to rounding.
    inside = low * (1 - _BESIDE) < root < high * (1 + _BESIDE)
    return min(max(root, low), high) if inside else None


def _slope_at_start(known: list[tuple[float, float]]) -> float | None:
    """Return the slope at 0 from the line through the first two mean slopes, if it is downhill."""
    if len(known) < 2:
        return known[0][1] if known and known[0][0] == 0 and known[0][1] < 0 else None
    (first, one), (second, two) = known[:2]
    slope = one - first * (two - one) / (second - first)
    if one < 0:
        slope = min(slope, one if first == 0 else 1.02 * one)
    return slope if slope < 0 else None


def _interpolated(
    below: tuple[float, float], above: tuple[float, float], points: list[tuple[float, float]]
) -> float:
    """Return the logarithm at which the rise is 0: by a parabola of it if that is inside, or a line."""
    (x, y), (other, rise) = below, above
    line = x - y * (other - x) / (rise - y)
    rest = [p for p in points if p not in (below, above)]
    if rest:
        third = min(rest, key=lambda p: abs(p[0] - line))
        at, (a, b, c) = 0.0, (below, above, third)
        if len({a[1], b[1], c[1]}) == 3:
            for (p, q), (_, r), (_, s) in ((a, b, c), (b, c, a), (c, a, b)):
                at += p * r * s / ((q - r) * (q - s))
            if x < at < other:
                return at
    return line


def _extrapolated(points: list[tuple[float, float]]) -> float:
    """Return the logarithm at which the rise is 0, beyond ``points``, the closest first."""
    (x, y), power = points[0], 1.0
    if len(points) > 1:
        other, rise = points[1]
        power = min(max((rise - y) / (other - x), _POWERS[0]), _POWERS[1])
    return x - y / power
