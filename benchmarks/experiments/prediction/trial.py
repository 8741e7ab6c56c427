"""`Trial`: each rule's prediction, and SGD from a minimum; `EpochGrowth`: the rule for reshuffling."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from benchmarks.runner import Job, Work
from benchmarks.training.escape import Switch, box
from benchmarks.training.minimum import from_minimum
from benchmarks.training.threshold import Thresholds, curvature_of
from benchmarks.training.update import SGD
from stableopt.stability.simulated.reshuffled import reshuffled_growth

__all__ = ["EpochGrowth", "Grown", "Outcome", "Trial"]

COPIES, FEW_COPIES = 128, 16
"""Replicas of the linear dynamics. Few suffice to know the sign of a growth far from zero."""

NEAR = 2.0
"""Within this factor of the threshold for independent batches, all ``COPIES`` are simulated."""


@dataclass(frozen=True)
class Outcome:
    """The rules' predictions for a trial, and the run's outcome.

    Attributes:
        lr: learning rate of SGD.
        full_batch: the largest stable learning rate without noise, which is 2/a for plain SGD.
        theorem1: the largest by condition (8), if it covers the update rule.
        critical_lr: the exact threshold.
        said: whether SGD escapes, as predicted by each rule.
        escaped_at: the first evaluated step at which it had escaped, or ``None``.
        largest_loss_ratio: largest over initial training loss; ``None`` if not finite.
    """

    lr: float
    full_batch: float
    theorem1: float | None
    critical_lr: float
    said: dict[str, bool]
    escaped_at: int | None
    largest_loss_ratio: float | None


@dataclass(frozen=True)
class Trial(Job):
    """A :class:`Switch` at a fraction of the largest stable learning rate without noise.

    The first line of the trace has each rule's prediction, before the first step. The result is an
    :class:`Outcome`.
    """

    kind = "trial"
    Result: ClassVar = Outcome

    thresholds: Thresholds
    fraction: float
    batch_size: int
    steps: int
    independent: bool

    @property
    def needs(self) -> tuple[Job, ...]:
        """The minimum and its thresholds."""
        return (self.thresholds.start, self.thresholds)

    def run(self, work: Work) -> dict[str, Any]:
        """Predict by every rule, then run SGD."""
        solution = self.thresholds.start
        start = from_minimum(solution, work)
        allowed = work.result(self.thresholds)
        threshold = allowed.at(self.batch_size)
        lr = self.fraction * allowed.full_batch
        update = self.thresholds.update
        a, s = start.minimum.sharpness, start.minimum.non_uniformity
        if update != SGD:  # the measured ones are those of the Hessian without P
            a, s = allowed.sharpness, allowed.non_uniformity
        box_prediction = box(
            a, s, lr=lr, batch_size=self.batch_size, n=solution.data.n, update=update
        )
        said = {"sharpness alone": lr > allowed.full_batch, "box (9)": box_prediction.escapes}
        if threshold.theorem1 is not None:
            said["condition (8)"] = lr > threshold.theorem1
        said["exact threshold"] = lr > threshold.critical_lr
        work.restored()
        work.trace(lr=lr, said=said)
        switch = Switch(
            solution,
            lr=lr,
            batch_size=self.batch_size,
            steps=self.steps,
            independent=self.independent,
            measure_after=False,
            update=update,
        )
        escape = switch.train_from(start, work)
        return {
            **{"lr": lr, "said": said, "full_batch": allowed.full_batch},
            **{"theorem1": threshold.theorem1, "critical_lr": threshold.critical_lr},
            **{"escaped_at": escape.escaped_at, "largest_loss_ratio": escape.largest_loss_ratio},
        }


@dataclass(frozen=True)
class Grown:
    """The growth of the second moment at a learning rate with batches reshuffled each epoch.

    Attributes:
        per_epoch: logarithm of the growth factor per epoch; ``None`` if not finite.
        standard_error: of ``per_epoch``.
    """

    per_epoch: float | None
    standard_error: float


@dataclass(frozen=True)
class EpochGrowth(Job):
    """The growth of the second moment at the learning rate of a trial with reshuffled batches.

    Attributes:
        thresholds: thresholds of the minimum.
        fraction: learning rate over the largest stable one without noise.
        batch_size: batch size of SGD.

    The result is a :class:`Grown`.
    """

    kind = "epoch-growth"
    Result: ClassVar = Grown

    thresholds: Thresholds
    fraction: float
    batch_size: int

    @property
    def needs(self) -> tuple[Job, ...]:
        """The minimum and its thresholds."""
        return (self.thresholds.start, self.thresholds)

    @property
    def flops(self) -> float:
        """About 20 epochs, a quarter of the jobs near the threshold; memory-bound by a factor of 4."""
        rows = 10.0 * self.thresholds.start.data.n
        return 4 * 20 * (FEW_COPIES + COPIES / 4) * 4 * rows**2

    def run(self, work: Work) -> dict[str, Any]:
        """Simulate the second moment until the sign of its growth is known."""
        solution, update = self.thresholds.start, self.thresholds.update
        allowed = work.result(self.thresholds)
        lr = self.fraction * allowed.full_batch
        is_far = not 1 / NEAR < lr / allowed.at(self.batch_size).critical_lr < NEAR
        modes = curvature_of(from_minimum(solution, work), update).modes
        growth = reshuffled_growth(
            *(modes, update.rule(lr).linear_step, self.batch_size),
            replicas=FEW_COPIES if is_far else COPIES,
            until_sure=True,
        )
        finite = math.isfinite(growth.per_epoch)
        return {
            "per_epoch": growth.per_epoch if finite else None,
            "standard_error": growth.standard_error,
        }
