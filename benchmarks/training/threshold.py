"""The critical learning rates of a minimum for several batch sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import stableopt
from benchmarks.runner import Job, Work
from benchmarks.training.loops import mean_squared_error
from benchmarks.training.minimum import Solution, images_for
from stableopt.curvature import DualCurvature

__all__ = ["Thresholds"]


@dataclass(frozen=True)
class Thresholds(Job):
    """What the theory allows SGD at a minimum.

    Attributes:
        start: the minimum.
        batch_sizes: one threshold for each.

    The result has ``full_batch``, which is 2/a, and by batch size ``theorem1``, the largest
    learning rate that condition (8) allows, and ``critical_lr``, the exact mean-square threshold,
    with its lower end ``critical_lr_lower`` and whether it is ``exact``.
    """

    kind = "thresholds"

    start: Solution
    batch_sizes: tuple[int, ...]

    @property
    def needs(self) -> tuple[Job, ...]:
        """The minimum."""
        return (self.start,)

    @property
    def flops(self) -> float:
        """Of about 15 products with the second moments, 4 (nC)^3 each."""
        return 15 * 4 * len(self.batch_sizes) * (10.0 * self.start.data.n) ** 3

    def run(self, work: Work) -> dict[str, Any]:
        """Compute one after the other, from the same Gram matrix."""
        outcome = work.result(self.start)["outcome"]
        if outcome == "diverged":
            raise ValueError(f"{self.start.id} has not reached a minimum: {outcome}")
        images = images_for(self.start.data, work)
        model = self.start.model(work.place.device)
        model.load_state_dict(work.tensors(self.start))
        problem = stableopt.Problem(model, mean_squared_error, (images.x, images.y))
        dual = DualCurvature.of(problem)
        found: dict[str, Any] = {"full_batch": None, "by_batch_size": {}}
        for number, size in enumerate(self.batch_sizes):
            work.progress(number / len(self.batch_sizes), f"thresholds, B = {size}")
            critical = stableopt.critical_lr(dual, batch_size=size)
            found["full_batch"] = critical.full_batch
            found["by_batch_size"][size] = {
                "theorem1": critical.theorem1,
                "critical_lr": critical.value,
                "critical_lr_lower": critical.lower,
                "exact": critical.exact,
            }
        return found
