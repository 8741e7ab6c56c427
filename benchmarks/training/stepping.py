"""`walk`: the steps of one training run, which can stop and continue at any epoch."""

from __future__ import annotations

import math

import torch
from torch import nn

import stableopt
from benchmarks.training.data import Images
from benchmarks.training.loops import evaluate, mean_squared_error, train
from benchmarks.training.spec import Spec

__all__ = ["GDWalk", "SGDWalk", "due", "walk"]


def walk(spec: Spec, model: nn.Module, images: Images) -> GDWalk | SGDWalk:
    """Return the steps that ``spec`` asks for."""
    return GDWalk(spec, model, images) if spec.batch_size is None else SGDWalk(spec, model, images)


def due(every: int | None, going: GDWalk | SGDWalk) -> bool:
    """Say whether to measure the sharpness: each ``every`` steps and at powers of two."""
    if every is None:
        return False
    before = going.steps - going.steps_in_epoch
    return before // every < going.steps // every or going.steps.bit_length() > before.bit_length()


class GDWalk:
    """Steps of gradient descent; an epoch is one."""

    steps_in_epoch = 1

    def __init__(self, spec: Spec, model: nn.Module, images: Images) -> None:
        self.model, self.images = model, images
        self.optimizer = stableopt.GD(model.parameters(), lr=spec.lr)
        self.generator = torch.Generator()
        self.steps = 0
        self.data = images.chunks()

    @property
    def epochs(self) -> int:
        """The number taken."""
        return self.steps

    def look(self) -> float:
        """Return the training loss, and keep its gradient for the step."""
        return self.optimizer.full_gradient(self.model.train(), mean_squared_error, self.data)

    def on(self) -> None:
        """Take a step along the gradient of the last look."""
        self.optimizer.step()
        self.steps += 1


class SGDWalk:
    """Epochs of SGD, each in a new order, as a shuffling DataLoader does."""

    def __init__(self, spec: Spec, model: nn.Module, images: Images) -> None:
        assert spec.batch_size is not None
        self.model, self.images, self.batch_size = model, images, spec.batch_size
        self.optimizer = stableopt.SGD(model.parameters(), lr=spec.lr)
        self.generator = torch.Generator().manual_seed(spec.seed)
        self.steps = 0
        self.steps_in_epoch = math.ceil(len(images.x) / spec.batch_size)

    @property
    def epochs(self) -> int:
        """The number taken."""
        return self.steps // self.steps_in_epoch

    def look(self) -> float:
        """Return the training loss."""
        return evaluate(self.model.eval(), self.images)

    def on(self) -> None:
        """Take the steps of an epoch."""
        self.model.train()
        order = torch.randperm(len(self.images.x), generator=self.generator)
        chosen = order.to(self.images.x.device).split(self.batch_size)
        batches = ((self.images.x[rows], self.images.y[rows]) for rows in chosen)
        self.steps += train(self.model, self.optimizer, batches)
