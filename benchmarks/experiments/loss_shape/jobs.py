"""Jobs of the loss's shape: the loss along its sharpest direction, and sharpness during training."""

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

__all__ = ["LOSSES", "Course", "Line", "along", "trusted"]

LOSSES: dict[str, nn.Module] = {
    "squared": mean_squared_error,
    "cross-entropy": nn.CrossEntropyLoss(),
}

WITHIN = 0.1
"""Share by which the loss may be off the quadratic."""

LEAST_RISE, MOST_RISE = 1e-2, 1e4
"""Of the quadratic over the loss at the minimum, between which its validity is searched."""


@dataclass(frozen=True)
class Line(Job):
    r"""The loss along the top eigenvector v of the Hessian at a minimum θ, in double precision.

    Its quadratic is :math:`q(t) = L(\theta) + t\,v^\top\nabla L(\theta) + \tfrac12 a t^2`.

    Attributes:
        start: the minimum.
        rise: of the quadratic, as a multiple of the loss there, at the ends of the line.
        points: of the line.

    The result has ``loss`` and ``sharpness`` at the minimum, ``t``, ``losses`` and ``quadratic``
    along the line, and ``trusted_rise``: the multiple of the loss by which the quadratic rises on
    either side before the loss departs from it by more than a tenth.
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
        """Of the losses along the line and some hundred products, in double precision."""
        data = self.start.data
        return 2 * (self.points + 400.0) * data.n * flops_per_sample(data.name, self.start.network)

    def run(self, work: Work) -> dict[str, Any]:
        """Find the eigenvector, and walk along it."""
        _, model, images = from_minimum(self.start, work, allow_unfinished=True)
        model = model.double().eval()
        data = (images.x.double(), images.y.double())
        problem = Problem(model, mean_squared_error, data)
        top = top_eigenpair(Hessian(problem), tol=1e-6, max_iter=1000)
        loss_at, slope = along(model, mean_squared_error, data, top.vector)
        first = loss_at(0.0)
        end = math.sqrt(2 * self.rise * first / top.value)
        t = np.linspace(-end, end, self.points).tolist()
        return {
            "loss": first,
            "sharpness": top.value,
            "slope": slope,
            "t": t,
            "losses": [loss_at(each) for each in t],
            "quadratic": [first + slope * each + top.value * each**2 / 2 for each in t],
            "trusted_rise": trusted(loss_at, first, slope, top.value),
        }


def along(
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


def trusted(
    loss_at: Callable[[float], float], first: float, slope: float, sharpness: float
) -> float:
    r"""Return the rise :math:`at^2/2`, over the first loss, up to which the quadratic holds.

    Within a tenth of first loss and rise together, on both sides, to the nearest of 20 steps a
    decade; infinity where it holds all the way. A tenth of the rise alone would ask of ReLU networks
    what they do not have: next to a kink the loss departs from its quadratic by as much as it rises.

    >>> round(trusted(lambda t: 1 + t**2 / 2 + 0.049 * t**4, 1.0, 0.0, 1.0), 2)  # at t² = 2: Q/10
    1.0
    >>> trusted(lambda t: 1 + t**2 / 2, 1.0, 0.0, 1.0)
    inf
    """
    decades = math.log10(MOST_RISE / LEAST_RISE)
    last = 0.0
    for rise in np.logspace(math.log10(LEAST_RISE), math.log10(MOST_RISE), round(20 * decades) + 1):
        half = rise * first
        t = math.sqrt(2 * half / sharpness)
        for signed in (-t, t):
            if abs(loss_at(signed) - first - slope * signed - half) > WITHIN * (first + half):
                return last
        last = float(rise)
    return math.inf


@dataclass(frozen=True)
class Course(Job):
    """Gradient descent for a number of steps, and the sharpness on the way.

    Attributes:
        data: the images.
        loss: ``"squared"`` or ``"cross-entropy"``.
        lr: learning rate.
        seed: of the initialisation.
        steps: how many.
        looks: how many measurements, at equal distances of the logarithm of the step.

    The result has ``course``: at each look ``step``, ``loss``, ``sharpness`` and its
    ``relative_residual``, and ``accuracy`` on the training set; up to where it diverged, should it.
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
        """Of the steps, and of some fifty products at a look, each of three gradients."""
        samples = (self.steps + 150.0 * self.looks) * self.data.n
        return samples * flops_per_sample(self.data.name, None)

    def run(self, work: Work) -> dict[str, Any]:
        """Train, and look."""
        loss_fn = LOSSES[self.loss]
        images = images_for(self.data, work)
        model = network(self.data.name, seed=self.seed).to(work.place.device)
        optimizer = stableopt.GD(model.parameters(), lr=self.lr)
        looks = {0, *np.geomspace(1, self.steps, self.looks).round().astype(int).tolist()}
        course: list[dict[str, Any]] = []

        def look(step: int, loss: float) -> bool:
            if not loss < math.inf:
                return True
            if step in looks:
                course.append({"step": step, "loss": loss, **self._look(model, images)})
            work.progress(step / self.steps, f"{self.loss}, step {step:,}, loss {loss:.1e}")
            return False

        steps = self.steps + 1
        batches = all_samples(images)
        train(model, optimizer, batches, loss_fn=loss_fn, steps=steps, before_step=look)
        return {"course": course}

    def _look(self, model: nn.Module, images: Any) -> dict[str, Any]:
        margins = stableopt.measure(
            model,
            LOSSES[self.loss],
            images.samples,
            lr=self.lr,
            quantities=("sharpness",),
            max_iter=300,
        )
        measured = margins.measurements.get("sharpness")
        with torch.no_grad():
            right = model(images.x).argmax(1) == images.y.argmax(1)
        return {
            "sharpness": margins.sharpness,
            "relative_residual": measured.residual if measured is not None else None,
            "accuracy": float(right.double().mean()),
        }
