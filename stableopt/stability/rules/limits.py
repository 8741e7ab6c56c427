r"""The largest sharpness and non-uniformity at which an update rule is stable: functions of numbers.

The setting is one linear mode of stochastic gradient descent near a minimum that all samples share:
curvature a, standard deviation s of the per-sample curvatures, and batches of B out of n samples drawn
without replacement, so that the curvature of one step has mean a and variance :math:`p s^2`,

.. math:: p = \frac{n-B}{B(n-1)}.

The step is that of ``torch.optim.SGD``, and of the adaptive optimizers whose preconditioner is held
fixed (:class:`LinearStep`): with learning rate :math:`\eta`, momentum :math:`\beta`, dampening
:math:`\tau`, coupled weight decay :math:`\lambda` and decoupled :math:`\lambda'`,

.. math::
    g = (h+\lambda)x, \quad m' = \beta m + (1-\tau) g, \quad
    x' = (1-\eta\lambda')\,x - \eta\,(A g + B m'),

where A, B are 0, 1 for heavy-ball momentum, 1, :math:`\beta` for Nesterov's, and :math:`1-\nu, \nu`
for a share :math:`\nu` of the momentum (quasi-hyperbolic momentum, Ma & Yarats, ICLR 2019). With
:math:`c = 1-\eta\lambda'`, :math:`u = A + B(1-\tau)`, :math:`w = \beta A` and the curvature in units of
the rate, :math:`k = \eta(h+\lambda)`,

.. math:: x_{t+1} = (c + \beta - u k_t)\,x_t - (\beta c - w k_{t-1})\,x_{t-1}.

For a fixed k its roots are within the unit disc if :math:`|T| < 1+\Delta` and :math:`\Delta < 1`, T and
:math:`\Delta` their sum and product (Jury): the first root to leave does so at -1 as k grows, at 1 as k
falls.

Any other linear filter of the gradients has the limits of :mod:`~stableopt.stability.rules.filters`.
For plain SGD the limits are Theorem 1 and equation (9) of Wu, Ma & E (NeurIPS 2018).
:func:`mean_square_radius` is the recursion of second moments itself, and the reference for the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.polynomial import Polynomial

from stableopt._support.arguments import whole
from stableopt.stability.rules.filters import (
    Filter,
    checked,
    largest_variance,
    matrices,
    momentum_filter,
    stable_range,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "LinearStep",
    "max_non_uniformity",
    "max_sharpness",
    "mean_square_radius",
    "min_sharpness",
    "noise_factor",
]


class StepOptions(TypedDict, total=False):
    """Keywords of :class:`LinearStep` other than the learning rate."""

    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float
    decoupled_weight_decay: float
    momentum_share: float
    filter: Filter | None


@dataclass(frozen=True)
class LinearStep:
    r"""The coefficients of an update rule on one linear mode.

    Attributes:
        lr: learning rate; 0 gives infinite limits.
        momentum: beta of ``torch.optim.SGD``, below 1.
        dampening: tau, below 1; without effect when momentum is 0, as in torch.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: coupled weight decay lambda, a part of the gradient.
        decoupled_weight_decay: lambda', by which parameters shrink in addition to the step.
        momentum_share: nu, between 0 and 1: the step is along (1 - nu) g + nu m.
        filter: ``(num, den)`` of the recursion :math:`u_t = b_0g_t + b_1g_{t-1} + \cdots - a_1u_{t-1} -
            \cdots` for the step -eta u, with :math:`a_0 = 1`, instead of the momentum.

    Raises:
        ValueError: for values out of range.

    >>> round(LinearStep(0.1, momentum=0.9).max_sharpness, 6)
    38.0
    >>> round(LinearStep(0.1, filter=((1.0,), (1.0, -0.9))).max_sharpness, 6)
    38.0
    """

    lr: float
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decoupled_weight_decay: float = 0.0
    momentum_share: float = 1.0
    filter: Filter | None = None

    def __post_init__(self) -> None:
        if self.filter is not None:
            own = (self.momentum, self.dampening, self.nesterov, self.momentum_share)
            if own != (0.0, 0.0, False, 1.0):
                raise ValueError(
                    f"filter with momentum, dampening, nesterov, momentum_share of {own}: expected"
                    " them in the filter alone"
                )
            object.__setattr__(self, "filter", checked("filter", self.filter))
        if not self.lr >= 0:
            raise ValueError(f"lr={self.lr}: expected at least 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum}: expected at least 0 and below 1")
        if not self.dampening < 1:
            raise ValueError(f"dampening={self.dampening}: expected below 1")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                f"nesterov with momentum={self.momentum}, dampening={self.dampening}: expected"
                " momentum above 0 and no dampening"
            )
        if not 0 <= self.momentum_share <= 1 or (self.nesterov and self.momentum_share != 1):
            raise ValueError(
                f"momentum_share={self.momentum_share}: expected at least 0 and at most 1, and 1"
                " with nesterov"
            )
        if not self.decoupled_weight_decay >= 0:
            raise ValueError(
                f"decoupled_weight_decay={self.decoupled_weight_decay}: expected at least 0"
            )

    @property
    def gain(self) -> float:
        """The weight 1 - tau of the gradient in the momentum; 1 without momentum."""
        return 1 - self.dampening if self.momentum else 1.0

    @property
    def _kept(self) -> float:
        """What decoupled weight decay leaves of the parameter: c."""
        return 1 - self.lr * self.decoupled_weight_decay

    @property
    def _weights(self) -> tuple[float, float]:
        """The weights of the gradient and of the momentum in the step: A and B."""
        if self.nesterov:
            return 1.0, self.momentum
        return 1 - self.momentum_share, self.momentum_share

    @property
    def as_filter(self) -> Filter:
        """Its filter of the gradients, whichever form it has.

        >>> LinearStep(0.1, momentum=0.5).as_filter
        ((1.0, -0.0), (1.0, -0.5))
        """
        if self.filter is not None:
            return self.filter
        return momentum_filter(self.momentum, self.gain, *self._weights)

    @property
    def _range(self) -> tuple[float, float]:
        """The smallest and the largest k that are stable without noise."""
        if self.filter is not None:
            return stable_range(self._kept, self.filter)
        beta, (now, weight) = self.momentum, self._weights
        averaged = weight * self.gain
        # A root at 1: the momentum has come to rest at (1 - tau) g / (1 - beta).
        low = -(1 - self._kept) * (1 - beta) / (now * (1 - beta) + averaged)
        return low, (1 + beta) * (1 + self._kept) / (now * (1 + beta) + averaged)

    @property
    def max_sharpness(self) -> float:
        """The limit of :func:`max_sharpness`."""
        return math.inf if self.lr == 0 else self._range[1] / self.lr - self.weight_decay

    @property
    def min_sharpness(self) -> float:
        """The limit of :func:`min_sharpness`."""
        if self.filter is not None and self.lr > 0:
            return self._range[0] / self.lr - self.weight_decay
        if self.filter is not None:
            num, den = self.filter
            return -self.weight_decay - self.decoupled_weight_decay * sum(den) / sum(num)
        now, weight = self._weights
        pull = now + weight * self.gain / (1 - self.momentum)
        return -self.weight_decay - self.decoupled_weight_decay / pull

    def max_lr(self, sharpness: float) -> float:
        """Return the largest learning rate that is stable at ``sharpness``; ``lr`` is ignored.

        >>> round(LinearStep(1.0, momentum=0.9).max_lr(38.0), 6)
        0.1
        """
        if self.filter is not None:
            return self._max_lr_of_filter(sharpness + self.weight_decay)
        beta, (now, weight) = self.momentum, self._weights
        pull = now * (1 + beta) + weight * self.gain
        curvature = sharpness + self.weight_decay + self.decoupled_weight_decay * (1 + beta) / pull
        return 2 * (1 + beta) / pull / curvature if curvature > 0 else math.inf

    def _max_lr_of_filter(self, curvature: float) -> float:
        decay = self.decoupled_weight_decay
        if decay == 0:
            return stable_range(1.0, self.as_filter)[1] / curvature if curvature > 0 else math.inf
        low, high = 0.0, 2 / decay
        for _ in range(60):  # digits of a float
            middle = (low + high) / 2
            inside = middle * curvature <= stable_range(1 - middle * decay, self.as_filter)[1]
            low, high = (middle, high) if inside else (low, middle)
        return low

    def max_non_uniformity(self, noise: float, sharpness: float | None = None) -> float:
        """Return the limit of :func:`max_non_uniformity`; ``noise`` is p."""
        low, high = self._range
        k = None if sharpness is None else self.lr * (sharpness + self.weight_decay)
        if k is not None and not low <= k <= high:
            return 0.0
        if self.lr == 0 or noise == 0:
            return math.inf
        if self.filter is not None:
            return math.sqrt(largest_variance(self._kept, self.filter, k) / noise) / self.lr
        above, below = self._largest_variance()
        if k is not None:
            means = [k]
        else:
            # Stationary where N' D = N D': a cubic.
            roots = (above.deriv() * below - above * below.deriv()).roots()
            real = roots.real[np.abs(roots.imag) < 1e-9 * (1 + np.abs(roots.real))]
            means = [x for x in real if low < x < high]
        largest = max((float(above(x) / below(x)) for x in means), default=0.0)
        return math.sqrt(max(largest, 0.0) / noise) / self.lr

    def _largest_variance(self) -> tuple[Polynomial, Polynomial]:
        """Return numerator and denominator of the largest variance of k, as a function of its mean."""
        now, weight = self._weights
        u, w = now + weight * self.gain, self.momentum * now
        trace = Polynomial([self._kept + self.momentum, -u])
        det = Polynomial([self.momentum * self._kept, -w])
        above = (1 - det) * (1 + det - trace) * (1 + det + trace)
        return above, (u * u + w * w) * (1 + det) - 2 * u * w * trace

    def mean_square_radius(self, sharpness: float, noise: float) -> float:
        """Return :func:`mean_square_radius`."""
        constant, slope = matrices(self._kept, self.lr, self.as_filter)
        mean = constant + (sharpness + self.weight_decay) * slope
        moments = np.kron(mean, mean) + noise * np.kron(slope, slope)
        return float(np.abs(np.linalg.eigvals(moments)).max())


def noise_factor(batch_size: int, dataset_size: int | None = None) -> float:
    r"""Return :math:`p = (n-B)/(B(n-1))`, the variance of a batch mean relative to one sample's.

    Args:
        batch_size: samples B in a step.
        dataset_size: samples n to draw from; ``None`` stands for infinitely many, p = 1/B.

    Raises:
        ValueError: if B is not positive, or above n.

    >>> noise_factor(4), noise_factor(1, 10), noise_factor(10, 10)
    (0.25, 1.0, 0.0)
    """
    batch_size = whole("batch_size", batch_size)
    if dataset_size is None:
        return 1.0 / batch_size
    dataset_size = whole("dataset_size", dataset_size)
    if batch_size > dataset_size:
        raise ValueError(f"batch_size={batch_size} is above dataset_size={dataset_size}")
    if batch_size == dataset_size:
        return 0.0
    return (dataset_size - batch_size) / (batch_size * (dataset_size - 1))


def max_sharpness(lr: float, **step: Unpack[StepOptions]) -> float:
    r"""Return the largest sharpness at which gradient descent is linearly stable.

    :math:`\frac{(1+\beta)(1+c)}{\eta\,[A(1+\beta)+B(1-\tau)]}-\lambda`:

    - plain: :math:`2/\eta-\lambda`;
    - heavy ball: :math:`2(1+\beta)/(\eta(1-\tau)) - \lambda`;
    - Nesterov: :math:`(2+2\beta)/(\eta(1+2\beta)) - \lambda`;
    - AdamW's step, :math:`\tau=\beta`: :math:`(1+\beta)(2-\eta\lambda')/(\eta(1-\beta))`.

    Args:
        lr: learning rate; 0 gives infinity.
        step: ``momentum``, ``dampening``, ``nesterov``, ``weight_decay``, ``decoupled_weight_decay``,
            ``momentum_share`` and ``filter``, as in :class:`LinearStep`.

    Raises:
        ValueError: for values out of range.

    >>> max_sharpness(0.1), round(max_sharpness(0.1, momentum=0.9), 6)
    (20.0, 38.0)
    """
    return LinearStep(lr, **step).max_sharpness


def min_sharpness(lr: float, **step: Unpack[StepOptions]) -> float:
    r"""Return the smallest sharpness of a minimum at which the step can settle.

    :math:`-\lambda - \frac{\lambda'(1-\beta)}{A(1-\beta)+B(1-\tau)}`; arguments and errors are those of
    :func:`max_sharpness`.

    >>> min_sharpness(0.1, weight_decay=0.5)
    -0.5
    """
    return LinearStep(lr, **step).min_sharpness


def max_non_uniformity(
    lr: float,
    batch_size: int,
    dataset_size: int | None = None,
    *,
    sharpness: float | None = None,
    **step: Unpack[StepOptions],
) -> float:
    r"""Return the largest non-uniformity at which SGD is mean-square stable in one dimension.

    Without ``sharpness`` it is the maximum over all sharpnesses, a side of the box (9): for plain
    SGD :math:`\frac1\eta\sqrt{B(n-1)/(n-B)}`, about :math:`\sqrt B/\eta` for large n. With it, the
    height of the exact region there: for plain SGD the half-ellipse
    :math:`(1-\eta a)^2 + \eta^2 p s^2 = 1`. In general, with
    :math:`T = c+\beta-u(a+\lambda)` and :math:`\Delta = \beta c-w(a+\lambda)`,

    .. math:: p s^2 \le
        \frac{(1-\Delta)\,[(1+\Delta)^2-T^2]}{(u^2+w^2)(1+\Delta)-2uwT},

    the inverse of the stationary variance of :math:`x_{t+1} = Tx_t-\Delta x_{t-1}+u\varepsilon_t-
    w\varepsilon_{t-1}` under unit noise. For the heavy ball it is
    :math:`\frac{1-\beta}{1+\beta}\,x\,(2(1+\beta)-x)/e^2` with :math:`e = \eta(1-\tau)` and
    :math:`x = e(a+\lambda)`.

    Args:
        lr: learning rate; 0 gives infinity.
        batch_size: samples B in a step.
        dataset_size: samples n in the training set; ``None`` for infinitely many. B = n gives
            infinity.
        sharpness: the sharpness a, or ``None`` for the maximum over all.
        step: as in :func:`max_sharpness`.

    Returns:
        The limit; 0 if the rule is unstable at ``sharpness`` even without noise.

    Raises:
        ValueError: for values out of range.

    >>> max_non_uniformity(0.1, 4), max_non_uniformity(0.1, 4, sharpness=10.0)
    (20.0, 20.0)
    >>> round(max_non_uniformity(0.1, 100, 1200), 1)
    104.4
    """
    checked = LinearStep(lr, **step)
    return checked.max_non_uniformity(noise_factor(batch_size, dataset_size), sharpness)


def mean_square_radius(
    sharpness: float, noise: float, lr: float, **step: Unpack[StepOptions]
) -> float:
    r"""Return the growth per step of the second moments of one linear mode: stable up to 1.

    Each step multiplies the state (x, m) by :math:`A_0 + hA_1`, where h has mean a and variance
    ``noise``, and the second moments by
    :math:`\bar A\otimes\bar A + \mathrm{noise}\,A_1\otimes A_1`, whose spectral radius this is.

    Args:
        sharpness: the mean curvature a.
        noise: the variance of the curvature from step to step, :math:`p s^2`.
        lr: learning rate.
        step: as in :func:`max_sharpness`.

    >>> round(mean_square_radius(sharpness=5.0, noise=16.0, lr=0.1), 6)   # (1 - .5)^2 + .01 * 16
    0.41
    """
    return LinearStep(lr, **step).mean_square_radius(sharpness, noise)
