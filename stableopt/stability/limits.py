r"""How sharp and how non-uniform a minimum may be for a given update rule: functions of numbers.

The setting is one linear mode of stochastic gradient descent near a minimum that every sample shares:
curvature a, standard deviation s of the per-sample curvatures, and batches of B out of n drawn without
replacement, so that the curvature seen in one step has mean a and variance :math:`p s^2`,

.. math:: p = \frac{n-B}{B(n-1)}.

Formulas for plain SGD are those of Wu, Ma & E (NeurIPS 2018), Theorem 1 and equation (9); those with
momentum, dampening and weight decay follow from the same second-moment recursion for
``torch.optim.SGD``'s update, :math:`\beta` momentum, :math:`\tau` dampening, :math:`\lambda` coupled
weight decay. :func:`mean_square_radius` is that recursion itself, and the oracle of the others.
"""

from __future__ import annotations

import math

import numpy as np

from stableopt._arguments import whole

__all__ = ["max_non_uniformity", "max_sharpness", "mean_square_radius", "noise_factor"]


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
) -> float:
    r"""Return the largest sharpness at which gradient descent is linearly stable.

    Plain: :math:`2/\eta - \lambda`; with momentum :math:`2(1+\beta)/(\eta(1-\tau)) - \lambda`; with
    Nesterov's :math:`(2+2\beta)/(\eta(1+2\beta)) - \lambda`.

    Args:
        lr: learning rate; 0 gives infinity.
        momentum: beta of ``torch.optim.SGD``, below 1.
        dampening: tau, below 1; without effect when momentum is 0, as in torch.
        nesterov: Nesterov's form of the momentum.
        weight_decay: coupled weight decay lambda.

    Raises:
        ValueError: for values out of range.

    >>> max_sharpness(0.1), round(max_sharpness(0.1, momentum=0.9), 6)
    (20.0, 38.0)
    """
    beta, tau = _checked(lr, momentum, dampening, nesterov)
    if lr == 0:
        return math.inf
    reach = (2 + 2 * beta) / (1 + 2 * beta) if nesterov else 2 * (1 + beta) / (1 - tau)
    return reach / lr - weight_decay


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
) -> float:
    r"""Return the largest non-uniformity at which SGD is mean-square stable in one dimension.

    Without ``sharpness`` it is the largest over all sharpnesses, the side of the box (9): for plain
    SGD :math:`\frac1\eta\sqrt{B(n-1)/(n-B)}`, about :math:`\sqrt B/\eta` for large n. With it, the
    height of the exact region there: for plain SGD the half-ellipse
    :math:`(1-\eta a)^2 + \eta^2 p s^2 = 1`. With :math:`e = \eta(1-\tau)`, :math:`x = e(a+\lambda)`
    and :math:`q = 1-\eta(a+\lambda)`:

    - heavy ball: :math:`p s^2 \le \frac{1-\beta}{1+\beta}\,x\,(2(1+\beta)-x)/e^2`;
    - Nesterov: :math:`p s^2 \le \{\frac{1+\beta q}{(1+\beta)^2(1-\beta q)+\beta^2(1+\beta q)}
      - q^2\}/\eta^2`.

    Args:
        lr: learning rate; 0 gives infinity.
        batch_size: samples B in a step.
        dataset_size: samples n in all; ``None`` for infinitely many. B = n gives infinity.
        sharpness: the sharpness a to look at, or ``None`` for the largest over all.
        momentum: beta of ``torch.optim.SGD``.
        dampening: tau.
        nesterov: Nesterov's form of the momentum.
        weight_decay: coupled weight decay lambda.

    Returns:
        The limit; 0 where the rule is unstable at ``sharpness`` even without noise.

    Raises:
        ValueError: for values out of range.

    >>> max_non_uniformity(0.1, 4), max_non_uniformity(0.1, 4, sharpness=10.0)
    (20.0, 20.0)
    >>> round(max_non_uniformity(0.1, 100, 1200), 1)
    104.4
    """
    beta, tau = _checked(lr, momentum, dampening, nesterov)
    p = noise_factor(batch_size, dataset_size)
    if sharpness is not None:
        edge = max_sharpness(
            lr,
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            weight_decay=weight_decay,
        )
        if not -weight_decay <= sharpness <= edge:
            return 0.0
    if lr == 0 or p == 0:
        return math.inf
    if sharpness is None:
        variance = _nesterov_peak(beta) if nesterov else (1 - beta**2) / (1 - tau) ** 2
    elif nesterov:
        variance = _nesterov_variance(1 - lr * (sharpness + weight_decay), beta)
    else:
        x = lr * (1 - tau) * (sharpness + weight_decay)
        variance = (1 - beta) / (1 + beta) * x * (2 * (1 + beta) - x) / (1 - tau) ** 2
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
) -> float:
    r"""Return the growth per step of the second moments of one linear mode: stable up to 1.

    The state (x, momentum buffer) is multiplied by :math:`A_0 + hA_1` with h random of mean a and
    variance ``noise``, so the second moments by
    :math:`\bar A\otimes\bar A + \mathrm{noise}\,A_1\otimes A_1`; this is its spectral radius.

    Args:
        sharpness: the mean curvature a.
        noise: the variance of the curvature from step to step, :math:`p s^2`.
        lr: learning rate.
        momentum: beta of ``torch.optim.SGD``.
        dampening: tau.
        nesterov: Nesterov's form of the momentum.
        weight_decay: coupled weight decay lambda.

    >>> round(mean_square_radius(sharpness=5.0, noise=16.0, lr=0.1), 6)   # (1 - .5)^2 + .01 * 16
    0.41
    """
    beta, tau = _checked(lr, momentum, dampening, nesterov)
    if nesterov:
        constant = np.array([[1.0, -lr * beta**2], [0.0, beta]])
        slope = np.array([[-lr * (1 + beta), 0.0], [1.0, 0.0]])
    else:
        constant = np.array([[1.0, -lr * beta], [0.0, beta]])
        slope = np.array([[-lr * (1 - tau), 0.0], [1 - tau, 0.0]])
    mean = constant + (sharpness + weight_decay) * slope
    moments = np.kron(mean, mean) + noise * np.kron(slope, slope)
    return float(np.abs(np.linalg.eigvals(moments)).max())


def _nesterov_variance(q: float, beta: float) -> float:
    return (1 + beta * q) / ((1 + beta) ** 2 * (1 - beta * q) + beta**2 * (1 + beta * q)) - q * q


def _nesterov_peak(beta: float) -> float:
    # Stationary in q where (1+b)^2 b (2 / D^2) = 2 q, D the denominator: a cubic.
    c0, c1 = (1 + beta) ** 2 + beta**2, beta * (beta**2 - (1 + beta) ** 2)
    roots = np.roots([c1**2, 2 * c0 * c1, c0**2, -beta * (1 + beta) ** 2])
    real = roots.real[np.abs(roots.imag) < 1e-9]
    # Stable at all needs q within (-1/(1+2b), 1).
    inside = [float(q) for q in real if -1 / (1 + 2 * beta) < q < 1]
    return max(_nesterov_variance(q, beta) for q in inside)


def _checked(lr: float, momentum: float, dampening: float, nesterov: bool) -> tuple[float, float]:
    """Return momentum and the dampening that acts, after checking the ranges."""
    if not lr >= 0:
        raise ValueError(f"lr={lr}: expected at least 0")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum={momentum}: expected at least 0 and below 1")
    if not dampening < 1:
        raise ValueError(f"dampening={dampening}: expected below 1")
    if nesterov and (momentum == 0 or dampening != 0):
        raise ValueError(
            f"nesterov with momentum={momentum}, dampening={dampening}: expected momentum above 0"
            " and no dampening"
        )
    return momentum, (dampening if momentum else 0.0)
