"""`Trial`: SGD from a minimum, and what each rule says before; `EpochGrowth`: a rule for reshuffling."""

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
"""Of the linear dynamics of an epoch. Few know the sign of the growth where it is large."""

NEAR = 2.0
"""Factor of the threshold of independent batches within which many are followed."""


@dataclass(frozen=True)
class Outcome:
    """What the rules said of a trial, and what SGD did.

    Attributes:
        lr: learning rate of SGD.
        full_batch: the largest learning rate without noise: 2/a for plain SGD.
        theorem1: the largest learning rate that condition (8) allows, if it covers the step.
        critical_lr: the exact threshold.
        said: by rule, whether SGD will escape.
        escaped_at: the first step looked at by which it had, or ``None``.
        largest_loss_ratio: the largest training loss over the first; ``None`` if not finite.
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
    """SGD from a minimum, at a fraction of its rate limit without noise: a :class:`Switch`.

    The first line of the trace is what each rule says, before a step is taken. The result is an
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
        start = self.thresholds.start
        begun = from_minimum(start, work)
        allowed = work.result(self.thresholds)
        mine = allowed.at(self.batch_size)
        lr = self.fraction * allowed.full_batch
        update = self.thresholds.update
        a, s = begun.found.sharpness, begun.found.non_uniformity
        if update != SGD:  # those that were measured are the Hessian's, without P
            a, s = allowed.sharpness, allowed.non_uniformity
        in_box = box(a, s, lr=lr, batch_size=self.batch_size, n=start.data.n, update=update)
        said = {"sharpness alone": lr > allowed.full_batch, "box (9)": in_box.escapes}
        if mine.theorem1 is not None:
            said["condition (8)"] = lr > mine.theorem1
        said["exact threshold"] = lr > mine.critical_lr
        work.restored()
        work.trace(lr=lr, said=said)
        switch = Switch(
            start,
            lr=lr,
            batch_size=self.batch_size,
            steps=self.steps,
            independent=self.independent,
            measure_after=False,
            update=update,
        )
        done = switch.go(begun, work)
        return {
            **{"lr": lr, "said": said, "full_batch": allowed.full_batch},
            **{"theorem1": mine.theorem1, "critical_lr": mine.critical_lr},
            **{"escaped_at": done.escaped_at, "largest_loss_ratio": done.largest_loss_ratio},
        }


@dataclass(frozen=True)
class Grown:
    """How the second moment grows at a learning rate, if batches are reshuffled each epoch.

    Attributes:
        per_epoch: logarithm of the factor in an epoch; ``None`` if not finite.
        standard_error: of ``per_epoch``.
    """

    per_epoch: float | None
    standard_error: float


@dataclass(frozen=True)
class EpochGrowth(Job):
    """The growth of the second moment at the learning rate of a trial with reshuffled batches.

    Attributes:
        thresholds: of the minimum.
        fraction: of its largest learning rate without noise.
        batch_size: of SGD.

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
        """About 20 epochs, one in four near; memory is slower than arithmetic here, by about 4."""
        rows = 10.0 * self.thresholds.start.data.n
        return 4 * 20 * (FEW_COPIES + COPIES / 4) * 4 * rows**2

    def run(self, work: Work) -> dict[str, Any]:
        """Follow the second moment until the sign of its growth is known."""
        start, update = self.thresholds.start, self.thresholds.update
        allowed = work.result(self.thresholds)
        lr = self.fraction * allowed.full_batch
        far = not 1 / NEAR < lr / allowed.at(self.batch_size).critical_lr < NEAR
        modes = curvature_of(from_minimum(start, work), update).modes
        growth = reshuffled_growth(
            *(modes, update.rule(lr).linear_step, self.batch_size),
            replicas=FEW_COPIES if far else COPIES,
            until_sure=True,
        )
        finite = math.isfinite(growth.per_epoch)
        return {
            "per_epoch": growth.per_epoch if finite else None,
            "standard_error": growth.standard_error,
        }
