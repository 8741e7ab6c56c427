"""Training from scratch to a minimum: the job that most experiments stand on."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import stableopt
from benchmarks.runner import Job, Store, Work
from benchmarks.training import ensemble
from benchmarks.training.data import Dataset, Images
from benchmarks.training.loops import evaluate, mean_squared_error
from benchmarks.training.networks import network
from benchmarks.training.stepping import due, note, outcome, walk, worth_a_line

__all__ = ["Solution", "flops_per_sample", "grid", "images_for", "measured", "passes_to", "row"]

CHECKPOINT_SECONDS = 60.0
"""Between two checkpoints: what a killed run may lose."""


@dataclass(frozen=True)
class Solution(Job):
    """GD or SGD from a random start until the training loss is small, and what the minimum is like.

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
        sharpness_every: steps between two measurements of the sharpness along the way, which go to
            the trace, with those at powers of two; ``None`` for none.

    The result has ``outcome``, which is ``"reached"``, ``"diverged"`` or ``"out of steps"``;
    ``steps``, ``loss``, ``test_accuracy``, ``sharpness``, ``non_uniformity``, the relative residual
    of each, and the limits. The weights are kept.
    """

    kind = "solution"

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
        """Train as one; see :mod:`benchmarks.training.ensemble`. Measure one after the other."""
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
        if outcome == "diverged":
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


def grid(
    data: Dataset,
    *,
    lrs: Sequence[float],
    seeds: Sequence[int],
    batch_sizes: Sequence[int | None] = (None,),
    scales: Sequence[float | None] = (None,),
    **shared: Any,
) -> list[Solution]:
    """Return a solution for each combination; ``shared`` are fields that all have.

    >>> [(s.lr, s.seed) for s in grid(Dataset(), lrs=(0.5, 1.0), seeds=(0, 1), target_loss=0.01)]
    [(0.5, 0), (0.5, 1), (1.0, 0), (1.0, 1)]
    """
    return [
        Solution(data, lr=lr, seed=seed, batch_size=size, scale=scale, **shared)
        for scale in scales
        for lr in lrs
        for size in batch_sizes
        for seed in seeds
    ]


def images_for(data: Dataset, work: Work) -> Images:
    """Return the images on the job's device. They are loaded once in a process."""
    return _images(data, work.place.data_dir, work.place.device)


@cache
def _images(data: Dataset, folder: Path | None, device: str) -> Images:
    return data.load(folder).to(device)


def passes_to(loss: float, lr: float) -> float:
    """Return about how many passes over the data it takes: right within a factor of four or so.

    >>> passes_to(0.01, lr=0.5)
    1600.0
    """
    return 80 / (lr * loss**0.5)


@cache
def flops_per_sample(data: str, kind: str | None) -> float:
    """Return the floating-point operations of one sample's gradient."""
    model = network(data, seed=0, kind=kind).eval()
    first = next(model.parameters())
    x = torch.zeros(1, first.shape[1]) if first.ndim == 2 else torch.zeros(1, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return float(counter.get_total_flops())


def measured(
    model: nn.Module,
    images: Images,
    *,
    lr: float,
    batch_size: int | None = None,
    non_uniformity: bool = True,
) -> dict[str, Any]:
    """Return sharpness and non-uniformity, with relative residuals and the limits of SGD or GD."""
    model.eval()  # for batch norm: see resnet14
    margins = stableopt.measure(
        model,
        mean_squared_error,
        (images.x, images.y),
        lr=lr,
        batch_size=batch_size or len(images.x),
        quantities=("sharpness", "non_uniformity") if non_uniformity else ("sharpness",),
        chunk_size=None if images.x.ndim == 2 else 250,
        max_iter=300,
    )
    found: dict[str, Any] = {}
    for name, measurement in margins.measurements.items():
        value = getattr(margins, name)
        found[name] = value
        found[f"{name}_relative_residual"] = measurement.residual
        found[f"{name}_limit"] = getattr(margins, f"{name}_limit")
    return found


def row(job: Solution, store: Store) -> dict[str, Any]:
    """Return a job that is done as a row of a table."""
    found = store.result(job)
    return {
        "lr": job.lr,
        "batch_size": job.batch_size,
        "scale": job.scale,
        "seed": job.seed,
        "outcome": found["outcome"],
        "steps": found["steps"],
        "loss": found["loss"],
        "sharpness": found.get("sharpness"),
        "sharpness_limit": 2 / job.lr,
        "non_uniformity": found.get("non_uniformity"),
        "non_uniformity_limit": found.get("non_uniformity_limit"),
        "test_accuracy": found.get("test_accuracy"),
    }


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
        ended = outcome(job, going.steps, loss)
        if ended is not None:
            return ended, going.steps, loss
        note(job, work, going.steps, loss, first)
        going.on()
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            saved = time.monotonic()
            kept = {"model": model.state_dict(), "generator": going.generator.get_state()}
            work.checkpoint({**kept, "steps": going.steps, "first": first})
