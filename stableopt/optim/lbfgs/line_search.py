r"""`strong_wolfe` and `shortened`: searches for a step length along a direction.

The strong Wolfe conditions accept a step t if the loss falls enough and the slope is flat enough,

.. math::
    f(t) \le f(0) + c_1 t f'(0), \qquad |f'(t)| \le c_2 |f'(0)|

(Nocedal & Wright, Numerical Optimization, 2nd edition, algorithms 3.5 and 3.6). Cubic interpolation
and its safeguards are those of ``torch.optim.LBFGS``: both searches evaluate the same points while
numbers are finite and losses differ by more than rounding. Below rounding, slopes decide. A point whose
loss or gradient is not finite counts as infinitely high, and the next trial is close to the finite end
of the bracket.

Numbers are floats, or 0-dimensional tensors where torch has tensors, so that every operation is torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor

__all__ = ["Number", "Trial", "quotient", "shortened", "strong_wolfe"]

Number: TypeAlias = Any
"""A ``float`` or a 0-dimensional tensor."""

SUFFICIENT = 1e-4
CURVATURE = 0.9
NARROWEST = 1e-9
"""A search ends if no parameter changes by more than this within the bracket."""

SHORTENING = 0.1
"""Factor that shortens a step to a point that is not finite: finite ones may be far closer."""


@dataclass(frozen=True)
class Trial:
    """An evaluated point on the line.

    Attributes:
        t: the step length.
        loss: infinity if the loss, the gradient or the slope is not finite.
        slope: the derivative of the loss in t.
        gradient: the flat gradient ``(d,)``.
        largest: the largest absolute entry of the gradient.
        products: the products for :meth:`PairMemory.update`, if the same host transfer had them.
        slope_height: a height from slopes, if differences of losses are below rounding.
    """

    t: Number
    loss: Number
    slope: Number
    gradient: Tensor
    largest: Number
    products: tuple[Number, ...] = ()
    slope_height: Number | None = None

    @property
    def finite(self) -> bool:
        """Whether loss, gradient and slope are finite."""
        return math.isfinite(self.loss)

    @property
    def height(self) -> Number:
        """The number that a search compares: ``slope_height``, or the loss."""
        return self.loss if self.slope_height is None else self.slope_height


def strong_wolfe(
    evaluate: Callable[[Number], Trial],
    start: Trial,
    t: Number,
    largest: Number,
    *,
    budget: int,
    rounding: float = 0.0,
) -> tuple[Trial, bool]:
    r"""Search for a step that meets the strong Wolfe conditions; else return the lowest one found.

    Args:
        evaluate: returns the point at a step length.
        start: the point at zero, with a negative slope.
        t: the first step length to try.
        largest: the largest absolute entry of the direction.
        budget: the largest number of evaluations after the first.
        rounding: the rounding error of losses. If the slopes show that a point's loss differs from that
            of ``start`` by at most this, its height is :math:`f(0) + t\,(f'(0) + f'(t))/2`: close to a
            minimum slopes still have correct digits when differences of losses have none (Hager &
            Zhang, SIAM J. Optim. 2005).

    Returns:
        The point, ``start`` if no point was lower, and whether all points were finite.

    >>> def parabola(t):
    ...     return Trial(t, (t - 3) ** 2, 2 * (t - 3), None, 0.0)
    >>> strong_wolfe(parabola, parabola(0.0), 1.0, 1.0, budget=10)[0].t
    1.0
    """
    finite = True

    def trial_at(t: Number) -> Trial:
        nonlocal finite
        trial = evaluate(t)
        finite = finite and trial.finite
        steepest = max(-start.slope, abs(trial.slope))
        if rounding and trial.finite and steepest * trial.t <= rounding:
            mean_slope = (start.slope + trial.slope) / 2
            return replace(trial, slope_height=start.loss + trial.t * mean_slope)
        return trial

    def is_too_high(trial: Trial) -> bool:
        return bool(trial.height > (start.loss + SUFFICIENT * trial.t * start.slope))

    def is_flat(trial: Trial) -> bool:
        return bool(abs(trial.slope) <= -CURVATURE * start.slope)

    previous, trial = start, trial_at(t)
    spent = 0
    while True:
        if spent >= budget:
            return _lower_of(start, trial), finite
        if is_too_high(trial) or (spent > 1 and trial.height >= previous.height):
            break
        if is_flat(trial):
            return trial, finite
        if trial.slope >= 0:
            break
        nearest, farthest = trial.t + 0.01 * (trial.t - previous.t), trial.t * 10
        previous, trial = trial, trial_at(_cubic_minimum(previous, trial, nearest, farthest))
        spent += 1

    ends, stuck = [previous, trial], False
    low = 0 if previous.height <= trial.height else 1
    while spent < budget and not abs(ends[1].t - ends[0].t) * largest < NARROWEST:
        t, stuck = _between(ends, low, stuck)
        trial = trial_at(t)
        spent += 1
        if rounding and (trial.loss, trial.slope) == (ends[low].loss, ends[low].slope):
            break  # the parameters have rounded to the same point
        if is_too_high(trial) or trial.height >= ends[low].height:
            ends[1 - low] = trial
            low = 0 if ends[0].height <= ends[1].height else 1
            continue
        if is_flat(trial):
            return trial, finite
        if trial.slope * (ends[1 - low].t - ends[low].t) >= 0:
            ends[1 - low] = ends[low]
        ends[low] = trial
    return ends[low], finite


def shortened(evaluate: Callable[[Number], Trial], trial: Trial, *, budget: int) -> Trial | None:
    """Return ``trial`` or the first finite point at 1/10, 1/100, ... of its step; else ``None``.

    >>> barrier = lambda t: Trial(t, -t if t < 0.05 else math.inf, -1.0, None, 0.0)
    >>> round(shortened(barrier, barrier(1.0), budget=5).t, 3)
    0.01
    """
    while not trial.finite:
        if budget <= 0:
            return None
        trial = evaluate(trial.t * SHORTENING)
        budget -= 1
    return trial


def _lower_of(first: Trial, second: Trial) -> Trial:
    return first if first.height <= second.height else second


def _between(ends: list[Trial], low: int, stuck: bool) -> tuple[Number, bool]:
    """Return the next step in the bracket, and whether it is ``stuck`` near an end."""
    if not (ends[0].finite and ends[1].finite):
        return ends[low].t + SHORTENING * (ends[1 - low].t - ends[low].t), False
    left, right = min(ends[0].t, ends[1].t), max(ends[0].t, ends[1].t)
    t = _cubic_minimum(ends[0], ends[1], left, right)
    margin = 0.1 * (right - left)
    if not min(right - t, t - left) < margin:
        return t, False
    if not (stuck or t >= right or t <= left):
        return t, True
    # Near an end for the second time in a row, or at it: move a tenth of the bracket inwards.
    return (right - margin if abs(t - right) < abs(t - left) else left + margin), False


def _cubic_minimum(first: Trial, second: Trial, nearest: Number, farthest: Number) -> Number:
    """Return the minimum of the cubic through two points with their slopes, clipped to bounds.

    Nocedal & Wright, equation 3.59; the middle of the bounds if the cubic has no minimum.
    """
    if first.t != second.t:
        rise, run = first.height - second.height, first.t - second.t
        d1 = first.slope + second.slope - 3 * rise / run
        square = d1 * d1 - first.slope * second.slope
        if square >= 0:
            root = square.sqrt() if isinstance(square, Tensor) else math.sqrt(square)
            left, right = (first, second) if first.t <= second.t else (second, first)
            share = quotient(right.slope + root - d1, right.slope - left.slope + 2 * root)
            t = right.t - (right.t - left.t) * share
            # 0 / 0 if slopes vanish or overflow; torch would step to NaN.
            if not math.isnan(t):
                return min(max(t, nearest), farthest)
    return (nearest + farthest) / 2.0


def quotient(dividend: Number, divisor: Number) -> Number:
    """Divide like tensors: by zero to infinity.

    >>> quotient(-1.0, 0.0)
    -inf
    """
    if isinstance(divisor, Tensor) or divisor != 0:
        return dividend / divisor
    return dividend * math.inf
