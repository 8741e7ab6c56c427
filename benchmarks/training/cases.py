"""`minima`: the solutions of a grid as an experiment's cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.framework.experiment import Case, Experiment, case
from benchmarks.training.data import Dataset
from benchmarks.training.minimum import Solution

__all__ = ["minima"]


def minima(
    experiment: Experiment | Any,
    data: Dataset,
    *,
    lrs: Sequence[float],
    batch_sizes: Sequence[int | None] = (None,),
    scales: Sequence[float | None] = (None,),
    **shared: Any,
) -> list[Case]:
    """Return a solution for each scale, learning rate, batch size and seed.

    ``target_loss``, ``max_steps`` and the seeds are the experiment's settings.

    >>> from benchmarks.experiments.gd_sharpness import GDSharpness
    >>> one = GDSharpness(seeds=(0, 1))
    >>> [(c.job.lr, c.job.seed) for c in minima(one, Dataset(), lrs=(0.5, 1.0))]
    [(0.5, 0), (0.5, 1), (1.0, 0), (1.0, 1)]
    """
    return [
        case(
            Solution(
                data,
                lr=lr,
                seed=seed,
                batch_size=size,
                scale=scale,
                target_loss=experiment.target_loss,
                max_steps=experiment.max_steps,
                **shared,
            ),
            *("lr", "batch_size", "scale", "seed"),
        )
        for scale in scales
        for lr in lrs
        for size in batch_sizes
        for seed in experiment.seeds
    ]
