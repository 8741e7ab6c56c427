"""`Thresholds`: the job that computes a minimum's critical learning rates by batch size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import stableopt
from benchmarks.runner import Job, Work
from benchmarks.training.loops import mean_squared_error
from benchmarks.training.minimum import Solution, Start, from_minimum
from benchmarks.training.spec import LOST
from benchmarks.training.update import SGD, Update
from stableopt import UpdateRule
from stableopt.curvature import DualCurvature
from stableopt.stability.rules.coordinates import in_rule_coordinates

__all__ = ["Allowed", "Threshold", "Thresholds", "curvature_of"]


@dataclass(frozen=True)
class Threshold:
    """The largest stable learning rates for a batch size.

    Attributes:
        theorem1: by condition (8); ``None`` with momentum, which it does not cover.
        critical_lr: the mean-square threshold, or the upper end of its interval.
        critical_lr_lower: the lower end of its interval.
        exact: whether the interval is a point.
    """

    theorem1: float | None
    critical_lr: float
    critical_lr_lower: float
    exact: bool


@dataclass(frozen=True)
class Allowed:
    """The stable learning rates at a minimum: ``full_batch``, which is 2/a for SGD, and by batch size.

    If training diverged or collapsed, ``full_batch`` is ``None`` and ``by_batch_size`` is empty.
    Sharpness and non-uniformity are those of Gauss–Newton matrices in the update's coordinates.
    """

    full_batch: float | None
    by_batch_size: dict[str, dict[str, Any]]
    sharpness: float | None = None
    non_uniformity: float | None = None

    def at(self, batch_size: int) -> Threshold:
        """Return the thresholds for a batch size."""
        return Threshold(**self.by_batch_size[str(batch_size)])


@dataclass(frozen=True)
class Thresholds(Job):
    """The thresholds of SGD's learning rate at a minimum.

    Attributes:
        start: the minimum.
        batch_sizes: one threshold for each.
        update: the update rule from the minimum on.

    The result is an :class:`Allowed`.
    """

    kind = "thresholds"
    Result: ClassVar = Allowed

    start: Solution
    batch_sizes: tuple[int, ...]
    update: Update = SGD

    @property
    def needs(self) -> tuple[Job, ...]:
        """The minimum."""
        return (self.start,)

    @property
    def flops(self) -> float:
        """About 15 applications of the second-moment operator, 4 (nC)^3 each."""
        return 15 * 4 * len(self.batch_sizes) * (10.0 * self.start.data.n) ** 3

    def run(self, work: Work) -> dict[str, Any]:
        """Compute all thresholds from one Gram matrix."""
        if work.result(self.start).outcome in LOST:
            return {"full_batch": None, "by_batch_size": {}}
        start = from_minimum(self.start, work, allow_unfinished=True)
        dual = curvature_of(start, self.update)
        result: dict[str, Any] = {"full_batch": None, "by_batch_size": {}}
        result |= {"sharpness": dual.sharpness, "non_uniformity": dual.non_uniformity}
        for index, size in enumerate(self.batch_sizes):
            work.progress(index / len(self.batch_sizes), f"thresholds, B = {size}")
            rule = self.update.rule(1.0)
            critical = stableopt.critical_lr(dual, batch_size=size, update_rule=rule)
            result["full_batch"] = critical.full_batch
            result["by_batch_size"][size] = {
                "theorem1": critical.theorem1,
                "critical_lr": critical.value,
                "critical_lr_lower": critical.lower,
                "exact": critical.exact,
            }
        return result


def curvature_of(start: Start, update: Update) -> DualCurvature:
    """Return the per-sample curvature at a minimum, in the coordinates of the update."""
    _, model, images = start
    problem = stableopt.Problem(model, mean_squared_error, images.samples)
    preconditioner = update.preconditioner(model, images)
    if preconditioner is not None:
        problem = in_rule_coordinates(
            problem, UpdateRule(lr=1.0, preconditioner=preconditioner), ()
        )
    return DualCurvature.from_problem(problem)
