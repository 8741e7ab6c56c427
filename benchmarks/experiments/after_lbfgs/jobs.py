"""`Continued`: GD or SGD after L-BFGS, measured along the way; `LimitCourse`: L-BFGS's own limit."""

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
    """GD or SGD from the end of an L-BFGS run, with measurements along the way.

    Attributes:
        start: the L-BFGS run.
        lr: learning rate.
        batch_size: batch size of SGD with random reshuffling; ``None`` for GD.
        steps: number of steps.
        looks: number of measurements, evenly spaced in the logarithm of the step.

    The result has ``course``, a record for the start and for each measurement: ``step``, training
    ``loss``, ``test`` accuracy on the half of the test images by which no learning rate was chosen, and
    ``sharpness``. It ends where training diverges.
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
        """The steps, and per measurement about thirty products of three gradients each."""
        n = self.start.data.n
        samples = self.steps * (self.batch_size or n) + 90.0 * self.looks * n
        return samples * flops_per_sample(self.start.data.name, None)

    def run(self, work: Work) -> dict[str, Any]:
        """Train, with measurements along the way."""
        images = images_for(self.start.data, work)
        model = network(self.start.data.name, seed=self.start.seed).to(work.place.device)
        model.load_state_dict(work.tensors(self.start))
        _, reported_on = halves(images)
        looks = {0, *np.geomspace(100, self.steps, self.looks).round().astype(int).tolist()}
        course: list[dict[str, Any]] = []

        def measure(step: int) -> None:
            record = {"step": step, "loss": evaluate(model, images)}
            if record["loss"] < math.inf:
                record |= {
                    "test": reported_on.accuracy(model),
                    "sharpness": self._sharpness(model, images),
                }
                course.append(record)

        def after_step(step: int, loss: float) -> bool:
            if step in looks:
                measure(step)
            work.progress(step / self.steps, f"η = {self.lr:g}, step {step:,}, loss {loss:.1e}")
            return not loss < math.inf

        measure(0)
        batches = all_samples(images)
        if self.batch_size is not None:
            generator = torch.Generator().manual_seed(self.start.seed)
            batches = reshuffled_batches(images, self.batch_size, generator)
        optimizer = stableopt.SGD(model.parameters(), lr=self.lr)
        steps_taken = train(model, optimizer, batches, steps=self.steps, after_step=after_step)
        return {"course": course, "diverged": steps_taken < self.steps}

    def _sharpness(self, model: torch.nn.Module, images: Images) -> float | None:
        margins = stableopt.measure(
            model, mean_squared_error, images.samples, lr=self.lr, quantities=("sharpness",)
        )
        return margins.sharpness


@dataclass(frozen=True)
class LimitCourse(Job):
    r"""L-BFGS's preconditioned sharpness over its limit, at each of its last steps.

    Step t multiplies the gradient at :math:`\theta_t` by :math:`P_t`. Two ratios are measured: with the
    Hessian before the step, :math:`\lambda_{\max}(P_tH(\theta_t))`, and with the one after it,
    :math:`\lambda_{\max}(P_tH(\theta_{t+1}))`, as a measurement in a step hook does.

    Attributes:
        start: the L-BFGS run, which is repeated.
        last: number of its last steps that are measured.

    The result has ``course``, a record for each measured step: ``step``, training ``loss``, the ratio
    before the step (``applied``) and ``after`` it, and ``sharpness`` before it.
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
        """The run, and per measured step two measurements of about thirty products each."""
        return self.start.flops + 180.0 * self.last * self.start.data.n * flops_per_sample(
            self.start.data.name, None
        )

    def run(self, work: Work) -> dict[str, Any]:
        """Repeat the run, and measure each of its last steps."""
        trained = work.result(self.start)
        images = images_for(self.start.data, work)
        model = network(self.start.data.name, seed=self.start.seed).to(work.place.device)
        optimizer = METHODS[self.start.method].make(model.parameters(), trained.lr)
        previous_weights: dict[str, torch.Tensor] = {}
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
            nonlocal previous_weights
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            if step > trained.steps - self.last:
                after, _ = ratio()
                model.load_state_dict(previous_weights)
                applied, sharpness = ratio()
                model.load_state_dict(weights)
                course.append(
                    {"step": step, "loss": loss, "applied": applied, "after": after}
                    | {"sharpness": sharpness}
                )
            previous_weights = weights
            work.progress(step / trained.steps, f"L-BFGS, step {step:,}, loss {loss:.1e}")
            return not loss < math.inf

        batches = all_samples(images)
        train(model, optimizer, batches, steps=trained.steps, after_step=after_step, closure=True)
        return {"course": course}
