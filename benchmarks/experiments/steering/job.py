"""`Steered`: the job that trains to a minimum and runs all methods from there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.experiments.steering.methods import REGIONS, Budget, Contest
from benchmarks.runner import Job, Work
from benchmarks.training.data import Dataset, images_for
from benchmarks.training.networks import flops_per_sample, network

__all__ = ["Steered"]


@dataclass(frozen=True)
class Steered(Job):
    """Gradient descent to a minimum; from there, steering to every region, and the baselines.

    Attributes:
        data: the images.
        seed: seed of the initialisation and of the batches' order.
        budget: settings of the runs.

    The result has ``runs``, a row per run, and ``paths``, a row per measurement by region.
    """

    kind = "steering"

    data: Dataset
    seed: int
    budget: Budget

    @property
    def flops(self) -> float:
        """The runs' steps, times two for the measurements."""
        budget = self.budget
        grid = len(budget.grid_lrs) * len(budget.grid_ramps)
        full = 2 / (budget.lr * budget.start_loss) + budget.steps * (grid + 6)
        small = budget.sgd_steps * 3 * budget.batch_size
        scratch = budget.scratch_steps * 32 * (1 + len(budget.scratch_lrs))
        samples = 2 * (full * self.data.n + small + scratch)
        return samples * flops_per_sample(self.data.name, None)

    def run(self, work: Work) -> dict[str, Any]:
        """Train, steer, compare."""
        initial = network(self.data.name, seed=self.seed).to(work.place.device)
        contest = Contest(initial, images_for(self.data, work), self.seed, self.budget)
        expected = 8 + len(REGIONS) + len(self.budget.scratch_lrs)
        runs, paths = [], {}
        for row, path in contest.rows():
            runs.append(row)
            if path:
                paths[row["region"]] = path
            work.progress(len(runs) / expected, f"{row['method']}, {row['region']}")
        return {"runs": runs, "paths": paths}
