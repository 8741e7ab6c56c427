"""`train`: the training loop that the experiments share, its batches, and the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice, repeat

import torch
from torch import Tensor, nn

import stableopt
from benchmarks.training.data import Images

__all__ = [
    "DivergedError",
    "all_samples",
    "collapsed",
    "evaluate",
    "gd_until",
    "independent_batches",
    "mean_squared_error",
    "reshuffled_batches",
    "train",
]

Hook = Callable[[int, float], object]
"""Called with the steps that were taken and a batch's loss; ``True`` ends the training."""

mean_squared_error = nn.MSELoss()
"""The paper's loss: the mean over samples and outputs."""


class DivergedError(ArithmeticError):
    """The training loss is not finite."""


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    loss_fn: nn.Module = mean_squared_error,
    steps: int | None = None,
    before_step: Hook | None = None,
    after_step: Hook | None = None,
    closure: bool = False,
    create_graph: bool = False,
) -> int:
    """Take a step for each batch, until they or ``steps`` run out or a hook returns ``True``.

    Args:
        model: in the mode that it is trained in.
        optimizer: of its parameters.
        batches: taken only as far as they are used, so that training may continue with the rest.
        loss_fn: mean loss of outputs and targets.
        steps: the most that are taken.
        before_step: called with the batch's loss when its gradient is ready; not with ``closure``.
        after_step: called with the same loss after the step, before the next batch is drawn.
        closure: hand the loss to ``optimizer.step`` as a closure.
        create_graph: keep the graph of the gradient, for optimizers that differentiate twice.

    Returns:
        The number of steps taken.
    """
    taken = 0
    for x, y in islice(batches, steps):

        def compute(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            torch.autograd.backward(loss, create_graph=create_graph)
            return loss

        loss = optimizer.step(compute) if closure else compute()
        # Reading the loss makes the host wait for the device: only for a hook.
        value = float(loss.detach()) if before_step or after_step else math.nan
        if not closure:
            if before_step and before_step(taken, value) is True:
                return taken
            optimizer.step()
        taken += 1
        if after_step and after_step(taken, value) is True:
            return taken
    return taken


def evaluate(model: nn.Module, images: Images) -> float:
    """Return the mean training loss."""
    with torch.no_grad():
        out = torch.cat([model(x) for x in images.x.split(1000)])
        return float(mean_squared_error(out, images.y))


def collapsed(model: Callable[[Tensor], Tensor], images: Images) -> bool:
    """Say whether all samples have exactly the same outputs.

    Then no unit of some ReLU layer is active for any of them: all gradients before it are zero, and
    training can only move the bias behind it, however long it goes on.
    """
    with torch.no_grad():
        first = model(images.x[:1])
        return all(bool((model(x) == first).all()) for x in images.x.split(1000))


def gd_until(
    target_loss: float, model: nn.Module, images: Images, optimizer: stableopt.GD, *, max_steps: int
) -> int:
    """Train by gradient descent until the training loss is at most ``target_loss``.

    Returns the number of steps. Raises ``DivergedError`` for a loss that is not finite or is still
    above the target after ``max_steps``.
    """
    last = math.inf

    def look(step: int, loss: float) -> bool:
        nonlocal last
        last = loss
        if not loss < math.inf:
            raise DivergedError(f"the loss is {loss} after {step} steps")
        return loss <= target_loss

    steps = train(model, optimizer, all_samples(images), steps=max_steps, before_step=look)
    if last <= target_loss:
        return steps
    raise DivergedError(f"the loss is {last} after {max_steps} steps, above {target_loss}")


def all_samples(images: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all training samples as one batch, again and again."""
    return repeat(images.samples)


def reshuffled_batches(
    images: Images, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end, in a new order each epoch, as a shuffling DataLoader does."""
    while True:
        for rows in torch.randperm(len(images.x), generator=generator).split(batch_size):
            yield images.x[rows], images.y[rows]


def independent_batches(
    images: Images, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches without end, each drawn without replacement and independently of the others."""
    while True:
        rows = torch.randperm(len(images.x), generator=generator)[:batch_size]
        yield images.x[rows], images.y[rows]
