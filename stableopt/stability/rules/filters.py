r"""Stability limits of steps along any linear filter of the gradients, from roots of small polynomials.

A filter Q turns gradients g into steps u by the recursion

.. math:: u_t = \sum_{i\ge0} b_i\,g_{t-i} - \sum_{i\ge1} a_i\,u_{t-i}, \qquad
    Q(z) = \frac{b_0 + b_1z^{-1} + \cdots}{1 + a_1z^{-1} + \cdots},

``(num, den)`` as for ``scipy.signal.lfilter``. On one mode, with :math:`k = \eta(h+\lambda)` and
:math:`x' = cx - \eta u`, the characteristic polynomial is :math:`D(z) + kN(z)`. N and D are numerator
and denominator in powers of z, and D includes the factor :math:`z - c`. A root crosses the unit circle
at z only for :math:`k = -D(z)/N(z)`, which has to be real (Lee & Lee, *The Road Taken*,
arXiv:2608.18415, 2026, Prop. 2.1). This is a polynomial equation in the cosine of the angle of z. The
crossing need not be at -1. Examples::

    ((1.0,), (1.0, -0.9))                        # heavy ball
    ((1.9, -0.9), (1.0, -0.9))                   # Nesterov's momentum
    ((0.5, 0.5), (1.0,))                         # the mean of the last two gradients
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.polynomial import chebyshev

__all__ = [
    "SAME",
    "Filter",
    "agree",
    "checked_filter",
    "largest_variance",
    "lookahead_edge",
    "matrices",
    "momentum_filter",
    "momentum_of",
    "no_lookahead_edge",
    "stable_range",
]

SAME = 1e-12
"""Difference of momenta, and relative difference of the shares that weight decay removes, that counts as
rounding: bias corrections near 1, and weights of averages, are computed."""

Filter = tuple[tuple[float, ...], tuple[float, ...]]

_ON_CIRCLE = 1e-9
"""Distance of a pole from the unit circle up to which the filter counts as unstable."""

_REAL = 1e-6
"""Imaginary part of a cosine up to which it may be a real double root that rounding has split."""

_DIFFERENT_SHRINK = 1e-3
"""Largest share of a parameter that decoupled weight decay may remove in a step where the shares differ,
with Lookahead. Its limit then has the factors 2/(1 + c) of :mod:`.readers.diagonal` in P, which are
exact for a root at -1 only. For 100 momenta, k and alpha, the limit of one mode was too low by
at most 0.5 % here in 98, and by 13 % at worst; at 1e-2 by more than 1 % in 15, and by a factor of 2.7
at worst."""

_ROUNDING = 1e-12
"""Excess of a root over 1, and difference of coefficients, that count as rounding."""

_GRID = 256
"""Points that bracket the largest variance, a rational function with few maxima."""


def checked_filter(name: str, value: object) -> Filter:
    """Return a filter as tuples of floats, with a leading denominator of 1.

    Raises:
        ValueError: unless it is a pair of sequences of finite numbers whose poles lie within the unit
            circle and whose gain for constant gradients is positive.
    """
    try:
        num, den = (tuple(float(entry) for entry in part) for part in value)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        num = den = ()
    if not (num and den and all(map(math.isfinite, num + den)) and den[0]):
        raise ValueError(
            f"{name}={value!r}: expected (num, den) of u_t = num[0] g_t + num[1] g_(t-1) + ..."
            " - den[1] u_(t-1) - ..., two sequences of finite numbers with den[0] other than 0"
        )
    num, den = tuple(b / den[0] for b in num), tuple(a / den[0] for a in den)
    pole = float(np.abs(np.roots(den)).max(initial=0.0))
    if not pole < 1 - _ON_CIRCLE:
        raise ValueError(f"{name}={value!r} has a pole of size {pole:.6g}: expected below 1")
    if not sum(num) / sum(den) > 0:
        raise ValueError(
            f"{name}={value!r} multiplies constant gradients by {sum(num) / sum(den):.6g}: expected a"
            " positive number"
        )
    return num, den


def momentum_filter(beta: float, gain: float, of_gradient: float, of_momentum: float) -> Filter:
    """Return the filter of the step A g + B m' with m' = beta m + gain g.

    >>> momentum_filter(0.9, 1.0, 0.0, 1.0)          # heavy ball: A = 0, B = 1
    ((1.0, -0.0), (1.0, -0.9))
    """
    return (of_gradient + of_momentum * gain, -beta * of_gradient), (1.0, -beta)


def momentum_of(pair: Filter) -> tuple[float, float, bool] | None:
    """Return the momentum, dampening and ``nesterov`` of ``torch.optim.SGD`` with this filter, if any.

    >>> momentum_of(((1.5, -0.5), (1.0, -0.5))), momentum_of(((0.5, 0.5), (1.0,)))
    ((0.5, 0.0, True), None)
    """
    num, den = (np.trim_zeros(part, "b") for part in pair)
    beta = -float(den[1]) if len(den) == 2 else 0.0
    if len(den) > 2 or beta < 0:
        return None
    if len(num) == 1 and (beta or num[0] == 1):
        dampening = 1 - float(num[0]) if beta else 0.0
        return beta, dampening, False
    nesterov = len(num) == 2 and max(abs(num[0] - 1 - beta), abs(num[1] + beta)) <= _ROUNDING
    return (beta, 0.0, True) if nesterov and beta else None


def stable_range(kept: float, pair: Filter, growth: float = 1.0) -> tuple[float, float]:
    r"""Return the ends of the interval of stable :math:`k = \eta h`, one at most 0, one at least 0.

    Stable means that no root is larger than ``growth``. ``kept`` is the factor c of weight decay.

    >>> [round(k, 9) for k in stable_range(1.0, ((1.0,), (1.0, -0.9)))]
    [0.0, 3.8]
    """
    num, den = _polynomials(kept, pair)
    powers = growth ** np.arange(len(den) - 1, -1, -1.0)  # roots in units of the growth
    num, den = num * powers[1:], den * powers
    # At k = 0 a root is at c. At c = 1 it leaves the circle for negative k.
    on_circle = kept == growth
    crossings = _crossings(num, den, real_axis=(-1.0,) if on_circle else (1.0, -1.0))

    def stable(k: float) -> bool:
        return float(np.abs(np.roots(np.polyadd(den, k * num))).max()) < 1

    def last_stable(crossings: list[float]) -> float:
        """Return the crossing nearest to 0 beyond which k is unstable; 0 if small k are unstable."""
        if not crossings or not stable(crossings[0] / 2):
            return 0.0
        for near, far in zip(crossings, [*crossings[1:], 2 * crossings[-1]], strict=True):
            if not stable((near + far) / 2):
                return near
        return crossings[-1]

    low = 0.0 if on_circle else last_stable(sorted((k for k in crossings if k < 0), reverse=True))
    return low, last_stable(sorted(k for k in crossings if k > 0))


def _polynomials(kept: float, pair: Filter) -> tuple[np.ndarray, np.ndarray]:
    """Return the coefficients of N and D, by falling powers of z."""
    length = max(map(len, pair))
    num, den = (np.array(part + (0.0,) * (length - len(part))) for part in pair)
    return num, np.polymul([1.0, -kept], den)


def _crossings(num: np.ndarray, den: np.ndarray, *, real_axis: tuple[float, ...]) -> list[float]:
    r"""Return the real values k = -D/N on the unit circle; of z = 1 and -1, only at ``real_axis``.

    With :math:`z = e^{i\omega}`, :math:`\operatorname{Im} D\bar N = \sum_m r_m\sin m\omega` is
    :math:`\sin\omega` times a polynomial in :math:`\cos\omega`, as :math:`\sin m\omega/\sin\omega` is
    the Chebyshev polynomial :math:`U_{m-1}`.
    """
    ascending_den, ascending_num = den[::-1], num[::-1]
    sines = np.zeros(len(ascending_den))  # r_m
    for j, d in enumerate(ascending_den):
        for m, n in enumerate(ascending_num):
            sines[abs(j - m)] += math.copysign(1.0, j - m) * d * n
    in_cosine = np.zeros(max(len(sines) - 1, 1))
    for m, r in enumerate(sines[1:], start=1):
        terms = np.arange(m - 1, -1, -2)  # U_(m-1) = 2 T_(m-1) + 2 T_(m-3) + ...
        in_cosine[terms] += np.where(terms > 0, 2.0, 1.0) * r
    roots = chebyshev.chebroots(np.trim_zeros(in_cosine, "b")) if in_cosine.any() else np.array([])
    cosines = [float(x.real) for x in roots if abs(x.imag) < _REAL and abs(x.real) < 1]
    crossings = []
    for z in (*np.exp(1j * np.arccos(cosines)), *real_axis):
        num_at_z = complex(np.polyval(num, z))
        if num_at_z != 0:
            crossings.append(float((-np.polyval(den, z) / num_at_z).real))
    return crossings


def matrices(kept: float, lr: float, pair: Filter) -> tuple[np.ndarray, np.ndarray]:
    """Return :math:`A_0` and :math:`A_1`: a step multiplies the state by :math:`A_0 + hA_1`.

    The state is the weight, followed by the filter's state in companion form.
    """
    order = max(map(len, pair)) - 1
    num, den = (np.array(part + (0.0,) * (order + 1 - len(part))) for part in pair)
    constant, slope = np.zeros((order + 1, order + 1)), np.zeros((order + 1, order + 1))
    constant[0, 0] = kept
    constant[0, 1:] = -lr * (num[1:] - num[0] * den[1:])
    constant[1:, 1:] = np.eye(order, k=-1)
    slope[0, 0] = -lr * num[0]
    if order:
        constant[1, 1:] = -den[1:]
        slope[1, 0] = 1.0
    return constant, slope


def largest_variance(kept: float, pair: Filter, mean: float | None = None) -> float:
    r"""Return the largest mean-square stable variance of k: at its ``mean``, or at the best mean.

    It is the inverse of :math:`\frac1{2\pi}\int|N/(D+kN)|^2`, the second moment of x under unit noise.
    """
    constant, slope = matrices(kept, 1.0, pair)

    def variance(k: float) -> float:
        step = constant + k * slope
        noise = np.outer(slope[:, 0], slope[:, 0])
        moments = np.eye(step.size) - np.kron(step, step)
        try:
            second_moment = float(np.linalg.solve(moments, noise.ravel())[0])
        except np.linalg.LinAlgError:
            second_moment = math.inf
        # At the ends of the stable range it is infinite, and rounding may make it negative.
        return 0.0 if second_moment <= 0 else 1 / second_moment

    if mean is not None:
        return variance(mean)
    low, high = stable_range(kept, pair)
    grid = np.linspace(low, high, _GRID + 2)
    best = 1 + int(np.argmax([variance(float(k)) for k in grid[1:-1]]))
    return _maximum(variance, float(grid[best - 1]), float(grid[best + 1]))


def _maximum(function: Callable[[float], float], low: float, high: float) -> float:
    """Return the maximum of a unimodal function, by golden-section search."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    # The error of the maximum is quadratic in that of its argument.
    for _ in range(50):
        if at_left >= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
    return max(at_left, at_right)


def no_lookahead_edge(shrink: float) -> str | None:
    """Return why Lookahead has no known limit where decoupled weight decay differs, or ``None``.

    Args:
        shrink: the largest share of a parameter that the decay removes in a step.
    """
    if shrink <= _DIFFERENT_SHRINK:
        return None
    return (
        "Lookahead has no known limit where decoupled weight decay differs between parameters:"
        f" lr * weight_decay={shrink:.3g}, expected at most {_DIFFERENT_SHRINK:g}, or one decay for all"
    )


@functools.lru_cache(maxsize=64)
def lookahead_edge(kept: float, pair: Filter, every: int, share: float) -> float:
    r"""Return the largest stable :math:`k = \eta h` of Lookahead over a filter.

    After each round of ``every`` steps the weight moves by a ``share`` :math:`\alpha` of the round, and
    the filter keeps its state. Gradient descent has :math:`1+((2-\alpha)/\alpha)^{1/\mathrm{every}}` for
    odd ``every``, and 2 for even.

    >>> round(lookahead_edge(1.0, ((1.0,), (1.0,)), 5, 0.5), 6)    # 1 + 3^(1/5)
    2.245731
    """
    constant, slope = matrices(kept, 1.0, pair)

    def stable(k: float) -> bool:
        round_matrix = np.linalg.matrix_power(constant + k * slope, every)
        round_matrix[0] *= share
        round_matrix[0, 0] += 1 - share
        return float(np.abs(np.linalg.eigvals(round_matrix)).max()) <= 1 + _ROUNDING

    low, spacing = 0.0, stable_range(kept, pair)[1] / (_GRID * every)
    while spacing > 0 and stable(low + spacing):
        low += spacing
    high = low + spacing
    for _ in range(50):  # bisection to the precision of a float
        middle = (low + high) / 2
        low, high = (middle, high) if stable(middle) else (low, middle)
    return low


def agree(first: Any, second: Any) -> bool:
    """Return whether two settings, such as momenta or filters, are equal up to rounding errors.

    Floats may differ by :data:`SAME`. Tuples are compared entry by entry.

    >>> agree(((1.0,), (1.0, -0.9)), ((1.0,), (1.0, -0.9 + 1e-15))), agree(0.9, 0.99)
    (True, False)
    """
    if isinstance(first, tuple) and isinstance(second, tuple):
        return len(first) == len(second) and all(map(agree, first, second))
    floats = isinstance(first, float) and isinstance(second, float)
    return bool(first == second or (floats and abs(first - second) <= SAME))
