"""`Line`: the loss along its sharpest direction; `Course`: sharpness during training."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import stableopt
from benchmarks.runner import Job, Work
from benchmarks.training.data import Dataset, images_for
from benchmarks.training.loops import all_samples, mean_squared_error, train
from benchmarks.training.minimum import Solution, from_minimum
from benchmarks.training.networks import flops_per_sample, network
from stableopt import Problem
from stableopt.curvature import Hessian, top_eigenpair

__all__ = ["LOSSES", "Course", "Line", "loss_along", "trusted_rise"]

LOSSES: dict[str, nn.Module] = {
    "squared": mean_squared_error,
    "cross-entropy": nn.CrossEntropyLoss(),
}

WITHIN = 0.1
"""Relative difference up to which the loss agrees with its quadratic."""

LEAST_RISE, MOST_RISE = 1e-2, 1e4
"""Smallest and largest rise that is tested, relative to the loss at the minimum."""


@dataclass(frozen=True)
class Line(Job):
    r"""The loss along the top eigenvector v of the Hessian at a minimum θ, in double precision.

    Its quadratic approximation is :math:`q(t) = L(\theta) + t\,v^\top\nabla L(\theta) + \tfrac12 a t^2`.

    Attributes:
        start: the minimum.
        rise: rise of the quadratic at the ends of the line, relative to the loss at the minimum.
        points: number of points on the line.

    The result has ``loss``, ``sharpness`` and ``slope`` at the minimum; ``t``, ``losses`` and
    ``quadratic`` along the line; and ``trusted_rise``, see :func:`trusted_rise`.
    """

    kind = "loss-line"

    start: Solution
    rise: float = 100.0
    points: int = 81

    @property
    def needs(self) -> tuple[Job, ...]:
        """The minimum."""
        return (self.start,)

    @property
    def flops(self) -> float:
        """The losses along the line and about a hundred products, in double precision."""
        data = self.start.data
        return 2 * (self.points + 400.0) * data.n * flops_per_sample(data.name, self.start.network)

    def run(self, work: Work) -> dict[str, Any]:
        """Find the eigenvector, and evaluate the loss along it."""
        _, model, images = from_minimum(self.start, work, allow_unfinished=True)
        model = model.double().eval()
        data = (images.x.double(), images.y.double())
        problem = Problem(model, mean_squared_error, data)
        top = top_eigenpair(Hessian(problem), tol=1e-6, max_iter=1000)
        loss_at, slope = loss_along(model, mean_squared_error, data, top.vector)
        minimum_loss = loss_at(0.0)
        end = math.sqrt(2 * self.rise * minimum_loss / top.value)
        distances = np.linspace(-end, end, self.points).tolist()
        return {
            "loss": minimum_loss,
            "sharpness": top.value,
            "slope": slope,
            "t": distances,
            "losses": [loss_at(t) for t in distances],
            "quadratic": [minimum_loss + slope * t + top.value * t**2 / 2 for t in distances],
            "trusted_rise": trusted_rise(loss_at, minimum_loss, slope, top.value),
        }


def loss_along(
    model: nn.Module,
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    data: tuple[Tensor, Tensor],
    direction: Tensor,
) -> tuple[Callable[[float], float], float]:
    """Return the loss as a function of the distance along a unit vector, and its slope at 0."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    origin = parameters_to_vector(parameters).detach().clone()
    x, y = data
    gradients = torch.autograd.grad(loss_fn(model(x), y), parameters)
    slope = float(parameters_to_vector(gradients) @ direction)

    def loss_at(t: float) -> float:
        with torch.no_grad():
            vector_to_parameters(origin + t * direction, parameters)
            value = float(loss_fn(model(x), y))
            vector_to_parameters(origin, parameters)
        return value

    return loss_at, slope


def trusted_rise(
    loss_at: Callable[[float], float], minimum_loss: float, slope: float, sharpness: float
) -> float:
    r"""Return the rise :math:`at^2/2`, relative to the minimum's loss, up to which the quadratic holds.

    It holds if on both sides it differs from the loss by at most a tenth of the sum of the minimum's
    loss and the rise. A tenth of the rise alone would be too strict for ReLU networks: next to a kink
    the loss differs from its quadratic by as much as it rises. Rises are tested at 20 points per
    decade; infinity if all of them pass.

    >>> round(trusted_rise(lambda t: 1 + t**2 / 2 + 0.049 * t**4, 1.0, 0.0, 1.0), 2)  # at t² = 2: Q/10
    1.0
    >>> trusted_rise(lambda t: 1 + t**2 / 2, 1.0, 0.0, 1.0)
    inf
    """
    decades = math.log10(MOST_RISE / LEAST_RISE)
    trusted = 0.0
    for rise in np.logspace(math.log10(LEAST_RISE), math.log10(MOST_RISE), round(20 * decades) + 1):
        quadratic_rise = rise * minimum_loss
        t = math.sqrt(2 * quadratic_rise / sharpness)
        for offset in (-t, t):
            error = abs(loss_at(offset) - minimum_loss - slope * offset - quadratic_rise)
            if error > WITHIN * (minimum_loss + quadratic_rise):
                return trusted
        trusted = float(rise)
    return math.inf


@dataclass(frozen=True)
class Course(Job):
    """Gradient descent for a number of steps, with measurements of the sharpness.

    Attributes:
        data: the images.
        loss: ``"squared"`` or ``"cross-entropy"``.
        lr: learning rate.
        seed: seed of the initialisation.
        steps: number of steps.
        looks: number of measurements, evenly spaced in the logarithm of the step.

    The result has ``course``, a record per measurement: ``step``, ``loss``, ``sharpness`` and its
    ``relative_residual``, and ``accuracy`` on the training set. It ends where training diverges.
    """

    kind = "loss-course"

    data: Dataset
    loss: str
    lr: float
    seed: int = 0
    steps: int = 10_000
    looks: int = 25

    @property
    def flops(self) -> float:
        """The steps, and per measurement about fifty products of three gradients each."""
        samples = (self.steps + 150.0 * self.looks) * self.data.n
        return samples * flops_per_sample(self.data.name, None)

    def run(self, work: Work) -> dict[str, Any]:
        """Train, with measurements along the way."""
        loss_fn = LOSSES[self.loss]
        images = images_for(self.data, work)
        model = network(self.data.name, seed=self.seed).to(work.place.device)
        optimizer = stableopt.GD(model.parameters(), lr=self.lr)
        looks = {0, *np.geomspace(1, self.steps, self.looks).round().astype(int).tolist()}
        course: list[dict[str, Any]] = []

        def measure(step: int, loss: float) -> bool:
            if not loss < math.inf:
                return True
            if step in looks:
                course.append({"step": step, "loss": loss, **self._measure(model, images)})
            work.progress(step / self.steps, f"{self.loss}, step {step:,}, loss {loss:.1e}")
            return False

        steps = self.steps + 1
        batches = all_samples(images)
        train(model, optimizer, batches, loss_fn=loss_fn, steps=steps, before_step=measure)
        return {"course": course}

    def _measure(self, model: nn.Module, images: Any) -> dict[str, Any]:
        margins = stableopt.measure(
            model,
            LOSSES[self.loss],
            images.samples,
            lr=self.lr,
            quantities=("sharpness",),
            max_iter=300,
        )
        measurement = margins.measurements.get("sharpness")
        with torch.no_grad():
            correct = model(images.x).argmax(1) == images.y.argmax(1)
        return {
            "sharpness": margins.sharpness,
            "relative_residual": measurement.residual if measurement is not None else None,
            "accuracy": float(correct.double().mean()),
        }
