"""The job of the steering experiment: a seed's minimum, and all that starts from it or beside it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

import stableopt
from benchmarks.experiments.steering import methods, rivals
from benchmarks.experiments.steering.case import REGIONS, Budget, Outcome
from benchmarks.runner import Job, Work
from benchmarks.training.data import Dataset, Images, images_for
from benchmarks.training.loops import evaluate, gd_until, mean_squared_error
from benchmarks.training.measured import BOTH
from benchmarks.training.networks import flops_per_sample, network

__all__ = ["Steered"]


@dataclass(frozen=True)
class Steered(Job):
    """Gradient descent to a minimum; steering to every region from there, and its rivals.

    Attributes:
        data: the images.
        seed: of the initialisation and of the orders of batches.
        budget: what each may take.

    The result has ``runs``, the numbers of each :class:`Outcome`, and ``paths``, by region the way
    of those that were steered there.
    """

    kind = "steering"

    data: Dataset
    seed: int
    budget: Budget

    @property
    def flops(self) -> float:
        """Of the runs' steps, and of about as much again for what is measured."""
        budget = self.budget
        grid = len(budget.grid_lrs) * len(budget.grid_ramps)
        full = 2 / (budget.lr * budget.start_loss) + budget.steps * (grid + 6)
        small = budget.sgd_steps * 3 * budget.batch_size
        scratch = budget.scratch_steps * 32 * (1 + len(budget.scratch_lrs))
        samples = 2 * (full * self.data.n + small + scratch)
        return samples * flops_per_sample(self.data.name, None)

    def run(self, work: Work) -> dict[str, Any]:
        """Train, steer, compare."""
        images = images_for(self.data, work)
        outcomes = []
        expected = 7 + len(REGIONS) + len(self.budget.scratch_lrs) + 1
        for outcome in self._outcomes(images, work.place.device):
            outcomes.append(outcome)
            said = f"{outcome.method}, {outcome.region}"
            work.progress(len(outcomes) / expected, said)
        return {
            "runs": [outcome.numbers() for outcome in outcomes],
            "paths": {
                outcome.region: outcome.path()
                for outcome in outcomes
                if outcome.method == "steered" and outcome.region in REGIONS
            },
        }

    def _outcomes(self, images: Images, device: str) -> Iterator[Outcome]:
        budget, seed = self.budget, self.seed
        model, minimum = self._minimum(images, device)
        yield minimum
        for region in REGIONS:
            yield methods.steered(model, images, budget, region, seed, minimum.largest_loss)
        yield rivals.fixed(model, images, budget, seed)
        yield from rivals.grid_searched(model, images, budget, seed, minimum.end)
        yield rivals.curvature_aware(model, images, budget, seed)
        yield rivals.noise_scaled(model, images, budget, seed)
        if budget.scratch_steps:
            yield methods.scratch_steered(self._fresh(device), images, budget, seed)
            for lr in budget.scratch_lrs:
                yield rivals.scratch_constant(self._fresh(device), images, budget, seed, lr)

    def _fresh(self, device: str) -> nn.Module:
        return network(self.data.name, seed=self.seed).to(device)

    def _minimum(self, images: Images, device: str) -> tuple[nn.Module, Outcome]:
        """Return gradient descent's minimum, and what is measured there."""
        model = self._fresh(device)
        initial_loss = evaluate(model, images)
        optimizer = stableopt.GD(model.parameters(), lr=self.budget.lr)
        steps = gd_until(self.budget.start_loss, model, images, optimizer, max_steps=10**6)
        margins = stableopt.measure(
            model,
            mean_squared_error,
            (images.x, images.y),
            optimizer=optimizer,
            quantities=BOTH,
            tol=1e-3,
        )
        accuracy = images.accuracy(model)
        return model, Outcome(
            "GD", "the minimum", self.seed, steps, 0, margins, accuracy, initial_loss
        )
