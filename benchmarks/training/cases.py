"""`minima`: the solutions of a grid as an experiment's cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from benchmarks.framework.experiment import Case, case
from benchmarks.training.data import Dataset
from benchmarks.training.minimum import Solution

__all__ = ["minima"]


class Settings(Protocol):
    """The settings of an experiment that trains to minima."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Of initialisation and batches."""

    @property
    def target_loss(self) -> float:
        """At which training stops."""

    @property
    def max_steps(self) -> int:
        """At which it stops in any case."""


def minima(
    settings: Settings,
    data: Dataset,
    *,
    lrs: Sequence[float],
    batch_sizes: Sequence[int | None] = (None,),
    scales: Sequence[float | None] = (None,),
    **shared: Any,
) -> list[Case]:
    """Return a solution for each scale, learning rate, batch size and seed.

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
                target_loss=settings.target_loss,
                max_steps=settings.max_steps,
                **shared,
            ),
            *("lr", "batch_size", "scale", "seed"),
        )
        for scale in scales
        for lr in lrs
        for size in batch_sizes
        for seed in settings.seeds
    ]
