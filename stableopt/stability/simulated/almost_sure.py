r"""`almost_sure_critical_lr`: the largest learning rate at which SGD converges to a minimum.

Near a minimum at which all samples are fitted, SGD multiplies the distance from it by random matrices,
:math:`x_{t+1} = (I-\eta H_{B_t})x_t`. Almost every run grows or shrinks at the same rate, the top
Lyapunov exponent

.. math:: \lambda(\eta) = \lim_{t\to\infty} \tfrac1t\,\mathrm{E}\log\|x_t\|

over the directions with curvature (Furstenberg & Kesten, 1960). The sign of :math:`\lambda` decides
whether SGD can converge to the minimum (Chemnitz & Engel, *Characterizing Dynamical Stability of
Stochastic Gradient Descent in Overparameterized Learning*, JMLR 26, 2025). By Jensen's inequality the
threshold of independent batches is never below :func:`~stableopt.critical_lr`, above which the mean of
:math:`\|x_t\|^2` grows. Between the two rare runs carry the mean, and most runs converge.

The exponent has no closed form. :func:`lyapunov_exponent` follows copies of the linear dynamics and
averages their growth.
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
"""One step in so many, at the start, is left out of the mean."""

_CHECKS = 8
"""Equal parts of the steps after which an estimate may stop early."""

_EARLY = 5.0
"""Standard errors from zero at which it does."""


@dataclass(frozen=True)
class Exponent:
    """The top Lyapunov exponent of SGD at a minimum.

    Attributes:
        per_step: growth of the logarithm of the distance in a step.
        standard_error: of ``per_step``, from the scatter of the replicas.
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
    r"""Estimate :math:`\lambda`, the growth of :math:`\log\|x\|` in a step of a typical run.

    The norm weighs each direction with its curvature, as the loss does. The exponent does not depend
    on the norm; a finite run forgets its start sooner in this one.

    Args:
        modes: the samples' curvature, :attr:`~stableopt.curvature.DualCurvature.modes`.
        step: the update rule.
        batch_size: samples B in a step.
        reshuffled: whether batches are drawn without replacement within an epoch, as a shuffling
            ``DataLoader`` does, and not independently.
        replicas: copies of the dynamics; the standard error falls as the root of their number.
        steps: for which each is followed, a quarter of them to forget the start. Growth that is slower
            than about 1/``steps`` a step is taken for shrinking, since it has not yet overtaken the
            directions of little curvature, which hardly shrink; the standard error does not tell.
        until_sure: stop as soon as the exponent is five standard errors from zero.
        seed: of the start and of the batches.

    Raises:
        ValueError: for arguments out of range.

    >>> modes = Modes.from_factors(torch.ones(4, 1, 1))                # all samples alike: h = 1
    >>> round(lyapunov_exponent(modes, LinearStep(0.5), 2).per_step, 6)     # log |1 - lr|
    -0.693147
    """
    copies = Replicas(modes, step, batch_size, replicas, seed)
    steps = whole("steps", steps, least=2 * _CHECKS)
    weights = modes.eigenvalues.sqrt()
    # A start along large curvature, where growth begins: it overtakes other directions only slowly.
    copies.state[0] *= modes.eigenvalues / modes.eigenvalues[-1]
    copies.state = copies.state / _norms(copies.state, weights)
    grown, counted = torch.zeros(copies.count, dtype=torch.float64, device=weights.device), 0
    found = Exponent(math.nan, math.inf)
    for number in range(1, steps + 1):
        if not reshuffled or not copies.rest.shape[1]:
            copies.reshuffle()
        copies.advance()
        norms = _norms(copies.state, weights)
        least, most = torch.stack(norms.aminmax()).tolist()  # one wait for the device
        if not most < math.inf:
            return Exponent(math.inf, 0.0)
        if least == 0:
            return Exponent(-math.inf, 0.0)
        copies.state = copies.state / norms
        if number <= steps // _BURN_IN:
            continue
        grown, counted = grown + norms.squeeze(1).log(), counted + 1
        if number == steps or (until_sure and not number % (steps // _CHECKS)):
            means = grown / counted
            found = Exponent(float(means.mean()), float(means.std() / copies.count**0.5))
            if until_sure and abs(found.per_step) > _EARLY * found.standard_error:
                break
    return found


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
    rate. The samples' curvature is Gauss–Newton's, which is that of the loss where all samples
    are fitted. Elsewhere SGD does not converge with a fixed learning rate, and the exponent is that
    of the linear dynamics alone. It may change sign more than once: the result is one of the changes.

    Args:
        model: as for :func:`~stableopt.critical_lr`, like ``loss_fn``, ``data`` and ``update_rule``.
        loss_fn: the loss.
        data: the samples, all of the training set.
        batch_size: samples B in a step. After a problem it is the second argument.
        update_rule: the rule; its ``lr`` is ignored.
        reshuffled: whether batches are drawn as a shuffling ``DataLoader`` does.
        replicas: copies of the linear dynamics.
        steps: for which each learning rate is followed at most. With a wide spectrum the threshold of
            runs of that length is several percent above that of runs without end.
        seed: of the batches.

    Raises:
        ValueError, TypeError, NonFiniteError: as :func:`~stableopt.critical_lr`.

    >>> rows = torch.tensor([[0.2], [3.8]]).sqrt()                # h = 0.2 or 3.8
    >>> found = almost_sure_critical_lr(DualCurvature(rows @ rows.T, 2), 1)
    >>> round(found.value, 2), round(found.full_batch, 2)         # critical_lr is 0.5525
    (0.56, 1.0)
    """

    def growth(modes: Modes, step: LinearStep, size: int) -> tuple[float, float]:
        found = lyapunov_exponent(
            modes,
            step,
            size,
            reshuffled=reshuffled,
            replicas=replicas,
            steps=steps,
            until_sure=True,
            seed=seed,
        )
        return found.per_step, found.standard_error

    return bracketed(growth, model, loss_fn, data, batch_size, update_rule)


def _norms(state: Tensor, weights: Tensor) -> Tensor:
    """Return the norm of each copy's parameter and buffer, ``(count, 1)``."""
    return (state * weights).square().sum((0, 2)).sqrt().unsqueeze(1)
