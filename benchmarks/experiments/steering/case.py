"""One case of the steering experiment: where to, by what means, and what became of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from stableopt import StabilityMargins, TargetRegion
from stableopt.steering import Decision
from stableopt.steering.decision import marks

__all__ = ["REGIONS", "Budget", "Outcome"]

REGIONS = {
    "1.5x flatter": TargetRegion.flatter(by=1.5),
    "2x flatter": TargetRegion.flatter(by=2),
    "4x flatter": TargetRegion.flatter(by=4),
    "more uniform": TargetRegion.more_uniform(by=1.5),
    "both": TargetRegion(sharpness=(0, 1 / 2), non_uniformity=(0, 1 / 2), unit="present"),
    "sharper": TargetRegion.sharper(by=1.25),
}
"""Where to, relative to gradient descent's minimum."""


@dataclass(frozen=True)
class Budget:
    """What the methods may take.

    Attributes:
        lr: learning rate of gradient descent, and of what starts from its minimum.
        start_loss: training loss at which gradient descent stops and steering begins.
        steps: of a run with full batches.
        sgd_steps: of a run with smaller ones.
        batch_size: to begin with, where it is steered.
        measure_every: steps between measurements with full batches; five times as many otherwise.
        grid_lrs: for the grid-searched schedule, the rates to end at, as multiples of ``lr``.
        grid_ramps: its lengths of the ramp up to there.
        scratch_steps: of a run from initialisation; none are run where it is 0.
        scratch_sharpness: the only number that its user names.
        scratch_lrs: the constant rates that it is compared with.
    """

    lr: float = 0.5
    start_loss: float = 5e-4
    steps: int = 1500
    sgd_steps: int = 3000
    batch_size: int = 64
    measure_every: int = 10
    grid_lrs: tuple[float, ...] = (1.5, 2.0, 4.0)
    grid_ramps: tuple[int, ...] = (1, 300)
    scratch_steps: int = 1500
    scratch_sharpness: float = 2.0
    scratch_lrs: tuple[float, ...] = (0.1, 0.5, 1.0)


@dataclass(frozen=True)
class Outcome:
    """Where a run ended.

    Attributes:
        method: what chose the learning rate and the batch size.
        region: the name of the region it was to reach, or of the comparison.
        seed: of the run.
        steps: optimizer steps that it took, with those of its search.
        products: Hessian and covariance products that it took beside them.
        end: margins at the end, with a small tolerance.
        accuracy: test accuracy there.
        largest_loss: the largest training loss that was seen on the way.
        target: the region in numbers, if there was one.
        history: margins on the way.
        decisions: what was decided on the way.
    """

    method: str
    region: str
    seed: int
    steps: int
    products: int
    end: StabilityMargins
    accuracy: float
    largest_loss: float
    target: TargetRegion | None = None
    history: list[StabilityMargins] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)

    @property
    def to_target(self) -> float | None:
        """Sharpness over the one that was aimed at, where one was."""
        aim = None if self.target is None else self.target.aim
        if aim is None or self.end.sharpness is None:
            return None
        return self.end.sharpness / aim

    def numbers(self) -> dict[str, Any]:
        """Return what a table holds of it."""
        end = self.end.record()
        names = ("lr", "batch_size", "loss", "sharpness", "non_uniformity", "failed")
        target = self.target
        return {
            "method": self.method,
            "region": self.region,
            "seed": self.seed,
            "steps": self.steps,
            "products": self.products,
            **{name: _finite(end.get(name)) for name in names},
            "test_accuracy": self.accuracy,
            "largest_loss": _finite(self.largest_loss),
            "target_sharpness": None if target is None else _finite(target.sharpness[1]),
            "least_sharpness": None if target is None else _finite(target.sharpness[0]),
            "aim": None if target is None else target.aim,
            "least_non_uniformity": None if target is None else _finite(target.non_uniformity[0]),
            "target_non_uniformity": None if target is None else _finite(target.non_uniformity[1]),
            "sharpness_to_target": self.to_target,
            "said": "; ".join(str(d) for d in self.decisions if d.what == "target"),
        }

    def path(self) -> list[dict[str, Any]]:
        """Return the way there: a record for each measurement, with what was decided after it."""
        good = [m for m in self.history if m.failure is None]
        notes: dict[int, str] = {}
        for step, label in marks(d for d in self.decisions if d.changes):
            at = max((m.step for m in good if m.step <= step), default=0)
            notes.setdefault(at, label)
        names = ("lr", "batch_size", "loss", "sharpness", "sharpness_limit", "non_uniformity")
        return [
            {"step": m.step, **{name: _finite(getattr(m, name)) for name in names}}
            | {"mark": notes.get(m.step)}
            for m in good
        ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
