"""Training loops that the experiments share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import stableopt
from benchmarks.data import Images

__all__ = ["Diverged", "evaluate", "gd_until", "reshuffled_batches", "sgd_steps"]

mean_squared_error = nn.MSELoss()
"""The paper's loss: the mean over samples and outputs."""


class Diverged(ArithmeticError):
    """The training loss is not finite."""


def evaluate(model: nn.Module, images: Images) -> float:
    """Return the mean training loss."""
    with torch.no_grad():
        return float(mean_squared_error(model(images.x), images.y))


def gd_until(
    target_loss: float,
    model: nn.Module,
    images: Images,
    optimizer: stableopt.GD,
    *,
    max_steps: int,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> int:
    """Train by gradient descent until the training loss is at most ``target_loss``.

    Returns the number of steps. Raises ``Diverged`` for a loss that is not finite or is still above
    the target after ``max_steps``.
    """
    for step in range(max_steps):
        loss = optimizer.full_gradient(model, mean_squared_error, (images.x, images.y))
        if not loss < float("inf"):
            raise Diverged(f"the loss is {loss} after {step} steps")
        if loss <= target_loss:
            return step
        optimizer.step()
        progress(step + 1, loss)
    raise Diverged(f"the loss is {loss} after {max_steps} steps, above {target_loss}")


def reshuffled_batches(
    images: Images, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches for ever, in a new order each epoch, as a shuffling DataLoader does."""
    while True:
        for rows in torch.randperm(len(images.x), generator=generator).split(batch_size):
            yield images.x[rows], images.y[rows]


def sgd_steps(
    start: nn.Module,
    images: Images,
    *,
    lr: float,
    batch_size: int,
    steps: int,
    seed: int,
    before: Callable[[stableopt.SGD, nn.Module], None] = lambda optimizer, model: None,
) -> Iterator[tuple[int, nn.Module]]:
    """Train a copy of ``start`` by SGD, yielding ``(step, model)`` after each step.

    ``before`` is called once with optimizer and model: the place to track them.
    """
    model = copy.deepcopy(start)
    optimizer = stableopt.SGD(model.parameters(), lr=lr)
    before(optimizer, model)
    batches = reshuffled_batches(images, batch_size, torch.Generator().manual_seed(seed))
    for step in range(1, steps + 1):
        x, y = next(batches)
        optimizer.zero_grad()
        mean_squared_error(model(x), y).backward()
        optimizer.step()
        yield step, model
