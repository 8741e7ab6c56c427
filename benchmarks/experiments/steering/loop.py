"""What all ways of steering share: a loop of steps, and what is measured at its end."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.data import RandomSampler

import stableopt
from benchmarks.experiments.steering.case import Outcome
from benchmarks.training.data import Images
from benchmarks.training.loops import mean_squared_error
from benchmarks.training.measured import BOTH
from stableopt import AdaptiveBatchSampler, StabilityController, StabilityMargins

__all__ = ["ended", "margins_at_end", "sampler_of", "train", "with_batch"]


def sampler_of(images: Images, batch_size: int, seed: int) -> AdaptiveBatchSampler:
    """Return batches of a size that can be changed, in an order that ``seed`` draws."""
    n = len(images.x)
    order = RandomSampler(range(n), generator=torch.Generator().manual_seed(seed))
    return AdaptiveBatchSampler(order, min(batch_size, n), max_batch_size=n)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    sampler: AdaptiveBatchSampler,
    steps: int,
    after_step: Callable[[], None] = lambda: None,
) -> float:
    """Train, and return the largest loss of a batch that was seen."""
    largest, whole = 0.0, sampler.batch_size == len(images.x)
    for _, rows in zip(range(steps), _rows(sampler), strict=False):
        # The order of a full batch does not matter, and copying it costs as much as a step.
        x, y = (images.x, images.y) if whole else (images.x[rows], images.y[rows])
        optimizer.zero_grad()
        loss = mean_squared_error(model(x), y)
        loss.backward()
        optimizer.step()
        after_step()
        value = float(loss.detach())
        largest = max(largest, value if math.isfinite(value) else math.inf)
    return largest


def _rows(sampler: AdaptiveBatchSampler) -> Iterator[list[int]]:
    while True:
        yield from sampler


def ended(
    method: str,
    region: str,
    seed: int,
    steps: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Images,
    largest: float | None = None,
    controller: StabilityController | None = None,
) -> Outcome:
    """Return what became of a run that has ended: by its controller's history, if it had one."""
    history = [] if controller is None else list(controller.monitor.history)
    end = margins_at_end(model, optimizer, images)
    if controller is not None:
        size = controller.monitor.batch_size or len(images.x)
        end = with_batch(end, size)
    losses = [math.inf if m.loss is None else m.loss for m in history]
    products = sum(q.products for m in history for q in m.measurements.values())
    return Outcome(
        method,
        region,
        seed,
        steps,
        products,
        end,
        images.accuracy(model),
        max(losses) if largest is None else largest,
        None if controller is None else controller.target,
        history,
        [] if controller is None else list(controller.decisions),
    )


def margins_at_end(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Images
) -> StabilityMargins:
    """Return the margins, closely measured."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return stableopt.measure(
            model,
            mean_squared_error,
            (images.x, images.y),
            optimizer=optimizer,
            quantities=BOTH,
            tol=1e-3,
        )


def with_batch(margins: StabilityMargins, batch_size: int) -> StabilityMargins:
    """Return the margins with the batch size that there was in the end."""
    return StabilityMargins(**{**vars(margins), "batch_size": batch_size})
