r"""Jobs of the toy: many runs of SGD on two parabolas, and the thresholds of its minimum x = 1.

.. math:: f_1(x) = \min\{x^2, 0.1(x-1)^2\}, \quad f_2(x) = \min\{x^2, 1.9(x-1)^2\}

At x = 1 the second derivatives are :math:`h_1 = 0.2` and :math:`h_2 = 3.8`. Each step of SGD takes one
of the two, so that near the minimum y = x − 1 is multiplied by 1 − ηh₁ or 1 − ηh₂ with equal
probability. The simulation stores y instead of x, which would be rounded to 1 near the minimum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.runner import Job, Work

__all__ = ["COEFFICIENTS", "Path", "Thresholds", "Walks", "gradient", "losses"]

COEFFICIENTS = (0.1, 1.9)
"""Coefficients of (x − 1)² in the two losses."""

CAUGHT = 0.24
"""Within this distance of x = 0 both losses are x², so that steps with η < 1 never leave again. The
losses switch at 0.2403 = √0.1/(1 + √0.1) or farther."""

Array = NDArray[np.float64]


def losses(x: Array) -> tuple[Array, Array]:
    """Return f1 and f2.

    >>> f1, f2 = losses(np.array([0.0, 0.5, 1.0]))
    >>> f1.tolist(), f2.tolist()
    ([0.0, 0.025, 0.0], [0.0, 0.25, 0.0])
    """
    first, second = (np.minimum(x**2, c * (x - 1) ** 2) for c in COEFFICIENTS)
    return first, second


def gradient(y: Array, coefficient: Array | float) -> Array:
    """Return the derivative of min{x², c(x − 1)²} at x = 1 + y, including the factor 2.

    >>> gradient(np.array([-1.0, -0.875, 0.5]), 0.1).tolist()
    [0.0, 0.25, 0.1]
    """
    x = 1 + y
    slope: Array = np.where(x**2 < coefficient * y**2, 2 * x, 2 * coefficient * y)
    return slope


@dataclass(frozen=True)
class Thresholds:
    """Learning rates from which x = 1 is unstable, for curvatures h₁ and h₂.

    >>> true = Thresholds(0.2, 3.8)
    >>> round(true.mean_square, 4), round(true.almost_sure, 4), true.gd
    (0.5525, 0.5595, 1.0)
    """

    h1: float
    h2: float

    @property
    def sharpness(self) -> float:
        """Mean curvature a."""
        return (self.h1 + self.h2) / 2

    @property
    def non_uniformity(self) -> float:
        """Standard deviation s of the curvatures."""
        return abs(self.h1 - self.h2) / 2

    @property
    def gd(self) -> float:
        """The threshold of gradient descent, 2/a."""
        return 2 / self.sharpness

    @property
    def mean_square(self) -> float:
        """The threshold for batches of one in mean square, where E (1 − ηh)² = 1: 2a/(a² + s²)."""
        a, s = self.sharpness, self.non_uniformity
        return 2 * a / (a**2 + s**2)

    @property
    def almost_sure(self) -> float:
        """The almost sure threshold, the smallest η > 0 with E log|1 − ηh| = 0: the smaller root of
        (1 − ηh₁)(ηh₂ − 1) = 1.
        """
        total, product = self.h1 + self.h2, self.h1 * self.h2
        return float((total - math.sqrt(total**2 - 8 * product)) / (2 * product))


@dataclass(frozen=True)
class Walks(Job):
    """Many runs of SGD with batches of one, from near x = 1.

    Attributes:
        lr: learning rate.
        runs: number of runs.
        steps: steps of a run.
        offset: initial x − 1.
        seed: seed of the batches.
        halved: whether to use half the true derivatives, which the paper's text quotes.

    The result has ``escaped``, the number of runs that reached x = 0; ``median_step``, the median over
    all runs of the step at which they did, ``None`` if fewer than half did; and ``late``, the number of
    escapes in the last tenth of the steps.
    """

    kind = "toy-walks"

    lr: float
    runs: int
    steps: int
    offset: float = 1e-3
    seed: int = 0
    halved: bool = False

    def run(self, work: Work) -> dict[str, Any]:
        """Simulate the runs, and count the escapes."""
        steps = escape_steps(self, work)
        escaped = steps[steps > 0]
        half = math.ceil(self.runs / 2)
        return {
            "escaped": len(escaped),
            "median_step": int(np.sort(escaped)[half - 1]) if len(escaped) >= half else None,
            "late": int((escaped > 0.9 * self.steps).sum()),
        }


def escape_steps(job: Walks, work: Work | None = None) -> NDArray[np.int64]:
    """Return for each run the step after which it was caught by x = 0, or 0 if it never was."""
    generator = np.random.default_rng(job.seed)
    y = np.full(job.runs, job.offset)
    rate = job.lr / 2 if job.halved else job.lr
    caught = np.zeros(job.runs, dtype=np.int64)
    remaining = np.arange(job.runs)
    for step in range(1, job.steps + 1):
        coefficients = np.where(generator.random(len(y)) < 0.5, *COEFFICIENTS)
        y = y - rate * gradient(y, coefficients)
        just_caught = np.abs(1 + y) < CAUGHT
        if just_caught.any():
            caught[remaining[just_caught]] = step
            remaining, y = remaining[~just_caught], y[~just_caught]
            if not len(y):
                break
        if work is not None:
            work.progress(step / job.steps, f"η = {job.lr:g}, {len(y):,} left")
    return caught


@dataclass(frozen=True)
class Path(Job):
    """A single run of SGD or of gradient descent.

    Attributes:
        lr: learning rate.
        steps: number of steps.
        offset: initial x − 1.
        seed: seed of the batches.
        full_batch: whether it is gradient descent.

    The result has ``x`` before the first and after each step.
    """

    kind = "toy-path"

    lr: float
    steps: int
    offset: float = 1e-3
    seed: int = 0
    full_batch: bool = False

    def run(self, work: Work) -> dict[str, Any]:
        """Simulate the run."""
        generator = np.random.default_rng(self.seed)
        y = np.array(self.offset)
        xs = [float(1 + y)]
        for _ in range(self.steps):
            coefficients = COEFFICIENTS
            if not self.full_batch:
                coefficients = (COEFFICIENTS[int(generator.random() >= 0.5)],)
            y = y - self.lr * np.mean([gradient(y, c) for c in coefficients], axis=0)
            xs.append(float(1 + y))
        return {"x": xs}
