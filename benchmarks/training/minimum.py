"""`Solution`: the job that trains to a minimum and measures it; `minima`: a grid of them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from benchmarks.framework.experiment import Case, Experiment, case
from benchmarks.runner import Job, Work
from benchmarks.training import ensemble
from benchmarks.training.data import Dataset, Images, images_for
from benchmarks.training.loops import collapsed, evaluate
from benchmarks.training.measured import measured
from benchmarks.training.networks import flops_per_sample, network
from benchmarks.training.spec import LOST, outcome, report, worth_a_line
from benchmarks.training.stepping import due, walk

__all__ = ["Minimum", "Solution", "Start", "from_minimum", "minima", "passes_to"]

CHECKPOINT_SECONDS = 60.0
"""Between two checkpoints: what a killed run may lose."""


@dataclass(frozen=True)
class Minimum:
    """Where training ended.

    Attributes:
        outcome: ``"reached"``, ``"diverged"``, ``"out of steps"``, or ``"collapsed"`` where all samples
            have the same outputs.
        steps: that were taken.
        loss: training loss at the end; ``None`` if it is not finite.
        test_accuracy: share of the test images that are classified correctly.
        sharpness: λmax of the Hessian.
        sharpness_limit: 2/η.
        non_uniformity: of the samples' Hessians, if it was measured.
        non_uniformity_limit: its bound for the batch size, √B/η for many samples.

    What was not measured is ``None``: all but the first three of a run that diverged or collapsed.
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
    """GD or SGD from a random start until the training loss is small, and measurements there.

    Attributes:
        data: the images.
        lr: learning rate.
        seed: of the initialisation and of the batches' order.
        batch_size: of SGD with random reshuffling, ``None`` for GD.
        target_loss: training loss at which to stop.
        max_steps: at which it stops in any case.
        network: see :func:`benchmarks.training.networks.network`.
        scale: of the initialisation; see there.
        non_uniformity: whether to measure it; sharpness always is.
        sharpness_every: steps between measurements of the sharpness for the trace, which are also
            made at powers of two; ``None`` for none.

    The result is a :class:`Minimum`; the weights are kept.
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

    def model(self, device: str = "cpu") -> nn.Module:
        """Return the network before its first step."""
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
        """Learning rate, seed and scale may differ.

        Batch norm's averages cannot be stacked, and sharpness on the way is for lone runs.
        """
        if self.network == "resnet" or self.sharpness_every is not None:
            return None
        return (self.data, self.network, self.batch_size, self.target_loss, self.max_steps)

    @classmethod
    def run_together(cls, jobs: list[Any], works: list[Work]) -> list[dict[str, Any]]:
        """Train as one; see :mod:`benchmarks.training.ensemble`. Measurements follow one by one."""
        ends = ensemble.train(jobs, works, images_for(jobs[0].data, works[0]))
        results = []
        for job, work, end in zip(jobs, works, ends, strict=True):
            model = job.model(work.place.device)
            model.load_state_dict(end.weights)
            results.append(job._found(model, work, end.outcome, end.steps, end.loss))
        return results

    def run(self, work: Work) -> dict[str, Any]:
        """Train, measure, keep the weights."""
        model = self.model(work.place.device)
        return self._found(model, work, *_train(self, model, images_for(self.data, work), work))

    def _found(
        self, model: nn.Module, work: Work, outcome: str, steps: int, loss: float
    ) -> dict[str, Any]:
        work.save(model.state_dict())
        found = {"outcome": outcome, "steps": steps, "loss": loss}
        if outcome in LOST:
            return found
        images = images_for(self.data, work)
        at_end = measured(
            model,
            images,
            lr=self.lr,
            batch_size=self.batch_size,
            non_uniformity=self.non_uniformity,
        )
        return {**found, "test_accuracy": images.accuracy(model), **at_end}


class Start(NamedTuple):
    """A minimum to continue from: its network with the weights of the end, on the job's device."""

    found: Minimum
    model: nn.Module
    images: Images


def from_minimum(start: Solution, work: Work, *, allow_unfinished: bool = False) -> Start:
    """Return the network, the weights and the images of a solution that a job needs.

    Raises:
        ValueError: if training diverged, collapsed or, unless ``allow_unfinished``, ran out of steps.
    """
    found = work.result(start)
    if found.outcome != "reached" and not (allow_unfinished and found.outcome == "out of steps"):
        raise ValueError(f"{start.id} has not reached a minimum: {found.outcome}")
    model = start.model(work.place.device)
    model.load_state_dict(work.tensors(start))
    return Start(found, model, images_for(start.data, work))


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


def passes_to(loss: float, lr: float) -> float:
    """Return roughly how many passes over the data training takes, within a factor of four or so.

    >>> passes_to(0.01, lr=0.5)
    1600.0
    """
    return 80 / (lr * loss**0.5)


def _train(job: Solution, model: nn.Module, images: Images, work: Work) -> tuple[str, int, float]:
    """Return the outcome, the number of steps, and the training loss after them."""
    going = walk(job, model, images)
    state = work.restored()
    if state is not None:
        model.load_state_dict(state["model"])
        going.generator.set_state(state["generator"].cpu())
        going.steps = state["steps"]
    first = state["first"] if state is not None else evaluate(model.eval(), images)
    saved = time.monotonic()
    while True:
        loss = going.look()
        if worth_a_line(going.epochs):
            work.trace(step=going.steps, loss=loss)
        if due(job.sharpness_every, going) and loss < math.inf:
            now = measured(model, images, lr=job.lr, non_uniformity=False)
            work.trace(step=going.steps, loss=loss, sharpness=now["sharpness"])
        ended = outcome(
            job,
            going.steps,
            loss,
            epochs=going.epochs,
            dead=lambda: collapsed(model.eval(), images),
        )
        if ended is not None:
            return ended, going.steps, loss
        report(job, work, going.steps, loss, first)
        going.on()
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            saved = time.monotonic()
            kept = {"model": model.state_dict(), "generator": going.generator.get_state()}
            work.checkpoint({**kept, "steps": going.steps, "first": first})
