"""Jobs of the diagram: stability of SGD on quadratic losses, in one dimension and in two."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.runner import Job, Work
from stableopt.curvature import DualCurvature
from stableopt.stability import (
    StabilityRegion,
    UpdateRule,
    critical_lr,
    mean_square_radius,
    noise_factor,
)

__all__ = ["Family", "Plane", "growth", "rows", "second_moment_radius"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Plane(Job):
    r"""One-dimensional problems on a grid of sharpness a and non-uniformity s.

    Half of the n samples have curvature a + s, half a − s. Stability in mean square depends only on
    their mean a and standard deviation s. Each step draws an independent batch without replacement.
    The grid extends to 1.25 of the box's limits on a and s. Its points are the centres of cells, so
    that none is on a boundary.

    Attributes:
        lr: learning rate η.
        batch_size: batch size B.
        n: number of samples, even.
        points: cells per direction.
        runs: runs of SGD per cell.
        steps: steps of a run. Few, since :math:`x_t^2` is a product of t random factors, whose mean
            is soon dominated by runs rarer than one in a few thousand.
        seed: seed of the batches.

    The result has ``cells``: ``a``, ``s``, whether the point is ``in_box``, the exact ``growth`` of
    :math:`E x^2` per step, and the ``simulated`` growth.
    """

    kind = "diagram-plane"

    lr: float
    batch_size: int
    n: int = 100
    points: int = 24
    runs: int = 5000
    steps: int = 5
    seed: int = 0

    def run(self, work: Work) -> dict[str, Any]:
        """Compute and simulate the growth in every cell."""
        region = StabilityRegion(UpdateRule(lr=self.lr), self.batch_size, self.n)
        noise = noise_factor(self.batch_size, self.n)
        centres = (np.arange(self.points) + 0.5) / self.points
        generator = np.random.default_rng(self.seed)
        cells = []
        for a, s in itertools.product(
            (1.25 * region.max_sharpness * centres).tolist(),
            (1.25 * region.max_non_uniformity * centres).tolist(),
        ):
            work.progress(len(cells) / self.points**2, f"B = {self.batch_size}")
            cells.append(
                {
                    "a": a,
                    "s": s,
                    "in_box": region.contains(a, s),
                    "growth": mean_square_radius(a, noise * s**2, self.lr),
                    "simulated": growth(self, a, s, generator),
                }
            )
        return {"cells": cells}


def growth(job: Plane, a: float, s: float, generator: np.random.Generator) -> float:
    """Return the simulated growth factor per step of the mean of x²."""
    half = job.n // 2
    sharp = generator.hypergeometric(half, half, job.batch_size, size=(job.runs, job.steps))
    curvature = a + s * (2 * sharp / job.batch_size - 1)
    logarithms = 2 * np.log(np.abs(1 - job.lr * curvature)).sum(axis=1)
    mean = np.logaddexp.reduce(logarithms) - math.log(job.runs)
    return float(np.exp(mean / job.steps))


@dataclass(frozen=True)
class Family(Job):
    r"""Three samples in two dimensions, :math:`H_i = J_i^\top J_i`, that have no common eigenvectors.

    J is (1, w), (1, −w) and (1, 0).

    Attributes:
        widths: the values of w.
        batch_size: batch size B, 1 or 2.

    The result has ``cells``, one for each ``w``: ``sharpness``, ``non_uniformity``, the largest stable
    learning rates by Theorem 1 (8), by the box (9), and exactly (``theorem1``, ``box``, ``exact``), and
    ``radius_at_box``, the growth of second moments per step at the box's rate, from all batches.
    """

    kind = "diagram-family"

    widths: tuple[float, ...]
    batch_size: int = 1

    def run(self, work: Work) -> dict[str, Any]:
        """Compute the learning rates for every width."""
        cells = []
        for width in self.widths:
            work.progress(len(cells) / len(self.widths))
            j = rows(width)
            dual = DualCurvature(torch.from_numpy(j @ j.T), len(j))
            critical = critical_lr(dual, self.batch_size)
            # Both limits of the box are proportional to 1/η.
            unit = StabilityRegion(UpdateRule(lr=1.0), self.batch_size, len(j))
            s = dual.non_uniformity
            box = min(
                unit.max_sharpness / dual.sharpness,
                unit.max_non_uniformity / s if s else math.inf,
            )
            cells.append(
                {
                    "w": width,
                    "sharpness": dual.sharpness,
                    "non_uniformity": s,
                    "theorem1": critical.theorem1,
                    "box": box,
                    "exact": critical.value,
                    "radius_at_box": second_moment_radius(j, box, self.batch_size),
                }
            )
        return {"cells": cells}


def rows(width: float) -> Array:
    """Return the samples' J as the rows of a matrix."""
    return np.array([[1.0, width], [1.0, -width], [1.0, 0.0]])


def second_moment_radius(j: Array, lr: float, batch_size: int) -> float:
    r"""Return the growth of :math:`E xx^\top` per step, from all batches of the rows of J.

    >>> second_moment_radius(np.array([[1.0], [2.0]]), 0.25, 1)      # (0.75² + 0²) / 2
    0.28125
    """
    identity = np.eye(j.shape[1])
    batches = list(itertools.combinations(range(len(j)), batch_size))
    steps = [identity - lr * j[list(batch)].T @ j[list(batch)] / batch_size for batch in batches]
    mean = sum(np.kron(step, step) for step in steps) / len(steps)
    return float(np.abs(np.linalg.eigvals(mean)).max())
