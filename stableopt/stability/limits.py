r"""How sharp and how non-uniform a minimum may be for a given update rule: functions of numbers.

The setting is one linear mode of stochastic gradient descent near a minimum that every sample shares:
curvature a, standard deviation s of the per-sample curvatures, and batches of B out of n drawn without
replacement, so that the curvature seen in one step has mean a and variance :math:`p s^2`,

.. math:: p = \frac{n-B}{B(n-1)}.

The step, with its coefficients A, B, c, :math:`\beta`, :math:`\tau`, u and w, is in
:mod:`~stableopt.stability.linear_mode`. For plain SGD the limits are Theorem 1 and equation (9) of Wu,
Ma & E (NeurIPS 2018). :func:`mean_square_radius` is the recursion of second moments itself, and the
oracle of the others.
"""

from __future__ import annotations

import math

import numpy as np

from stableopt._arguments import whole
from stableopt.stability.linear_mode import linear_mode

__all__ = [
    "max_non_uniformity",
    "max_sharpness",
    "mean_square_radius",
    "min_sharpness",
    "noise_factor",
]


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


def max_sharpness(
    lr: float,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: float = 0.0,
    momentum_share: float = 1.0,
) -> float:
    r"""Return the largest sharpness at which gradient descent is linearly stable.

    :math:`\frac{(1+\beta)(1+c)}{\eta\,[A(1+\beta)+B(1-\tau)]}-\lambda`:

    - plain: :math:`2/\eta-\lambda`;
    - heavy ball: :math:`2(1+\beta)/(\eta(1-\tau)) - \lambda`;
    - Nesterov: :math:`(2+2\beta)/(\eta(1+2\beta)) - \lambda`;
    - AdamW's step, :math:`\tau=\beta`: :math:`(1+\beta)(2-\eta\lambda')/(\eta(1-\beta))`.

    Args:
        lr: learning rate; 0 gives infinity.
        momentum: beta of ``torch.optim.SGD``, below 1.
        dampening: tau, below 1; without effect when momentum is 0, as in torch.
        nesterov: Nesterov's form of the momentum.
        weight_decay: coupled weight decay lambda, a part of the gradient.
        decoupled_weight_decay: lambda', by which parameters shrink beside the step.
        momentum_share: nu, between 0 and 1: the step is along (1 - nu) g + nu m.

    Raises:
        ValueError: for values out of range.

    >>> max_sharpness(0.1), round(max_sharpness(0.1, momentum=0.9), 6)
    (20.0, 38.0)
    """
    mode = linear_mode(lr, momentum, dampening, nesterov, decoupled_weight_decay, momentum_share)
    if lr == 0:
        return math.inf
    reach = (1 + mode.beta) * (1 + mode.kept) / (mode.now * (1 + mode.beta) + mode.averaged)
    return reach / lr - weight_decay


def min_sharpness(
    lr: float,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: float = 0.0,
    momentum_share: float = 1.0,
) -> float:
    r"""Return the sharpness below which there is no minimum that the step could settle at.

    :math:`-\lambda - \frac{\lambda'(1-\beta)}{A(1-\beta)+B(1-\tau)}`; arguments and errors are those of
    :func:`max_sharpness`.

    >>> min_sharpness(0.1, weight_decay=0.5)
    -0.5
    """
    mode = linear_mode(lr, momentum, dampening, nesterov, decoupled_weight_decay, momentum_share)
    # A root at 1: the momentum has come to rest at (1 - tau) g / (1 - beta).
    pull = mode.now + mode.averaged / (1 - mode.beta)
    return -weight_decay - decoupled_weight_decay / pull


def max_non_uniformity(
    lr: float,
    batch_size: int,
    dataset_size: int | None = None,
    *,
    sharpness: float | None = None,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: float = 0.0,
    momentum_share: float = 1.0,
) -> float:
    r"""Return the largest non-uniformity at which SGD is mean-square stable in one dimension.

    Without ``sharpness`` it is the largest over all sharpnesses, the side of the box (9): for plain
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
        dataset_size: samples n in all; ``None`` for infinitely many. B = n gives infinity.
        sharpness: the sharpness a to look at, or ``None`` for the largest over all.
        momentum: beta of ``torch.optim.SGD``.
        dampening: tau.
        nesterov: Nesterov's form of the momentum.
        weight_decay: coupled weight decay lambda.
        decoupled_weight_decay: lambda', as in :func:`max_sharpness`.
        momentum_share: nu, as in :func:`max_sharpness`.

    Returns:
        The limit; 0 where the rule is unstable at ``sharpness`` even without noise.

    Raises:
        ValueError: for values out of range.

    >>> max_non_uniformity(0.1, 4), max_non_uniformity(0.1, 4, sharpness=10.0)
    (20.0, 20.0)
    >>> round(max_non_uniformity(0.1, 100, 1200), 1)
    104.4
    """
    mode = linear_mode(lr, momentum, dampening, nesterov, decoupled_weight_decay, momentum_share)
    p = noise_factor(batch_size, dataset_size)
    low, high = mode.range
    x = None if sharpness is None else lr * (sharpness + weight_decay)
    if x is not None and not low <= x <= high:
        return 0.0
    if lr == 0 or p == 0:
        return math.inf
    variance = mode.peak() if x is None else mode.variance(x)
    return math.sqrt(max(variance, 0.0) / p) / lr


def mean_square_radius(
    sharpness: float,
    noise: float,
    lr: float,
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    decoupled_weight_decay: float = 0.0,
    momentum_share: float = 1.0,
) -> float:
    r"""Return the growth per step of the second moments of one linear mode: stable up to 1.

    The state (x, m) is multiplied by :math:`A_0 + hA_1` with h random of mean a and variance
    ``noise``, so the second moments by
    :math:`\bar A\otimes\bar A + \mathrm{noise}\,A_1\otimes A_1`; this is its spectral radius.

    Args:
        sharpness: the mean curvature a.
        noise: the variance of the curvature from step to step, :math:`p s^2`.
        lr: learning rate.
        momentum: beta of ``torch.optim.SGD``.
        dampening: tau.
        nesterov: Nesterov's form of the momentum.
        weight_decay: coupled weight decay lambda.
        decoupled_weight_decay: lambda', as in :func:`max_sharpness`.
        momentum_share: nu, as in :func:`max_sharpness`.

    >>> round(mean_square_radius(sharpness=5.0, noise=16.0, lr=0.1), 6)   # (1 - .5)^2 + .01 * 16
    0.41
    """
    mode = linear_mode(lr, momentum, dampening, nesterov, decoupled_weight_decay, momentum_share)
    constant = np.array([[mode.kept, -lr * mode.weight * mode.beta], [0.0, mode.beta]])
    slope = np.array([[-lr * (mode.now + mode.averaged), 0.0], [mode.gain, 0.0]])
    mean = constant + (sharpness + weight_decay) * slope
    moments = np.kron(mean, mean) + noise * np.kron(slope, slope)
    return float(np.abs(np.linalg.eigvals(moments)).max())
