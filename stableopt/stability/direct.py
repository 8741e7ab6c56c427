"""Quantities of a measurement that are not the top eigenvalue of one operator.

Each is one function of the problem in the rule's coordinates, in :data:`DIRECT`. A new one is one more
line there, and a field of :class:`~stableopt.stability.StabilityMargins` of its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from stableopt.curvature import Problem
from stableopt.stability.margins import Measurement, StabilityMargins
from stableopt.stability.mean_square.critical_lr import critical_lr
from stableopt.stability.measure.batch_sharpness import batch_sharpness
from stableopt.stability.rules.update_rule import UpdateRule

__all__ = ["DIRECT", "Found"]


class Found(NamedTuple):
    """What was measured, its seconds left open; ``more`` are fields of the margins beside it."""

    measurement: Measurement | None
    more: Mapping[str, float]


Direct = Callable[[Problem, UpdateRule | None, StabilityMargins, int], Found]
"""``(problem, rule, margins so far, seed)``."""


_MANY = 10**12
"""Batches in a data set that stands for an infinite one, with p = 1/B."""


def _critical_lr(
    problem: Problem, rule: UpdateRule | None, margins: StabilityMargins, seed: int
) -> Found:
    if rule is None or (margins.batch_size is None and not rule.full_batch):
        raise ValueError(
            "quantities: critical_lr needs an update rule and a batch size; pass optimizer= or lr=,"
            " and batch_size="
        )
    size = margins.dataset_size
    if size is None and margins.batch_size is not None:
        size = _MANY * margins.batch_size
    found = critical_lr(
        problem,
        margins.batch_size,
        update_rule=rule,
        dataset_size=size,
        with_hessian=False,
        seed=seed,
    )
    measurement = Measurement(found.value, found.residual, found.products, 0.0, found.converged)
    return Found(measurement, {"critical_lr_lower": found.lower})


def _batch_sharpness(
    problem: Problem, rule: UpdateRule | None, margins: StabilityMargins, seed: int
) -> Found:
    if margins.batch_size is None:
        raise ValueError("quantities: batch_sharpness needs a batch size; pass batch_size=")
    found = batch_sharpness(problem, margins.batch_size, seed=seed)
    if found.value is None:
        return Found(None, {})
    relative = found.standard_error / abs(found.value) if found.value else 0.0
    # An average has no tolerance to reach; what is left of chance is its standard error.
    return Found(Measurement(found.value, relative, found.batches, 0.0, True), {})


DIRECT: dict[str, Direct] = {
    "critical_lr": _critical_lr,
    "batch_sharpness": _batch_sharpness,
}
"""How each quantity is measured, by its name."""
