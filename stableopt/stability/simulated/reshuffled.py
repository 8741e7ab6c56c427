r"""`reshuffled_critical_lr`: the threshold of SGD with a shuffling ``DataLoader``.

:func:`~stableopt.critical_lr` takes batches that are drawn independently. A shuffling loader
draws *without replacement within an epoch*: the batches of an epoch add up to the whole set, so that
what one batch has too much of another has too little of, and SGD can stay at larger learning rates.
One epoch multiplies the second moment by the operator

.. math:: X \mapsto E_\pi\bigl[A_\pi X A_\pi^\top\bigr], \qquad
    A_\pi = (I-\eta H_{B_K})\cdots(I-\eta H_{B_1}),

a mean over all orders :math:`\pi` of the n samples, cut into :math:`K = \lceil n/B\rceil` batches. The
minimum is linearly stable in mean square if its spectral radius is at most 1. The mean has n! terms and
no closed form, since the batches of an epoch depend on one another. :func:`reshuffled_growth` estimates
the logarithm of the radius by a population: copies of the linear dynamics, each with an order of its
own. Those that have grown are continued more often (*go with the winners*, Grassberger,
Comput. Phys. Commun. 2002; Del Moral, *Feynman-Kac Formulae*, 2004). A plain average over independent
copies would not do: rare copies carry the second moment.
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

__all__ = ["Growth", "reshuffled_critical_lr", "reshuffled_growth"]

_BURN_IN = 4
"""One epoch in so many, at the start, while the population turns to the growing directions."""

_BLOCK = 3
"""Epochs in a block for the standard error, since neighbouring epochs depend on each other."""

_LEAST_EPOCHS = 8
"""Those after the start are two blocks: one has no spread."""

_EARLY = 5.0
"""Standard errors from zero at which the estimate stops early: it has many chances to seem sure."""

_LEAST = 12
"""Epochs before it may stop: nine after those at the start, three blocks."""


@dataclass(frozen=True)
class Growth:
    """How fast the second moment grows.

    Attributes:
        per_epoch: logarithm of the factor in an epoch.
        standard_error: of ``per_epoch``, from blocks of epochs.
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
    r"""Estimate by what factor an epoch multiplies the second moment :math:`E\|x\|^2`.

    Args:
        modes: the samples' curvature, :attr:`~stableopt.curvature.DualCurvature.modes`.
        step: the update rule; momentum is kept from epoch to epoch.
        batch_size: samples B in a step. The last batch of an epoch has fewer if B does not divide n.
        replicas: copies of the dynamics; the bias of the result falls as 1/``replicas``.
        epochs: that they are followed, a quarter of them to forget the start.
        drop_last: leave out a last batch that is smaller, as the ``DataLoader`` does.
        until_sure: stop as soon as the growth is five standard errors from zero.
        seed: of the orders and of the choice of copies.

    Raises:
        ValueError: for arguments out of range.

    >>> modes = Modes.from_factors(torch.ones(4, 1, 1))                # all samples alike: h = 1
    >>> round(reshuffled_growth(modes, LinearStep(0.5), 2).per_epoch, 6)    # log (1 - lr)^4
    -2.772589
    """
    copies = Replicas(modes, step, batch_size, replicas, seed)
    epochs = whole("epochs", epochs, least=_LEAST_EPOCHS)
    n = modes.factors.shape[0]
    batches = n // copies.batch_size if drop_last else math.ceil(n / copies.batch_size)
    grown = []
    for _ in range(epochs):
        total = 0.0
        copies.reshuffle()
        for _ in range(batches):
            copies.advance()
            weights = copies.state.square().sum((0, 2))
            if copies.rest.shape[1] and _effective(weights) > copies.count / 2:
                continue
            if not bool(torch.isfinite(weights).all()):
                return Growth(math.inf, 0.0)
            if not bool(weights.any()):
                return Growth(-math.inf, 0.0)
            total += float(weights.mean().log())
            kept = _resampled(weights, float(copies.uniform(1)))
            copies.state = copies.state[:, kept] / weights[kept].sqrt().unsqueeze(1)
            # Copies of one replica part again: what is left of their epoch is in an order of its own.
            apart = copies.uniform(*copies.rest.shape).argsort(1)
            copies.rest = copies.rest[kept].gather(1, apart)
        grown.append(total)
        if until_sure and len(grown) >= _LEAST and len(grown) % _BLOCK == 0:
            found = _mean(grown)
            if abs(found.per_epoch) > _EARLY * found.standard_error:
                return found
    return _mean(grown)


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

    It is where the second moment stops shrinking in an epoch, found by bisection with the same
    orders for every learning rate. It may be above the limit of the full batch: what one batch of an
    epoch makes grow another may shrink. The samples' curvature is Gauss–Newton's, which is that of the
    loss where all samples are fitted.

    Args:
        model: as for :func:`~stableopt.critical_lr`, like ``loss_fn``, ``data`` and ``update_rule``.
        loss_fn: the loss.
        data: the samples, all of the training set.
        batch_size: samples B in a step. After a problem it is the second argument.
        update_rule: the rule; its ``lr`` is ignored.
        replicas: copies of the linear dynamics; the bias of the result falls as 1/``replicas``.
        epochs: the largest number of epochs for which each learning rate is followed.
        seed: of the orders.

    Raises:
        ValueError, TypeError, NonFiniteError: as :func:`~stableopt.critical_lr`.

    >>> rows = torch.tensor([[1.0, 2.0], [1.0, -1.0], [1.0, 0.5], [0.3, -1.2]])
    >>> dual = DualCurvature(rows @ rows.T, 4)
    >>> found = reshuffled_critical_lr(dual, 1)      # critical_lr, of independent batches, is 0.51
    >>> round(found.value, 1), round(found.full_batch, 2)
    (0.9, 1.14)
    """

    def growth(modes: Modes, step: LinearStep, size: int) -> tuple[float, float]:
        found = reshuffled_growth(
            modes, step, size, replicas=replicas, epochs=epochs, until_sure=True, seed=seed
        )
        return found.per_epoch, found.standard_error

    return bracketed(growth, model, loss_fn, data, batch_size, update_rule)


def _mean(grown: list[float]) -> Growth:
    """Return the mean over epochs after those at the start, and its standard error."""
    kept_epochs = torch.tensor(grown[len(grown) // _BURN_IN :], dtype=torch.float64)
    blocks = torch.stack(
        [block.mean() for block in torch.split(kept_epochs, _BLOCK) if len(block) == _BLOCK]
    )
    error = float(blocks.std() / len(blocks) ** 0.5)
    return Growth(float(kept_epochs.mean()), error)


def _effective(weights: Tensor) -> float:
    """Return the effective number of replicas."""
    return float(weights.sum() ** 2 / weights.square().sum())


def _resampled(weights: Tensor, offset: float) -> Tensor:
    """Return which replicas continue, each about as often as its weight says."""
    count = len(weights)
    points = (torch.arange(count, device=weights.device, dtype=weights.dtype) + offset) / count
    shares = weights.cumsum(0) / weights.sum()
    return torch.searchsorted(shares, points).clamp_(max=count - 1)
