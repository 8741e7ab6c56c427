"""`Update`: the step that continues from a minimum, with what it takes from there."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import stableopt
from benchmarks.training.data import Images
from benchmarks.training.loops import mean_squared_error
from stableopt import UpdateRule
from stableopt.stability.rules.preconditioner import DiagonalPreconditioner

__all__ = ["SGD", "Update"]

FLOOR = 0.1
"""Adam's epsilon, relative to the root mean square of all entries of the square root of v. Adam's own
1e-8 would give parameters that no sample reaches a factor of 1e8."""


@dataclass(frozen=True)
class Update:
    r"""A step of SGD, or of one with momentum or with Adam's preconditioner at the minimum.

    Attributes:
        momentum: beta.
        nesterov: whether it is Nesterov's.
        adaptive: multiply gradients by a fixed :math:`P = 1/(\sqrt v + \epsilon)`. v is the mean of the
            samples' squared gradients at the minimum, and epsilon :data:`FLOOR` times their root mean
            square.
    """

    momentum: float = 0.0
    nesterov: bool = False
    adaptive: bool = False

    def rule(self, lr: float) -> UpdateRule:
        """Return the rule in the coordinates of P."""
        return UpdateRule(lr=lr, momentum=self.momentum, nesterov=self.nesterov)

    def preconditioner(self, model: nn.Module, images: Images) -> DiagonalPreconditioner | None:
        """Return P at the model's present parameters, or ``None`` for 1."""
        if not self.adaptive:
            return None
        params = list(model.parameters())
        squares = [torch.zeros_like(p) for p in params]
        for x, y in zip(images.x.split(1), images.y.split(1), strict=True):
            own = torch.autograd.grad(mean_squared_error(model(x), y), params)
            for square, gradient in zip(squares, own, strict=True):
                square += gradient**2 / len(images.x)
        every = torch.cat([square.flatten() for square in squares])
        floor = FLOOR * every.mean().sqrt()
        return DiagonalPreconditioner(params, [1 / (square.sqrt() + floor) for square in squares])

    def optimizer(self, model: nn.Module, images: Images, lr: float) -> stableopt.SGD:
        """Return the optimizer; P is applied to each gradient as it is made."""
        preconditioner = self.preconditioner(model, images)
        if preconditioner is not None:
            for p, entry in zip(model.parameters(), preconditioner.entries, strict=True):
                p.register_hook(_times(entry))
        momentum, nesterov = self.momentum, self.nesterov
        return stableopt.SGD(model.parameters(), lr=lr, momentum=momentum, nesterov=nesterov)


SGD = Update()
"""Plain SGD."""


def _times(entry: Tensor | float) -> object:
    return lambda gradient: gradient * entry
