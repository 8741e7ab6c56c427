"""Jobs of the diagram: SGD on samples whose losses are quadratic."""

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

    Half of the n samples have curvature a + s, half a − s, which are the mean and the standard
    deviation of these; only these two numbers decide stability in mean square.
    Batches are drawn without replacement, a new one at each step, independently. The first factor of
    the grid's extent is of 2/η, the second of the box's limit on s, and points lie in the middle of
    their cells, so that none is on a border.

    Attributes:
        lr: learning rate η.
        batch_size: B.
        n: samples, an even number.
        points: in each direction.
        runs: of SGD in each cell.
        steps: of each run. Few: :math:`x_t^2` is a product of t random factors, whose mean soon
            rests on runs so rare that none of a few thousand is one.
        seed: of the batches.

    The result has ``cells`` with ``a``, ``s``, whether it is ``in_box``, the exact ``growth`` of
    :math:`E x^2` in a step, and the one that was ``simulated``.
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
        """Go through the cells."""
        region = StabilityRegion(UpdateRule(lr=self.lr), self.batch_size, self.n)
        noise = noise_factor(self.batch_size, self.n)
        middles = (np.arange(self.points) + 0.5) / self.points
        generator = np.random.default_rng(self.seed)
        cells = []
        for a, s in itertools.product(
            (1.25 * region.max_sharpness * middles).tolist(),
            (1.25 * region.max_non_uniformity * middles).tolist(),
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
    """Return by which factor in a step the mean of x² has grown over a job's runs and steps."""
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
        batch_size: B, 1 or 2.

    The result has for each w ``sharpness``, ``non_uniformity``, and the largest learning rates by
    Theorem 1 (8), by the box (9), and exactly (``theorem1``, ``box``, ``exact``); and
    ``radius_at_box``, by which second moments grow in a step at the box's, from all batches.
    """

    kind = "diagram-family"

    widths: tuple[float, ...]
    batch_size: int = 1

    def run(self, work: Work) -> dict[str, Any]:
        """Go through the widths."""
        cells = []
        for width in self.widths:
            work.progress(len(cells) / len(self.widths))
            j = rows(width)
            dual = DualCurvature(torch.from_numpy(j @ j.T), len(j))
            critical = critical_lr(dual, self.batch_size)
            # The box is homogeneous: both limits go as 1/η.
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
    r"""Return by which :math:`E xx^\top` grows in a step, from all batches of the rows of J.

    >>> second_moment_radius(np.array([[1.0], [2.0]]), 0.25, 1)      # (0.75² + 0²) / 2
    0.28125
    """
    identity = np.eye(j.shape[1])
    batches = list(itertools.combinations(range(len(j)), batch_size))
    steps = [identity - lr * j[list(batch)].T @ j[list(batch)] / batch_size for batch in batches]
    mean = sum(np.kron(step, step) for step in steps) / len(steps)
    return float(np.abs(np.linalg.eigvals(mean)).max())
