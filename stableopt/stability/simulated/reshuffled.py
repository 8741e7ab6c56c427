r"""`reshuffled_critical_lr`: the threshold of SGD with a shuffling ``DataLoader``.

:func:`~stableopt.critical_lr` assumes independent batches. A shuffling loader draws *without
replacement within an epoch*: the batches of an epoch add up to the training set, so their deviations
from the mean cancel, and SGD can stay at larger learning rates. One epoch applies the operator

.. math:: X \mapsto E_\pi\bigl[A_\pi X A_\pi^\top\bigr], \qquad
    A_\pi = (I-\eta H_{B_K})\cdots(I-\eta H_{B_1}),

to the second moment X, a mean over all orders :math:`\pi` of the n samples, cut into
:math:`K = \lceil n/B\rceil` batches. The minimum is linearly stable in mean square if the operator's
spectral radius is at most 1. The mean has n! terms and no closed form, since the batches of an epoch
depend on one another. :func:`reshuffled_growth` estimates the logarithm of the radius by population
Monte Carlo: replicas of the linear dynamics are resampled in proportion to their squared norm
(*go with the winners*, Grassberger, Comput. Phys. Commun. 2002; Del Moral, *Feynman-Kac Formulae*,
2004), times the growth that their remaining samples promise
(:mod:`~stableopt.stability.simulated.forecast`). A plain average over independent replicas fails: rare
ones dominate the second moment.
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
from stableopt.stability.simulated.forecast import Forecast
from stableopt.stability.simulated.replicas import Replicas

__all__ = ["Growth", "reshuffled_critical_lr", "reshuffled_growth"]

_BURN_IN = 4
"""The first 1/4 of the epochs is left out: the population turns to the growing directions."""

_BLOCK = 3
"""Epochs in a block for the standard error, since successive epochs are correlated."""

_MIN_EPOCHS = 7
"""Without the first quarter, two blocks: the fewest that have a spread."""

_DEGENERATE = 0.1
"""Effective share of replicas at which some are selected before the end of an epoch. A forecast is
rough, so selection by it adds noise: from 0.5 the growth of five samples in batches of three came out at
0.05 instead of 0.52, from 0.1 at 0.52."""

_FEW_BLOCKS = {1: 6.4, 2: 2.2}
"""By degrees of freedom: half of Student's 95 % quantile, so that two errors hold 95 % as usual."""

_EARLY = 5.0
"""Standard errors from zero for an early stop; many, since the test is repeated."""

_MIN_EPOCHS_EARLY = 12
"""Epochs before an early stop: without the first quarter, three blocks."""


@dataclass(frozen=True)
class Growth:
    """The growth rate of the second moment.

    Attributes:
        per_epoch: logarithm of the factor of one epoch.
        standard_error: standard error of ``per_epoch``, from the scatter of blocks of epochs. It
            includes the uncertainty of the corrected bias, and is wider for few blocks, so that two of
            it hold about 95 %. It does not include growth that is too slow to appear within the epochs.
    """

    per_epoch: float
    standard_error: float


def reshuffled_growth(
    modes: Modes,
    step: LinearStep,
    batch_size: int,
    *,
    replicas: int = 128,
    epochs: int = 48,
    drop_last: bool = False,
    until_sure: bool = False,
    seed: int = 0,
) -> Growth:
    r"""Estimate the factor by which an epoch multiplies the second moment :math:`E\|x\|^2`.

    Args:
        modes: the samples' curvature, :attr:`~stableopt.curvature.DualCurvature.modes`.
        step: the update rule; momentum is kept from epoch to epoch.
        batch_size: samples B in a step. The last batch of an epoch has fewer if B does not divide n.
        replicas: the number of replicas. The logarithm of a noisy estimate is biased low; the bias is
            estimated and corrected. It falls as 1/``replicas``.
        epochs: simulated epochs, whose first quarter is burn-in. Replicas start along large curvature.
            Where other directions grow more than those by less than about 1/``epochs`` per epoch, the
            result is the growth of those.
        drop_last: whether to leave out a smaller last batch, as ``DataLoader(drop_last=True)`` does.
        until_sure: stop as soon as the growth is five standard errors from zero.
        seed: seed of the orders and of the resampling.

    Raises:
        ValueError: for arguments out of range.

    >>> modes = Modes.from_factors(torch.ones(4, 1, 1))                # all samples alike: h = 1
    >>> round(reshuffled_growth(modes, LinearStep(0.5), 2).per_epoch, 6)    # log (1 - lr)^4
    -2.772589
    """
    population = Replicas(modes, step, batch_size, replicas, seed)
    epochs = whole("epochs", epochs, least=_MIN_EPOCHS)
    n = modes.factors.shape[0]
    batches = n // population.batch_size if drop_last else math.ceil(n / population.batch_size)
    forecast = Forecast(
        *(n, population.batch_size, population.count, modes.factors.device), drop_last=drop_last
    )
    h = modes.eigenvalues
    # Start along large curvature, where growth begins: from an isotropic start, directions of little
    # curvature, which hardly shrink, would hide it for many epochs.
    population.state[0] *= h / h[-1]
    population.state /= _squared_norms(population.state).sqrt().unsqueeze(1)
    log_factors = []
    for _ in range(epochs):
        log_factor = 0.0
        population.reshuffle()
        forecast.begin_epoch()
        before = _squared_norms(population.state)
        for number in range(1, batches + 1):
            batch, weights = population.advance(), before * forecast.log_growth.exp()
            after = _squared_norms(population.state)
            if not bool(torch.isfinite(after).all()):
                return Growth(math.inf, 0.0)
            if not bool(after.any()):
                return Growth(-math.inf, 0.0)
            growth = torch.where(before > 0, after / before, 0.0)
            forecast.observe(batch, weights, growth, left=population.remaining.shape[1])
            before = after
            weights = after * forecast.log_growth.exp()
            if number < batches and _effective_size(weights) > _DEGENERATE * population.count:
                continue
            log_factor += float(weights.mean().log())
            chosen = _resample(weights, float(population.uniform(1)))
            forecast.select(chosen)
            # Of equal weight: the forecast and the squared norm multiply to 1.
            before = (-forecast.log_growth).exp()
            scale = (before / after[chosen]).sqrt()
            population.state = population.state[:, chosen] * scale.unsqueeze(1)
            # Duplicates of a replica separate by a new order of the epoch's remaining samples.
            order = population.uniform(*population.remaining.shape).argsort(1)
            population.remaining = population.remaining[chosen].gather(1, order)
        log_factors.append(log_factor)
        count = len(log_factors)
        if until_sure and count >= _MIN_EPOCHS_EARLY and count % _BLOCK == 0:
            estimate = _mean_growth(log_factors)
            if abs(estimate.per_epoch) > _EARLY * estimate.standard_error:
                return estimate
    return _mean_growth(log_factors)


def reshuffled_critical_lr(
    model: nn.Module | Problem | DualCurvature,
    loss_fn: Callable[[Any, Any], Tensor] | int | None = None,
    data: Any = None,
    batch_size: int | None = None,
    *,
    update_rule: UpdateRule | None = None,
    replicas: int = 128,
    epochs: int = 48,
    seed: int = 0,
) -> BracketedLR:
    r"""Return the largest learning rate at which SGD with a shuffling ``DataLoader`` can stay.

    At this rate the second moment neither grows nor shrinks in an epoch. Bisection finds it, with the
    same orders for every learning rate. It may exceed the limit of the full batch, since a direction
    that grows on one batch of an epoch may shrink on another. The samples' curvature is that of
    Gauss–Newton matrices, which equal the samples' Hessians where all samples are fitted.

    Args:
        model: as for :func:`~stableopt.critical_lr`, like ``loss_fn``, ``data`` and ``update_rule``.
        loss_fn: the loss.
        data: the samples, all of the training set.
        batch_size: samples B in a step. After a problem it is the second argument.
        update_rule: the rule; its ``lr`` is ignored.
        replicas: the number of replicas; the bracket narrows as one over the root of it.
        epochs: the largest number of simulated epochs for each learning rate.
        seed: seed of the orders and of the resampling.

    Raises:
        ValueError, TypeError, NonFiniteError: as :func:`~stableopt.critical_lr`.

    >>> rows = torch.tensor([[1.0, 2.0], [1.0, -1.0], [1.0, 0.5], [0.3, -1.2]])
    >>> dual = DualCurvature(rows @ rows.T, 4)
    >>> result = reshuffled_critical_lr(dual, 1)     # critical_lr, of independent batches, is 0.51
    >>> round(result.value, 1), round(result.full_batch, 2)
    (0.9, 1.14)
    """

    def growth(modes: Modes, step: LinearStep, size: int) -> tuple[float, float]:
        estimate = reshuffled_growth(
            modes, step, size, replicas=replicas, epochs=epochs, until_sure=True, seed=seed
        )
        return estimate.per_epoch, estimate.standard_error

    return bracketed(growth, model, loss_fn, data, batch_size, update_rule)


def _mean_growth(log_factors: list[float]) -> Growth:
    """Return the mean over the epochs after burn-in without its bias, and its standard error.

    The estimated product of the epochs' factors is unbiased, and its logarithm about normal. The mean
    of a normal logarithm is below the logarithm of the mean by half its variance, which the scatter of
    blocks gives.
    """
    settled = log_factors[len(log_factors) // _BURN_IN :]
    epochs = torch.tensor(settled, dtype=torch.float64, device="cpu")
    means = [block.mean() for block in torch.split(epochs, _BLOCK) if len(block) == _BLOCK]
    error = float(torch.stack(means).std() / len(means) ** 0.5)
    bias, freedom = error**2 * len(epochs) / 2, len(means) - 1
    # The standard deviation of Student's t, which is not finite for the fewest blocks.
    wider = (freedom / (freedom - 2)) ** 0.5 if freedom > 2 else _FEW_BLOCKS[freedom]
    return Growth(
        float(epochs.mean()) + bias, wider * math.hypot(error, bias * (2 / freedom) ** 0.5)
    )


def _squared_norms(state: Tensor) -> Tensor:
    """Return the squared norm of each replica's parameters and buffer together, ``(count,)``."""
    return state.square().sum((0, 2))


def _effective_size(weights: Tensor) -> float:
    """Return the effective sample size of weighted replicas."""
    return float(weights.sum() ** 2 / weights.square().sum())


def _resample(weights: Tensor, offset: float) -> Tensor:
    """Return indices of replicas, each about as often as its weight says (systematic resampling)."""
    count = len(weights)
    points = (torch.arange(count, device=weights.device, dtype=weights.dtype) + offset) / count
    shares = weights.cumsum(0) / weights.sum()
    return torch.searchsorted(shares, points).clamp_(max=count - 1)
