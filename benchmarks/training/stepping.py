"""`training_run`: a run of GD or SGD that can stop and resume after any epoch."""

from __future__ import annotations

import math

import torch
from torch import nn

import stableopt
from benchmarks.training.data import Images
from benchmarks.training.loops import evaluate, mean_squared_error, train
from benchmarks.training.spec import Spec

__all__ = ["GDRun", "SGDRun", "is_sharpness_due", "training_run"]


def training_run(spec: Spec, model: nn.Module, images: Images) -> GDRun | SGDRun:
    """Return the run of ``spec``: GD without a batch size, else SGD."""
    return GDRun(spec, model, images) if spec.batch_size is None else SGDRun(spec, model, images)


def is_sharpness_due(every: int | None, run: GDRun | SGDRun) -> bool:
    """Return whether the last epoch passed a multiple of ``every`` steps or a power of two."""
    if every is None:
        return False
    previous = run.steps - run.steps_in_epoch
    return previous // every < run.steps // every or run.steps.bit_length() > previous.bit_length()


class GDRun:
    """Gradient descent; an epoch is one step."""

    steps_in_epoch = 1

    def __init__(self, spec: Spec, model: nn.Module, images: Images) -> None:
        self.model, self.images = model, images
        self.optimizer = stableopt.GD(model.parameters(), lr=spec.lr)
        self.generator = torch.Generator()
        self.steps = 0
        self.data = images.chunks()

    @property
    def epochs(self) -> int:
        """Number of epochs taken."""
        return self.steps

    def training_loss(self) -> float:
        """Return the training loss, and leave its gradient in ``.grad`` for the step."""
        return self.optimizer.full_gradient(self.model.train(), mean_squared_error, self.data)

    def advance(self) -> None:
        """Take a step with the gradient from :meth:`training_loss`."""
        self.optimizer.step()
        self.steps += 1


class SGDRun:
    """SGD with a new random order each epoch, like a shuffling DataLoader."""

    def __init__(self, spec: Spec, model: nn.Module, images: Images) -> None:
        assert spec.batch_size is not None
        self.model, self.images, self.batch_size = model, images, spec.batch_size
        self.optimizer = stableopt.SGD(model.parameters(), lr=spec.lr)
        self.generator = torch.Generator().manual_seed(spec.seed)
        self.steps = 0
        self.steps_in_epoch = math.ceil(len(images.x) / spec.batch_size)

    @property
    def epochs(self) -> int:
        """Number of epochs taken."""
        return self.steps // self.steps_in_epoch

    def training_loss(self) -> float:
        """Return the training loss."""
        return evaluate(self.model.eval(), self.images)

    def advance(self) -> None:
        """Take the steps of an epoch."""
        self.model.train()
        order = torch.randperm(len(self.images.x), generator=self.generator)
        index_batches = order.to(self.images.x.device).split(self.batch_size)
        batches = ((self.images.x[rows], self.images.y[rows]) for rows in index_batches)
        self.steps += train(self.model, self.optimizer, batches)
