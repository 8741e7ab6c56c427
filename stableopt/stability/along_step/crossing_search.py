r"""`first_rise`: brackets the distance at which a loss along a direction first exceeds its start.

The distance t is the root of the mean slope :math:`m(t) = (L(t)-L(0))/t`. On a quadratic
:math:`m(t)-m(0)` is proportional to t; on losses of networks it is about a power of t over many
decades. The search interpolates it in logarithms: a quadratic takes three losses, a network four to six.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from dataclasses import dataclass

__all__ = ["Rise", "first_rise"]

_BESIDE = 1 / 40
"""Relative distance of a trial from the expected root: trials on both sides leave a bracket of 5 %."""

_FARTHEST_WHILE_MOVING = 0.15
"""The largest such distance, used while the expected root still moves."""

_WITHIN, _SURE = 0.98, 0.1
"""Width of the last bracket, and smallest distance of its ends from the expected root, both relative to
the tolerance."""

_BLIND = 8
"""Factor from one trial to the next while no root is expected."""

_FARTHEST = 1000
"""Largest factor by which a trial may leave the range of the distances tried."""

_POWERS = (0.5, 4.0)
"""Smallest and largest power of t for extrapolation; interpolation needs no limits."""

_UPHILL = 4
"""Trials above the start, at ever shorter distances, after which the loss may rise from the start."""


@dataclass(frozen=True)
class Rise:
    """The distance at which a loss along a direction first exceeds its start.

    Attributes:
        share: the interpolated distance.
        low: the largest distance tried, below the crossing, without a rise; 0 if there is none.
        high: the smallest distance tried with a rise; infinity if there is none.
        passes: the number of losses evaluated.
        depth: the largest fall of the loss below its start, over the distances tried.
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
    """Bracket the first crossing until ``1 - low / high < tol``, or ``passes`` losses are evaluated.

    The search ends early if the loss rises from the start.

    Args:
        loss_at: the loss at a distance. A loss that is not finite counts as a rise.
        base: the loss at distance 0.
        start: the first distance to try.
        tol: the largest relative width of the bracket.
        passes: the largest number of losses.
        slope: the slope of the loss at distance 0, if known.

    >>> rise = first_rise(lambda t: (t - 1) ** 2, 1.0, 0.7, tol=1 / 16, passes=10)
    >>> round(rise.share, 6), rise.passes      # the loss is back at its start at t = 2
    (2.0, 4)
    """
    slopes = {} if slope is None else {0.0: slope}  # mean slopes by distance
    low, high, spent, depth = 0.0, math.inf, 0, 0.0
    t, last_root, ratios = start, None, [math.inf]
    while spent < passes and 0 < t < math.inf:
        slopes[t] = (loss_at(t) - base) / t
        spent, depth = spent + 1, max(depth, -slopes[t] * t)
        if slopes[t] <= 0:
            low = max(low, t)
        else:  # risen, or not a number
            high = min(high, t)
        if low > 0 and 1 - low / high < tol:
            break
        if low == 0 and spent >= _UPHILL and _rises_from_start(slopes):
            break
        ratios.append(high / low if low > 0 else math.inf)
        # If two trials have not halved the bracket in logarithms, the next one bisects it.
        stalled = len(ratios) > 2 and math.sqrt(ratios[-3]) < ratios[-1] < math.inf
        root = None if stalled else _expected_root(slopes, low, high)
        offset = _BESIDE
        if last_root is not None and root is not None and passes - spent > 2:
            moved = abs(math.log(root / last_root))
            if moved >= 2 * _BESIDE:
                offset = min(moved / 2, _FARTHEST_WHILE_MOVING)
        t, last_root = _next_distance(root, low, high, offset, tol, slopes), root
    root = _expected_root(slopes, low, high) if 0 < low < high < math.inf else low or high
    return Rise(math.sqrt(low * high) if root is None else root, low, high, spent, depth)


def _rises_from_start(slopes: dict[float, float]) -> bool:
    """Whether the line through the two mean slopes nearest to 0 is not negative at 0."""
    finite = sorted((t, slope) for t, slope in slopes.items() if math.isfinite(slope))
    if len(finite) < 2:
        return False  # the loss may fall at distances below those where it is not finite
    return not _line_at_zero(*finite[:2]) < 0


def _line_at_zero(first: tuple[float, float], second: tuple[float, float]) -> float:
    """Return the value at 0 of the line through two points."""
    (x1, y1), (x2, y2) = first, second
    return y1 - x1 * (y2 - y1) / (x2 - x1)


def _next_distance(
    root: float | None, low: float, high: float, offset: float, tol: float, tried: Container[float]
) -> float:
    """Return the next distance to try: beyond the expected root, seen from the closer end."""
    if root is not None:
        # If an end is so close to the root, a trial just beyond the root completes the bracket.
        from_low, from_high = low / (1 - _WITHIN * tol), high * (1 - _WITHIN * tol)
        if low > 0 and from_low > root * (1 + _SURE * tol):
            t = from_low
        elif high < math.inf and from_high < root * (1 - _SURE * tol):
            t = from_high
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


def _expected_root(slopes: dict[float, float], low: float, high: float) -> float | None:
    """Return the expected root of the mean slope, if it is in the bracket; else ``None``."""
    finite = sorted((t, slope) for t, slope in slopes.items() if math.isfinite(slope))
    slope_at_start = _slope_at_start(finite)
    if slope_at_start is None:
        return None
    # Points (log t, log of the mean slope's rise since 0 in units of the rise to the root).
    points = [
        (math.log(t), math.log1p(-slope / slope_at_start))
        for t, slope in finite
        if t > 0 and slope > slope_at_start
    ]
    below, above = [p for p in points if p[1] <= 0], [p for p in points if p[1] > 0]
    if below and above:
        log_root = _interpolated(below[-1], above[0], points)
    elif points:
        log_root = _extrapolated(sorted(points, key=lambda p: abs(p[1])))
    else:
        return None
    root = math.exp(log_root) if abs(log_root) < 700 else 0.0
    # Rounding can move a root at an end out of the bracket.
    inside = low * (1 - _BESIDE) < root < high * (1 + _BESIDE)
    return min(max(root, low), high) if inside else None


def _slope_at_start(finite: list[tuple[float, float]]) -> float | None:
    """Return the slope at 0 by the line through the first two mean slopes; ``None`` if not below 0."""
    if len(finite) < 2:
        return finite[0][1] if finite and finite[0][0] == 0 and finite[0][1] < 0 else None
    slope = _line_at_zero(*finite[:2])
    distance, nearest = finite[0]
    if nearest < 0:
        slope = min(slope, nearest if distance == 0 else 1.02 * nearest)
    return slope if slope < 0 else None


def _interpolated(
    below: tuple[float, float], above: tuple[float, float], points: list[tuple[float, float]]
) -> float:
    """Return the x at which y is 0, by inverse quadratic interpolation, else by a line."""
    (x1, y1), (x2, y2) = below, above
    by_line = x1 - y1 * (x2 - x1) / (y2 - y1)
    others = [p for p in points if p not in (below, above)]
    if others:
        third = min(others, key=lambda p: abs(p[0] - by_line))
        if len({y1, y2, third[1]}) == 3:
            by_parabola, a, b, c = 0.0, below, above, third
            for (x, y), (_, other), (_, another) in ((a, b, c), (b, c, a), (c, a, b)):
                by_parabola += x * other * another / ((y - other) * (y - another))
            if x1 < by_parabola < x2:
                return by_parabola
    return by_line


def _extrapolated(points: list[tuple[float, float]]) -> float:
    """Return the x at which y is 0, from ``points`` on one side, the closest first."""
    (x1, y1), power = points[0], 1.0
    if len(points) > 1:
        x2, y2 = points[1]
        power = min(max((y2 - y1) / (x2 - x1), _POWERS[0]), _POWERS[1])
    return x1 - y1 / power
