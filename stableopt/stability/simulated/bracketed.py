"""`BracketedLR`: where a simulated growth begins; `bracketed`: the search for it."""

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
from stableopt.stability.mean_square.critical_lr import problem_and
from stableopt.stability.rules.limits import LinearStep
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["BracketedLR", "bracketed", "critical"]

Growing = Callable[[Modes, LinearStep, int], tuple[float, float]]
"""Takes the samples' curvature, a step and a batch size; returns a growth and its standard error."""

_SURE = 2.0
"""Standard errors from zero at which the sign of a growth counts as known."""

_BISECTIONS = 12
"""A bracket of a factor of two is then within 2e-4, finer than any growth is known."""

_DOUBLINGS = 5
"""Learning rates of 1, 2, 4, 8 and 16 times the limit without noise are tried for one that grows."""


@dataclass(frozen=True)
class BracketedLR:
    """A critical learning rate that copies of the linear dynamics have found, with its bracket.

    Attributes:
        value: where the estimated growth is zero; infinity if none of 1, 2, 4, 8 and 16 times
            ``full_batch`` grows.
        lower: the largest learning rate tried that surely shrinks, or 0.
        upper: the smallest that surely grows, or infinity. Surely means by two standard errors.
        full_batch: the largest learning rate without noise. With noise the threshold may be above it.
    """

    value: float
    lower: float
    upper: float
    full_batch: float


def critical(growth: Callable[[float], tuple[float, float]], full_batch: float) -> BracketedLR:
    """Return where a growth changes from falling to rising, and a bracket for it, by bisection.

    Args:
        growth: takes a learning rate, and returns its growth with a standard error. 0 does not grow.
        full_batch: the learning rate from which on one that grows is looked for.

    >>> found = critical(lambda lr: (lr - 0.3, 0.01), 1.0)
    >>> round(found.value, 2), round(found.lower, 2), round(found.upper, 2)
    (0.3, 0.25, 0.38)
    """
    low, lower, upper = 0.0, 0.0, math.inf

    def grows(lr: float) -> bool:
        nonlocal lower, upper
        value, error = growth(lr)
        if abs(value) > _SURE * error:
            lower, upper = (lower, lr) if value > 0 else (lr, upper)
        return value > 0

    high = next((lr for k in range(_DOUBLINGS) if grows(lr := 2**k * full_batch)), math.inf)
    if high < math.inf:
        low = high / 2 if high > full_batch else 0.0
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if grows(middle) else (middle, high)
    return BracketedLR(min(high, (low + high) / 2), lower, upper, full_batch)


def bracketed(
    growth: Growing,
    model: nn.Module | Problem | DualCurvature,
    loss_fn: Any,
    data: Any,
    batch_size: int | None,
    update_rule: UpdateRule | None,
) -> BracketedLR:
    """Return the learning rate at which ``growth`` begins for SGD at a minimum.

    The arguments after the first are those of :func:`~stableopt.critical_lr`, and so are the errors.
    """
    problem, size = problem_and(batch_size, model, loss_fn, data, update_rule)
    step = step_of(problem, update_rule)
    positive("batch_size", size)
    assert size is not None
    dual = problem if isinstance(problem, DualCurvature) else DualCurvature.from_problem(problem)
    modes, edge = dual.modes, step.max_lr(dual.sharpness)
    if not len(modes.eigenvalues) or size == dual.num_samples:  # without noise
        return BracketedLR(edge, edge, edge, edge)
    return critical(lambda lr: growth(modes, replace(step, lr=lr), size), edge)
