r"""The largest sharpness and non-uniformity at which an update rule is stable, in closed form.

The setting is one linear mode of SGD near a minimum of all samples. The per-sample curvatures have mean
a and standard deviation s. A batch draws B of n samples without replacement, so the curvature of one
step has mean a and variance :math:`p s^2`,

.. math:: p = \frac{n-B}{B(n-1)}.

The step (:class:`LinearStep`) is that of ``torch.optim.SGD``, or of an adaptive optimizer with a fixed
preconditioner. With learning rate :math:`\eta`, momentum :math:`\beta`, dampening :math:`\tau`, coupled
weight decay :math:`\lambda` and decoupled weight decay :math:`\lambda'`,

.. math::
    g = (h+\lambda)x, \quad m' = \beta m + (1-\tau) g, \quad
    x' = (1-\eta\lambda')\,x - \eta\,(A g + B m'),

where (A, B) is (0, 1) for heavy-ball momentum, (1, :math:`\beta`) for Nesterov's, and
(:math:`1-\nu`, :math:`\nu`) for a share :math:`\nu` of the momentum (quasi-hyperbolic momentum, Ma &
Yarats, ICLR 2019). With :math:`c = 1-\eta\lambda'`, :math:`u = A + B(1-\tau)`, :math:`w = \beta A` and
the scaled curvature :math:`k = \eta(h+\lambda)`,

.. math:: x_{t+1} = (c + \beta - u k_t)\,x_t - (\beta c - w k_{t-1})\,x_{t-1}.

For a fixed k let T and :math:`\Delta` be the sum and the product of the two roots. The roots lie within
the unit disc exactly if :math:`|T| < 1+\Delta` and :math:`\Delta < 1` (Jury). The first root leaves it
at -1 as k grows, and at 1 as k falls.

For plain SGD the limits are Theorem 1 and equation (9) of Wu, Ma & E (NeurIPS 2018). Limits of other
linear filters of the gradients are in :mod:`~stableopt.stability.rules.filters`.
:func:`mean_square_radius` evaluates the recursion of second moments itself: the reference for the rest.
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
    checked_filter,
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
        dampening: tau, below 1; without effect if momentum is 0, as in torch.
        nesterov: whether the momentum is Nesterov's.
        weight_decay: coupled weight decay lambda, a part of the gradient.
        decoupled_weight_decay: lambda'; each step also multiplies parameters by 1 - lr lambda'.
        momentum_share: nu, between 0 and 1: the step is along (1 - nu) g + nu m.
        filter: instead of momentum, ``(num, den)`` of a linear filter: the step is -eta u with
            :math:`u_t = b_0g_t + b_1g_{t-1} + \cdots - a_1u_{t-1} - \cdots` and :math:`a_0 = 1`.

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
            settings = (self.momentum, self.dampening, self.nesterov, self.momentum_share)
            if settings != (0.0, 0.0, False, 1.0):
                raise ValueError(
                    f"filter with momentum, dampening, nesterov, momentum_share of {settings}: expected"
                    " momentum in the filter alone"
                )
            object.__setattr__(self, "filter", checked_filter("filter", self.filter))
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
        """The factor c of the parameter under decoupled weight decay."""
        return 1 - self.lr * self.decoupled_weight_decay

    @property
    def _weights(self) -> tuple[float, float]:
        """A and B, the weights of the gradient and of the momentum in the step."""
        if self.nesterov:
            return 1.0, self.momentum
        return 1 - self.momentum_share, self.momentum_share

    @property
    def as_filter(self) -> Filter:
        """The filter of the gradients: ``filter``, or that of the momentum.

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
        beta, (of_gradient, of_momentum) = self.momentum, self._weights
        averaged = of_momentum * self.gain
        # At a root of 1 the gradient is constant, and the momentum is (1 - tau) g / (1 - beta).
        low = -(1 - self._kept) * (1 - beta) / (of_gradient * (1 - beta) + averaged)
        high = (1 + beta) * (1 + self._kept) / (of_gradient * (1 + beta) + averaged)
        return low, high

    @property
    def max_sharpness(self) -> float:
        """See :func:`max_sharpness`."""
        return math.inf if self.lr == 0 else self._range[1] / self.lr - self.weight_decay

    @property
    def min_sharpness(self) -> float:
        """See :func:`min_sharpness`."""
        if self.filter is not None and self.lr > 0:
            return self._range[0] / self.lr - self.weight_decay
        if self.filter is not None:
            num, den = self.filter
            return -self.weight_decay - self.decoupled_weight_decay * sum(den) / sum(num)
        of_gradient, of_momentum = self._weights
        gain_at_rest = of_gradient + of_momentum * self.gain / (1 - self.momentum)
        return -self.weight_decay - self.decoupled_weight_decay / gain_at_rest

    def max_lr(self, sharpness: float) -> float:
        """Return the largest learning rate that is stable at ``sharpness``; ``lr`` is ignored.

        >>> round(LinearStep(1.0, momentum=0.9).max_lr(38.0), 6)
        0.1
        """
        if self.filter is not None:
            return self._max_lr_of_filter(sharpness + self.weight_decay)
        beta, (of_gradient, of_momentum) = self.momentum, self._weights
        # (1 + beta) times the gain of a gradient that alternates in sign, at a root of -1.
        gain = of_gradient * (1 + beta) + of_momentum * self.gain
        curvature = sharpness + self.weight_decay + self.decoupled_weight_decay * (1 + beta) / gain
        return 2 * (1 + beta) / gain / curvature if curvature > 0 else math.inf

    def _max_lr_of_filter(self, curvature: float) -> float:
        decay = self.decoupled_weight_decay
        if decay == 0:
            return stable_range(1.0, self.as_filter)[1] / curvature if curvature > 0 else math.inf
        low, high = 0.0, 2 / decay
        for _ in range(60):  # bisection to the precision of a float
            middle = (low + high) / 2
            stable = middle * curvature <= stable_range(1 - middle * decay, self.as_filter)[1]
            low, high = (middle, high) if stable else (low, middle)
        return low

    def max_non_uniformity(self, noise: float, sharpness: float | None = None) -> float:
        """Return the limit of :func:`max_non_uniformity` for the noise factor p."""
        low, high = self._range
        k = None if sharpness is None else self.lr * (sharpness + self.weight_decay)
        if k is not None and not low <= k <= high:
            return 0.0
        if self.lr == 0 or noise == 0:
            return math.inf
        if self.filter is not None:
            return math.sqrt(largest_variance(self._kept, self.filter, k) / noise) / self.lr
        numerator, denominator = self._max_variance()
        if k is not None:
            means = [k]
        else:
            # N/D is stationary where N' D = N D', a cubic equation.
            roots = (numerator.deriv() * denominator - numerator * denominator.deriv()).roots()
            real = roots.real[np.abs(roots.imag) < 1e-9 * (1 + np.abs(roots.real))]
            means = [x for x in real if low < x < high]
        variance = max((float(numerator(x) / denominator(x)) for x in means), default=0.0)
        return math.sqrt(max(variance, 0.0) / noise) / self.lr

    def _max_variance(self) -> tuple[Polynomial, Polynomial]:
        """Return N and D: at mean k, mean-square stability allows k a variance up to N(k)/D(k)."""
        of_gradient, of_momentum = self._weights
        u, w = of_gradient + of_momentum * self.gain, self.momentum * of_gradient
        trace = Polynomial([self._kept + self.momentum, -u])
        det = Polynomial([self.momentum * self._kept, -w])
        numerator = (1 - det) * (1 + det - trace) * (1 + det + trace)
        return numerator, (u * u + w * w) * (1 + det) - 2 * u * w * trace

    def mean_square_radius(self, sharpness: float, noise: float) -> float:
        """See :func:`mean_square_radius`."""
        constant, slope = matrices(self._kept, self.lr, self.as_filter)
        mean = constant + (sharpness + self.weight_decay) * slope
        moments = np.kron(mean, mean) + noise * np.kron(slope, slope)
        return float(np.abs(np.linalg.eigvals(moments)).max())


def checked_batch_size(batch_size: int, dataset_size: float | None) -> int:
    """Return ``batch_size``; ``dataset_size`` is ``None`` or infinity for a stream.

    Raises:
        ValueError: unless both are positive whole numbers, and the batch is not above the data set.
    """
    batch_size = whole("batch_size", batch_size)
    if dataset_size is None or dataset_size == math.inf:
        return batch_size
    if batch_size > whole("dataset_size", dataset_size):
        raise ValueError(f"batch_size={batch_size} is above dataset_size={dataset_size}")
    return batch_size


def noise_factor(batch_size: int, dataset_size: float | None = None) -> float:
    r"""Return :math:`p = (n-B)/(B(n-1))`, the variance of a batch mean relative to one sample's.

    Args:
        batch_size: samples B in a step.
        dataset_size: samples n to draw from; ``None`` or infinity stands for a stream, p = 1/B.

    Raises:
        ValueError: if B is not positive, or above n.

    >>> noise_factor(4), noise_factor(1, 10), noise_factor(10, 10)
    (0.25, 1.0, 0.0)
    """
    batch_size = checked_batch_size(batch_size, dataset_size)
    if dataset_size is None or dataset_size == math.inf:
        return 1.0 / batch_size
    size = int(dataset_size)  # small integers of NumPy and torch would overflow
    return 0.0 if batch_size == size else (size - batch_size) / (batch_size * (size - 1))


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
    r"""Return the smallest linearly stable sharpness; it is negative with weight decay.

    :math:`-\lambda - \frac{\lambda'(1-\beta)}{A(1-\beta)+B(1-\tau)}`; arguments and errors are those of
    :func:`max_sharpness`.

    >>> min_sharpness(0.1, weight_decay=0.5)
    -0.5
    """
    return LinearStep(lr, **step).min_sharpness


def max_non_uniformity(
    lr: float,
    batch_size: int,
    dataset_size: float | None = None,
    *,
    sharpness: float | None = None,
    **step: Unpack[StepOptions],
) -> float:
    r"""Return the largest non-uniformity at which SGD is mean-square stable in one dimension.

    Without ``sharpness`` it is the maximum over all sharpnesses, the top of the box (9). For plain SGD
    this is :math:`\frac1\eta\sqrt{B(n-1)/(n-B)}`, about :math:`\sqrt B/\eta` for large n. With
    ``sharpness`` it is the height of the exact region there. For plain SGD this is the half-ellipse
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
    linear_step = LinearStep(lr, **step)
    return linear_step.max_non_uniformity(noise_factor(batch_size, dataset_size), sharpness)


def mean_square_radius(
    sharpness: float, noise: float, lr: float, **step: Unpack[StepOptions]
) -> float:
    r"""Return the growth per step of the second moments of one linear mode: stable up to 1.

    Each step multiplies the state (x, m) by :math:`A_0 + hA_1`, where h has mean a and variance
    ``noise``. It multiplies the second moments by
    :math:`\bar A\otimes\bar A + \mathrm{noise}\,A_1\otimes A_1`. The growth is the spectral radius of
    this matrix.

    Args:
        sharpness: the mean curvature a.
        noise: the variance of the curvature from step to step, :math:`p s^2`.
        lr: learning rate.
        step: as in :func:`max_sharpness`.

    >>> round(mean_square_radius(sharpness=5.0, noise=16.0, lr=0.1), 6)   # (1 - .5)^2 + .01 * 16
    0.41
    """
    return LinearStep(lr, **step).mean_square_radius(sharpness, noise)
