"""`Continued`: training after L-BFGS, with accuracy on the way; `LimitCourse`: L-BFGS's own limit."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import stableopt
from benchmarks.experiments.quasi_newton.jobs import METHODS, Training, halves
from benchmarks.runner import Job, Work
from benchmarks.training.data import Images, images_for
from benchmarks.training.loops import (
    all_samples,
    evaluate,
    mean_squared_error,
    reshuffled_batches,
    train,
)
from benchmarks.training.networks import flops_per_sample, network

__all__ = ["Continued", "LimitCourse"]


@dataclass(frozen=True)
class Continued(Job):
    """GD or SGD from where L-BFGS ended, and what it is like on the way.

    Attributes:
        start: the L-BFGS run.
        lr: learning rate.
        batch_size: of SGD with random reshuffling, ``None`` for GD.
        steps: how many.
        looks: how many measurements, at equal distances of the logarithm of the step.

    The result has ``course``: at the start and at each look ``step``, training ``loss``, ``test``
    accuracy on the half of the test images by which no rate was chosen, and ``sharpness``; up to
    where it diverged, should it.
    """

    kind = "after-lbfgs"

    start: Training
    lr: float
    batch_size: int | None
    steps: int
    looks: int = 8

    @property
    def needs(self) -> tuple[Job, ...]:
        """The start."""
        return (self.start,)

    @property
    def flops(self) -> float:
        """Of the steps, and of some thirty products at a look, each of three gradients."""
        n = self.start.data.n
        samples = self.steps * (self.batch_size or n) + 90.0 * self.looks * n
        return samples * flops_per_sample(self.start.data.name, None)

    def run(self, work: Work) -> dict[str, Any]:
        """Train, and look."""
        images = images_for(self.start.data, work)
        model = network(self.start.data.name, seed=self.start.seed).to(work.place.device)
        model.load_state_dict(work.tensors(self.start))
        _, reported_on = halves(images)
        looks = {0, *np.geomspace(100, self.steps, self.looks).round().astype(int).tolist()}
        course: list[dict[str, Any]] = []

        def look(step: int) -> None:
            found = {"step": step, "loss": evaluate(model, images)}
            if found["loss"] < math.inf:
                found |= {
                    "test": reported_on.accuracy(model),
                    "sharpness": self._sharpness(model, images),
                }
                course.append(found)

        def after_step(step: int, loss: float) -> bool:
            if step in looks:
                look(step)
            work.progress(step / self.steps, f"η = {self.lr:g}, step {step:,}, loss {loss:.1e}")
            return not loss < math.inf

        look(0)
        batches = all_samples(images)
        if self.batch_size is not None:
            generator = torch.Generator().manual_seed(self.start.seed)
            batches = reshuffled_batches(images, self.batch_size, generator)
        optimizer = stableopt.SGD(model.parameters(), lr=self.lr)
        taken = train(model, optimizer, batches, steps=self.steps, after_step=after_step)
        return {"course": course, "diverged": taken < self.steps}

    def _sharpness(self, model: torch.nn.Module, images: Images) -> float | None:
        margins = stableopt.measure(
            model, mean_squared_error, images.samples, lr=self.lr, quantities=("sharpness",)
        )
        return margins.sharpness


@dataclass(frozen=True)
class LimitCourse(Job):
    r"""L-BFGS's preconditioned sharpness over its limit, at each of its last steps.

    Step t multiplies the gradient at :math:`\theta_t` by :math:`P_t`. The same :math:`P_t` is compared
    with the Hessian where it was applied, :math:`\lambda_{\max}(P_tH(\theta_t))`, and where it led to,
    :math:`\lambda_{\max}(P_tH(\theta_{t+1}))`, which is what a measurement after a step sees.

    Attributes:
        start: the run, which is repeated.
        last: steps before its end that are measured.

    The result has ``course``: ``step``, training ``loss``, the ratios ``applied`` and ``after``, and
    ``sharpness``.
    """

    kind = "lbfgs-limit"

    start: Training
    last: int = 60

    @property
    def needs(self) -> tuple[Job, ...]:
        """The run."""
        return (self.start,)

    @property
    def flops(self) -> float:
        """Of the run, and of two measurements a step, some thirty products each."""
        return self.start.flops + 180.0 * self.last * self.start.data.n * flops_per_sample(
            self.start.data.name, None
        )

    def run(self, work: Work) -> dict[str, Any]:
        """Train again, and measure each of the last steps."""
        found = work.result(self.start)
        images = images_for(self.start.data, work)
        model = network(self.start.data.name, seed=self.start.seed).to(work.place.device)
        optimizer = METHODS[self.start.method].make(model.parameters(), found.lr)
        before: dict[str, torch.Tensor] = {}
        course: list[dict[str, Any]] = []

        def ratio() -> tuple[float, float | None]:
            margins = stableopt.measure(
                model,
                mean_squared_error,
                images.samples,
                optimizer=optimizer,
                quantities=("sharpness",),
                max_iter=300,
            )
            assert margins.preconditioned_sharpness is not None
            assert margins.preconditioned_sharpness_limit is not None
            limit = margins.preconditioned_sharpness_limit
            return margins.preconditioned_sharpness / limit, margins.sharpness

        def after_step(step: int, loss: float) -> bool:
            nonlocal before
            here = {name: value.clone() for name, value in model.state_dict().items()}
            if step > found.steps - self.last:
                after, _ = ratio()
                model.load_state_dict(before)
                applied, sharpness = ratio()
                model.load_state_dict(here)
                course.append(
                    {"step": step, "loss": loss, "applied": applied, "after": after}
                    | {"sharpness": sharpness}
                )
            before = here
            work.progress(step / found.steps, f"L-BFGS, step {step:,}, loss {loss:.1e}")
            return not loss < math.inf

        batches = all_samples(images)
        train(model, optimizer, batches, steps=found.steps, after_step=after_step, closure=True)
        return {"course": course}
