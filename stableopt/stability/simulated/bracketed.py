"""`bracketed`: bisection for a critical learning rate in noisy growth rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from stableopt._support.arguments import positive
from stableopt.curvature import Problem
from stableopt.curvature.gram.gram import DualCurvature, Modes
from stableopt.stability.mean_square.choice import step_of
from stableopt.stability.mean_square.critical_lr import problem_and_number
from stableopt.stability.rules.limits import LinearStep
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["BracketedLR", "bracketed", "critical"]

GrowthFunction = Callable[[Modes, LinearStep, int], tuple[float, float]]
"""``(curvature, step, batch size) -> (growth rate, its standard error)``."""

_SURE = 2.0
"""Standard errors from zero at which the sign of a growth rate counts as known."""

_BISECTIONS = 12
"""They narrow a factor of two to a relative 2e-4, less than the noise of the growth rates."""

_DOUBLINGS = 5
"""The upper end of the first bracket is 1, 2, 4, 8 or 16 times the limit without noise."""


@dataclass(frozen=True)
class BracketedLR:
    """A critical learning rate from simulations of the linear dynamics, with its bracket.

    Attributes:
        value: the learning rate at which the estimated growth rate is zero; infinity if the dynamics
            grow at none of 1, 2, 4, 8 and 16 times ``full_batch``.
        lower: the largest one tried whose growth rate is negative by two standard errors, or 0.
        upper: the smallest whose growth rate is positive by two standard errors, or infinity.
        full_batch: the largest stable learning rate without noise; ``value`` may exceed it.
    """

    value: float
    lower: float
    upper: float
    full_batch: float


def critical(growth: Callable[[float], tuple[float, float]], full_batch: float) -> BracketedLR:
    """Return the learning rate at which a growth rate becomes positive, by bisection.

    Args:
        growth: ``lr -> (growth rate, standard error)``; not positive at 0.
        full_batch: the first learning rate tried; it is doubled until the growth rate is positive.

    >>> threshold = critical(lambda lr: (lr - 0.3, 0.01), 1.0)
    >>> round(threshold.value, 2), round(threshold.lower, 2), round(threshold.upper, 2)
    (0.3, 0.25, 0.38)
    """
    lower, upper = 0.0, math.inf

    def grows(lr: float) -> bool:
        nonlocal lower, upper
        rate, error = growth(lr)
        if rate > _SURE * error:
            upper = lr
        elif rate < -_SURE * error:
            lower = lr
        return rate > 0

    for doublings in range(_DOUBLINGS):
        high = 2**doublings * full_batch
        if grows(high):
            break
    else:
        return BracketedLR(math.inf, lower, upper, full_batch)
    low = high / 2 if doublings else 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle) else (middle, high)
    return BracketedLR(min(high, (low + high) / 2), lower, upper, full_batch)


def bracketed(
    growth: GrowthFunction,
    model: nn.Module | Problem | DualCurvature,
    loss_fn: Any,
    data: Any,
    batch_size: int | None,
    update_rule: UpdateRule | None,
) -> BracketedLR:
    """Return the learning rate at which ``growth`` becomes positive for SGD at a minimum.

    The other arguments and the errors are those of :func:`~stableopt.critical_lr`.
    """
    problem, size = problem_and_number(batch_size, model, loss_fn, data, update_rule)
    step = step_of(problem, update_rule)
    positive("batch_size", size)
    assert size is not None
    dual = problem if isinstance(problem, DualCurvature) else DualCurvature.from_problem(problem)
    modes, edge = dual.modes, step.max_lr(dual.sharpness)
    has_noise = len(modes.eigenvalues) > 0 and size != dual.num_samples
    if not has_noise:
        return BracketedLR(edge, edge, edge, edge)
    return critical(lambda lr: growth(modes, replace(step, lr=lr), size), edge)
