r"""`almost_sure_critical_lr`: the largest learning rate at which SGD converges to a minimum.

Near a minimum that fits all samples, SGD multiplies the distance x from it by random matrices,
:math:`x_{t+1} = (I-\eta H_{B_t})x_t`. Almost every run grows or shrinks at the same rate, the top
Lyapunov exponent

.. math:: \lambda(\eta) = \lim_{t\to\infty} \tfrac1t\,\mathrm{E}\log\|x_t\|

over the directions with curvature (Furstenberg & Kesten, 1960). The sign of :math:`\lambda` decides
whether SGD can converge to the minimum (Chemnitz & Engel, *Characterizing Dynamical Stability of
Stochastic Gradient Descent in Overparameterized Learning*, JMLR 26, 2025). By Jensen's inequality the
threshold of independent batches is never below :func:`~stableopt.critical_lr`, above which the mean of
:math:`\|x_t\|^2` grows. Between the two thresholds most runs converge, and rare ones dominate the mean.

The exponent has no closed form. :func:`lyapunov_exponent` averages the growth of simulated replicas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stableopt._support.arguments import whole
from stableopt.curvature import Problem
from stableopt.curvature.gram.gram import DualCurvature, Modes
from stableopt.stability.rules.limits import LinearStep
from stableopt.stability.rules.update_rule import UpdateRule
from stableopt.stability.simulated.bracketed import BracketedLR, bracketed
from stableopt.stability.simulated.replicas import Replicas

__all__ = ["Exponent", "almost_sure_critical_lr", "lyapunov_exponent"]

_BURN_IN = 4
"""The first 1/4 of the steps is left out of the mean."""

_CHECKS = 8
"""Tests for an early stop, at equal intervals."""

_EARLY = 5.0
"""Standard errors from zero for an early stop."""


@dataclass(frozen=True)
class Exponent:
    """The top Lyapunov exponent of SGD at a minimum.

    Attributes:
        per_step: growth of the logarithm of the distance per step.
        standard_error: standard error of ``per_step``, from the scatter of the replicas.
    """

    per_step: float
    standard_error: float


def lyapunov_exponent(
    modes: Modes,
    step: LinearStep,
    batch_size: int,
    *,
    reshuffled: bool = False,
    replicas: int = 32,
    steps: int = 2000,
    until_sure: bool = False,
    seed: int = 0,
) -> Exponent:
    r"""Estimate :math:`\lambda`, the growth of :math:`\log\|x\|` per step of a typical run.

    The norm weights each direction with its curvature, as the loss does. The exponent does not depend
    on the norm, but burn-in is shorter in this one.

    Args:
        modes: the samples' curvature, :attr:`~stableopt.curvature.DualCurvature.modes`.
        step: the update rule.
        batch_size: samples B in a step.
        reshuffled: whether batches are drawn without replacement within an epoch, as a shuffling
            ``DataLoader`` does; otherwise they are independent.
        replicas: the number of replicas; the standard error falls as the root of it.
        steps: simulated steps, whose first quarter is burn-in. Growth of less than about 1/``steps``
            per step appears as shrinking: directions of little curvature, which hardly shrink, still
            dominate the norm. The standard error does not include this bias.
        until_sure: stop as soon as the exponent is five standard errors from zero.
        seed: seed of the initial states and of the batches.

    Raises:
        ValueError: for arguments out of range.

    >>> modes = Modes.from_factors(torch.ones(4, 1, 1))                # all samples alike: h = 1
    >>> round(lyapunov_exponent(modes, LinearStep(0.5), 2).per_step, 6)     # log |1 - lr|
    -0.693147
    """
    runs = Replicas(modes, step, batch_size, replicas, seed)
    steps = whole("steps", steps, least=2 * _CHECKS)
    weights = modes.eigenvalues.sqrt()
    # Start along large curvature, where growth begins: it overtakes other directions only slowly.
    runs.state[0] *= modes.eigenvalues / modes.eigenvalues[-1]
    runs.state = runs.state / _norms(runs.state, weights)
    log_growth = torch.zeros(runs.count, dtype=torch.float64, device=weights.device)
    averaged_steps = 0
    estimate = Exponent(math.nan, math.inf)
    for number in range(1, steps + 1):
        if not reshuffled or not runs.remaining.shape[1]:
            runs.reshuffle()
        runs.advance()
        norms = _norms(runs.state, weights)
        smallest, largest = torch.stack(norms.aminmax()).tolist()  # one transfer to the host
        if not largest < math.inf:
            return Exponent(math.inf, 0.0)
        if smallest == 0:
            return Exponent(-math.inf, 0.0)
        runs.state = runs.state / norms
        if number <= steps // _BURN_IN:
            continue
        log_growth = log_growth + norms.squeeze(1).log()
        averaged_steps += 1
        if number == steps or (until_sure and number % (steps // _CHECKS) == 0):
            means = log_growth / averaged_steps
            estimate = Exponent(float(means.mean()), float(means.std() / runs.count**0.5))
            if until_sure and abs(estimate.per_step) > _EARLY * estimate.standard_error:
                break
    return estimate


def almost_sure_critical_lr(
    model: nn.Module | Problem | DualCurvature,
    loss_fn: Callable[[Any, Any], Tensor] | int | None = None,
    data: Any = None,
    batch_size: int | None = None,
    *,
    update_rule: UpdateRule | None = None,
    reshuffled: bool = False,
    replicas: int = 32,
    steps: int = 2000,
    seed: int = 0,
) -> BracketedLR:
    r"""Return the largest learning rate at which SGD converges to a minimum almost surely.

    It is where the top Lyapunov exponent of the linear dynamics,
    :math:`\lambda = \lim\frac1t\,\mathrm{E}\log\|(I-\eta H_{B_t})\cdots(I-\eta H_{B_1})x\|`, changes
    sign (Chemnitz & Engel, JMLR 26, 2025). Bisection finds it, with the same batches for every learning
    rate. The samples' curvature is that of Gauss–Newton matrices, which equal the samples' Hessians
    where all samples are fitted. Elsewhere SGD does not converge with a fixed learning rate, and the
    exponent describes the linear dynamics only. If it changes sign more than once, the result is one
    of the changes.

    Args:
        model: as for :func:`~stableopt.critical_lr`, like ``loss_fn``, ``data`` and ``update_rule``.
        loss_fn: the loss.
        data: the samples, all of the training set.
        batch_size: samples B in a step. After a problem it is the second argument.
        update_rule: the rule; its ``lr`` is ignored.
        reshuffled: whether batches are drawn as a shuffling ``DataLoader`` does.
        replicas: the number of replicas of the linear dynamics.
        steps: the largest number of simulated steps for each learning rate. With a wide spectrum the
            result exceeds the limit of infinitely many steps by several percent.
        seed: seed of the initial states and of the batches.

    Raises:
        ValueError, TypeError, NonFiniteError: as :func:`~stableopt.critical_lr`.

    >>> rows = torch.tensor([[0.2], [3.8]]).sqrt()                # h = 0.2 or 3.8
    >>> result = almost_sure_critical_lr(DualCurvature(rows @ rows.T, 2), 1)
    >>> round(result.value, 2), round(result.full_batch, 2)       # critical_lr is 0.5525
    (0.56, 1.0)
    """

    def growth(modes: Modes, step: LinearStep, size: int) -> tuple[float, float]:
        exponent = lyapunov_exponent(
            modes,
            step,
            size,
            reshuffled=reshuffled,
            replicas=replicas,
            steps=steps,
            until_sure=True,
            seed=seed,
        )
        return exponent.per_step, exponent.standard_error

    return bracketed(growth, model, loss_fn, data, batch_size, update_rule)


def _norms(state: Tensor, weights: Tensor) -> Tensor:
    """Return the norm of each replica's parameters and buffer together, ``(count, 1)``."""
    return (state * weights).square().sum((0, 2)).sqrt().unsqueeze(1)
