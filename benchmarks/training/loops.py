"""Training loops that the experiments share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import stableopt
from benchmarks.training.data import Images

__all__ = [
    "DivergedError",
    "evaluate",
    "gd_until",
    "independent_batches",
    "reshuffled_batches",
]

mean_squared_error = nn.MSELoss()
"""The paper's loss: the mean over samples and outputs."""


class DivergedError(ArithmeticError):
    """The training loss is not finite."""


def evaluate(model: nn.Module, images: Images) -> float:
    """Return the mean training loss."""
    with torch.no_grad():
        out = torch.cat([model(x) for x in images.x.split(1000)])
        return float(mean_squared_error(out, images.y))


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

    Returns the number of steps. Raises ``DivergedError`` for a loss that is not finite or is still
    above the target after ``max_steps``.
    """
    for step in range(max_steps):
        loss = optimizer.full_gradient(model, mean_squared_error, (images.x, images.y))
        if not loss < float("inf"):
            raise DivergedError(f"the loss is {loss} after {step} steps")
        if loss <= target_loss:
            return step
        optimizer.step()
        progress(step + 1, loss)
    raise DivergedError(f"the loss is {loss} after {max_steps} steps, above {target_loss}")


def reshuffled_batches(
    images: Images, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches for ever, in a new order each epoch, as a shuffling DataLoader does."""
    while True:
        for rows in torch.randperm(len(images.x), generator=generator).split(batch_size):
            yield images.x[rows], images.y[rows]


def independent_batches(
    images: Images, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches for ever, each drawn without replacement and independently of the others."""
    while True:
        rows = torch.randperm(len(images.x), generator=generator)[:batch_size]
        yield images.x[rows], images.y[rows]
