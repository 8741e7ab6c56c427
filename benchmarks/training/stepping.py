"""The steps of one training, from a random start to where it ends."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

import stableopt
from benchmarks.runner import Work
from benchmarks.training.data import Images
from benchmarks.training.loops import evaluate, mean_squared_error

if TYPE_CHECKING:
    from benchmarks.training.minimum import Solution

__all__ = ["GDWalk", "SGDWalk", "due", "note", "outcome", "walk", "worth_a_line"]


def walk(job: Solution, model: nn.Module, images: Images) -> GDWalk | SGDWalk:
    """Return what takes the steps of ``job``."""
    return GDWalk(job, model, images) if job.batch_size is None else SGDWalk(job, model, images)


def outcome(job: Solution, steps: int, loss: float) -> str | None:
    """Return how training ends at this loss, or ``None`` if it goes on."""
    if not loss < math.inf:
        return "diverged"
    if loss <= job.target_loss:
        return "reached"
    return "out of steps" if steps >= job.max_steps else None


def note(job: Solution, work: Work, steps: int, loss: float, first: float) -> None:
    """Note how far training is: the loss falls about as a power of time, so its logarithm is honest.

    Args:
        job: what is trained.
        work: its work.
        steps: that it took.
        loss: after them.
        first: before the first.
    """
    work.progress(
        math.log(first / loss) / math.log(first / job.target_loss),
        f"η = {job.lr:g}, step {steps:,}, loss {loss:.1e}",
    )


def worth_a_line(epochs: int) -> bool:
    """Say whether the trace is to have the loss after this epoch: many at first, then each 100th."""
    return epochs & (epochs - 1) == 0 or epochs % 100 == 0


def due(every: int | None, going: GDWalk | SGDWalk) -> bool:
    """Say whether the sharpness is to be measured: steps may come in epochs."""
    if every is None:
        return False
    before = going.steps - going.steps_in_epoch
    return before // every < going.steps // every or going.steps.bit_length() > before.bit_length()


class GDWalk:
    """Steps of gradient descent; an epoch is one."""

    steps_in_epoch = 1

    def __init__(self, job: Solution, model: nn.Module, images: Images) -> None:
        self.model, self.images = model, images
        self.optimizer = stableopt.GD(model.parameters(), lr=job.lr)
        self.generator = torch.Generator()
        self.steps = 0
        size = len(images.x) if images.x.ndim == 2 else 250  # so that activations stay in the cache
        self.data = list(zip(images.x.split(size), images.y.split(size), strict=True))

    @property
    def epochs(self) -> int:
        """How many it has taken."""
        return self.steps

    def look(self) -> float:
        """Return the training loss, and leave its gradient for the step."""
        return self.optimizer.full_gradient(self.model.train(), mean_squared_error, self.data)

    def on(self) -> None:
        """Take a step, by the gradient of the last look."""
        self.optimizer.step()
        self.steps += 1


class SGDWalk:
    """Epochs of SGD, each in a new order, as a shuffling DataLoader does."""

    def __init__(self, job: Solution, model: nn.Module, images: Images) -> None:
        assert job.batch_size is not None
        self.model, self.images, self.batch_size = model, images, job.batch_size
        self.optimizer = stableopt.SGD(model.parameters(), lr=job.lr)
        self.generator = torch.Generator().manual_seed(job.seed)
        self.steps = 0
        self.steps_in_epoch = math.ceil(len(images.x) / job.batch_size)

    @property
    def epochs(self) -> int:
        """How many it has taken."""
        return self.steps // self.steps_in_epoch

    def look(self) -> float:
        """Return the training loss."""
        return evaluate(self.model.eval(), self.images)

    def on(self) -> None:
        """Take the steps of an epoch."""
        self.model.train()
        order = torch.randperm(len(self.images.x), generator=self.generator)
        for rows in order.to(self.images.x.device).split(self.batch_size):
            self.optimizer.zero_grad()
            mean_squared_error(self.model(self.images.x[rows]), self.images.y[rows]).backward()
            self.optimizer.step()
            self.steps += 1
