"""`Solution`: the job that trains to a minimum and measures it; `minima`: a grid of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from benchmarks.framework.experiment import Case, Experiment, case_of
from benchmarks.runner import Job, Work
from benchmarks.training import ensemble
from benchmarks.training.data import Dataset, Images, images_for
from benchmarks.training.loops import collapsed, evaluate
from benchmarks.training.measured import measured
from benchmarks.training.networks import flops_per_sample, network
from benchmarks.training.spec import LOST, is_traced, outcome, report
from benchmarks.training.stepping import is_sharpness_due, training_run

__all__ = ["Minimum", "Solution", "Start", "from_minimum", "minima", "passes_to"]

CHECKPOINT_SECONDS = 60.0
"""Time between two checkpoints, the most that a killed run loses."""


@dataclass(frozen=True)
class Minimum:
    """The end of a training run.

    Attributes:
        outcome: ``"reached"``, ``"diverged"``, ``"out of steps"``, or ``"collapsed"`` if the outputs are
            the same for all samples.
        steps: number of steps taken.
        loss: training loss at the end; ``None`` if it is not finite.
        test_accuracy: fraction of the test images that are classified correctly.
        sharpness: λmax of the Hessian.
        sharpness_limit: 2/η.
        non_uniformity: non-uniformity of the samples' Hessians.
        non_uniformity_limit: its bound for the batch size, √B/η for many samples.

    Unmeasured quantities are ``None``. Runs that diverged or collapsed have only the first three.
    """

    outcome: str
    steps: int
    loss: float | None
    test_accuracy: float | None = None
    sharpness: float | None = None
    sharpness_limit: float | None = None
    non_uniformity: float | None = None
    non_uniformity_limit: float | None = None
    sharpness_relative_residual: float | None = None
    non_uniformity_relative_residual: float | None = None


@dataclass(frozen=True)
class Solution(Job):
    """GD or SGD from initialisation to a small training loss, and measurements at the end.

    Attributes:
        data: the images.
        lr: learning rate.
        seed: seed of the initialisation and of the batches' order.
        batch_size: batch size of SGD with random reshuffling; ``None`` for GD.
        target_loss: training loss at which to stop.
        max_steps: largest number of steps.
        network: see :func:`benchmarks.training.networks.network`.
        scale: scale of the initialisation; see there.
        non_uniformity: whether to measure the non-uniformity; the sharpness is always measured.
        sample: number of training images on which it is measured, the first ones; ``None`` for all.
        sharpness_every: steps between measurements of the sharpness for the trace, in addition to
            those at powers of two; ``None`` for none.

    The result is a :class:`Minimum`; the weights are saved.
    """

    kind = "solution"
    Result: ClassVar = Minimum

    data: Dataset
    lr: float
    seed: int = 0
    batch_size: int | None = None
    target_loss: float = 1e-4
    max_steps: int = 1_000_000
    network: str | None = None
    scale: float | None = None
    non_uniformity: bool = True
    sharpness_every: int | None = None
    sample: int | None = None

    def model(self, device: str = "cpu") -> nn.Module:
        """Return the initialised network."""
        model = network(self.data.name, seed=self.seed, kind=self.network, scale=self.scale)
        return model.to(device, memory_format=torch.channels_last)

    @property
    def flops(self) -> float:
        """See :func:`passes_to`."""
        epoch_steps = math.ceil(self.data.n / (self.batch_size or self.data.n))
        passes = min(passes_to(self.target_loss, self.lr), self.max_steps / epoch_steps)
        return passes * self.data.n * flops_per_sample(self.data.name, self.network)

    @property
    def together(self) -> tuple[object, ...] | None:
        """All fields but learning rate, seed and scale must agree.

        Not for batch norm, whose running averages are not stacked, nor with ``sharpness_every``.
        """
        if self.network == "resnet" or self.sharpness_every is not None:
            return None
        return (self.data, self.network, self.batch_size, self.target_loss, self.max_steps)

    @classmethod
    def run_together(cls, jobs: list[Any], works: list[Work]) -> list[dict[str, Any]]:
        """Train as one; see :mod:`benchmarks.training.ensemble`. Then measure one by one."""
        endings = ensemble.train(jobs, works, images_for(jobs[0].data, works[0]))
        results = []
        for job, work, ending in zip(jobs, works, endings, strict=True):
            model = job.model(work.place.device)
            model.load_state_dict(ending.weights)
            results.append(job._result(model, work, ending.outcome, ending.steps, ending.loss))
        return results

    def run(self, work: Work) -> dict[str, Any]:
        """Train, measure, save the weights."""
        model = self.model(work.place.device)
        return self._result(model, work, *_train(self, model, images_for(self.data, work), work))

    def _result(
        self, model: nn.Module, work: Work, outcome: str, steps: int, loss: float
    ) -> dict[str, Any]:
        work.save(model.state_dict())
        result = {"outcome": outcome, "steps": steps, "loss": loss}
        if outcome in LOST:
            return result
        images = images_for(self.data, work)
        margins = measured(
            model,
            images,
            lr=self.lr,
            batch_size=self.batch_size,
            non_uniformity=self.non_uniformity,
            sample=self.sample,
        )
        return {**result, "test_accuracy": images.accuracy(model), **margins}


class Start(NamedTuple):
    """A minimum to continue from, its trained network and its images, on the job's device."""

    minimum: Minimum
    model: nn.Module
    images: Images


def from_minimum(start: Solution, work: Work, *, allow_unfinished: bool = False) -> Start:
    """Return a needed solution's minimum, trained network and images.

    Raises:
        ValueError: if training diverged, collapsed or, unless ``allow_unfinished``, ran out of steps.
    """
    minimum = work.result(start)
    if minimum.outcome != "reached" and not (
        allow_unfinished and minimum.outcome == "out of steps"
    ):
        raise ValueError(f"{start.id} has not reached a minimum: {minimum.outcome}")
    model = start.model(work.place.device)
    model.load_state_dict(work.tensors(start))
    return Start(minimum, model, images_for(start.data, work))


def minima(
    experiment: Experiment | Any,
    data: Dataset,
    *,
    lrs: Sequence[float],
    batch_sizes: Sequence[int | None] = (None,),
    scales: Sequence[float | None] = (None,),
    seeds: Sequence[int] | None = None,
    **shared: Any,
) -> list[Case]:
    """Return a case for each scale, learning rate, batch size and seed.

    ``target_loss`` and ``max_steps`` are the experiment's, and so are ``seeds`` by default.

    >>> from benchmarks.experiments.gd_sharpness import GDSharpness
    >>> experiment = GDSharpness(seeds=(0, 1))
    >>> [(c.job.lr, c.job.seed) for c in minima(experiment, Dataset(), lrs=(0.5, 1.0))]
    [(0.5, 0), (0.5, 1), (1.0, 0), (1.0, 1)]
    """
    shared |= {"target_loss": experiment.target_loss, "max_steps": experiment.max_steps}
    jobs = [
        Solution(data, lr=lr, seed=seed, batch_size=size, scale=scale, **shared)
        for scale in scales
        for lr in lrs
        for size in batch_sizes
        for seed in (experiment.seeds if seeds is None else seeds)
    ]
    return [case_of(job, "lr", "batch_size", "scale", "seed") for job in jobs]


def passes_to(loss: float, lr: float) -> float:
    """Return the number of epochs that training to a loss takes, within a factor of about four.

    >>> passes_to(0.01, lr=0.5)
    1600.0
    """
    return 80 / (lr * loss**0.5)


def _train(job: Solution, model: nn.Module, images: Images, work: Work) -> tuple[str, int, float]:
    """Return the outcome, the number of steps, and the training loss after them."""
    run = training_run(job, model, images)
    state = work.restored()
    if state is not None:
        model.load_state_dict(state["model"])
        run.generator.set_state(state["generator"].cpu())
        run.steps = state["steps"]
    initial_loss = state["first"] if state is not None else evaluate(model.eval(), images)
    saved = time.monotonic()
    while True:
        loss = run.training_loss()
        if is_traced(run.epochs):
            work.trace(step=run.steps, loss=loss)
        if is_sharpness_due(job.sharpness_every, run) and loss < math.inf:
            measurement = measured(model, images, lr=job.lr, non_uniformity=False)
            work.trace(step=run.steps, loss=loss, sharpness=measurement["sharpness"])
        result = outcome(
            job,
            run.steps,
            loss,
            epochs=run.epochs,
            has_collapsed=lambda: collapsed(model.eval(), images),
        )
        if result is not None:
            return result, run.steps, loss
        report(job, work, run.steps, loss, initial_loss)
        run.advance()
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            saved = time.monotonic()
            weights_and_generator = {
                "model": model.state_dict(),
                "generator": run.generator.get_state(),
            }
            work.checkpoint({**weights_and_generator, "steps": run.steps, "first": initial_loss})
