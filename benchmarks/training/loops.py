"""`train`: the training loop shared by the experiments, its batches, and the loss."""

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
"""Called with the number of steps taken and a batch's loss; ``True`` stops the training."""

mean_squared_error = nn.MSELoss()
"""The paper's loss: the mean over samples and outputs."""


class DivergedError(ArithmeticError):
    """Training did not reach its target loss."""


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
    """Take a step for each batch, until batches or ``steps`` are exhausted or a hook returns ``True``.

    Args:
        model: the model, in training or evaluation mode as it is to be trained.
        optimizer: optimizer of its parameters.
        batches: inputs and targets. Later calls can continue with the unused batches.
        loss_fn: mean loss of outputs and targets.
        steps: largest number of steps.
        before_step: called with the batch's loss once its gradient is ready; not with ``closure``.
        after_step: called with the same loss after the step, before the next batch is drawn.
        closure: pass a closure to ``optimizer.step``.
        create_graph: keep the gradient's graph, for optimizers that differentiate twice.

    Returns:
        The number of steps taken.
    """
    steps_taken = 0
    for x, y in islice(batches, steps):

        def compute_loss(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            torch.autograd.backward(loss, create_graph=create_graph)
            return loss

        loss = optimizer.step(compute_loss) if closure else compute_loss()
        # Reading the loss synchronizes with the device, so it is read only for a hook.
        batch_loss = float(loss.detach()) if before_step or after_step else math.nan
        if not closure:
            if before_step and before_step(steps_taken, batch_loss) is True:
                return steps_taken
            optimizer.step()
        steps_taken += 1
        if after_step and after_step(steps_taken, batch_loss) is True:
            return steps_taken
    return steps_taken


def evaluate(model: nn.Module, images: Images) -> float:
    """Return the mean training loss."""
    with torch.no_grad():
        out = torch.cat([model(x) for x in images.x.split(1000)])
        return float(mean_squared_error(out, images.y))


def collapsed(model: Callable[[Tensor], Tensor], images: Images) -> bool:
    """Return whether the outputs are exactly the same for all samples.

    Then no unit of some ReLU layer is active for any sample: all gradients before it are zero, and
    further training only changes biases after it.
    """
    with torch.no_grad():
        first = model(images.x[:1])
        return all(bool((model(x) == first).all()) for x in images.x.split(1000))


def gd_until(
    target_loss: float, model: nn.Module, images: Images, optimizer: stableopt.GD, *, max_steps: int
) -> int:
    """Train by gradient descent until the training loss is at most ``target_loss``.

    Returns the number of steps. Raises ``DivergedError`` if the loss is not finite, or is still above
    the target after ``max_steps``.
    """
    last_loss = math.inf

    def reached_target(step: int, loss: float) -> bool:
        nonlocal last_loss
        last_loss = loss
        if not loss < math.inf:
            raise DivergedError(f"the loss is {loss} after {step} steps")
        return loss <= target_loss

    steps = train(
        model, optimizer, all_samples(images), steps=max_steps, before_step=reached_target
    )
    if last_loss <= target_loss:
        return steps
    raise DivergedError(f"the loss is {last_loss} after {max_steps} steps, above {target_loss}")


def all_samples(images: Images) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all training samples as one batch, endlessly."""
    return repeat(images.samples)


def reshuffled_batches(
    images: Images, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches endlessly, in a new random order each epoch, like a shuffling DataLoader."""
    while True:
        for rows in torch.randperm(len(images.x), generator=generator).split(batch_size):
            yield images.x[rows], images.y[rows]


def independent_batches(
    images: Images, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches endlessly; each is an independent draw without replacement."""
    while True:
        rows = torch.randperm(len(images.x), generator=generator)[:batch_size]
        yield images.x[rows], images.y[rows]
