"""`Update`: the update rule of a run from a minimum, with a preconditioner fixed there."""

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
"""Adam's epsilon, relative to the root mean square of the entries of √v. Adam's own 1e-8 would scale
parameters without gradient by 1e8."""


@dataclass(frozen=True)
class Update:
    r"""SGD, optionally with momentum or with Adam's preconditioner at the minimum.

    Attributes:
        momentum: coefficient beta.
        nesterov: whether the momentum is Nesterov's.
        adaptive: multiply gradients by a fixed :math:`P = 1/(\sqrt v + \epsilon)`. v is the mean of the
            samples' squared gradients at the minimum, and epsilon is :data:`FLOOR` times the root mean
            square of :math:`\sqrt v`.
    """

    momentum: float = 0.0
    nesterov: bool = False
    adaptive: bool = False

    def rule(self, lr: float) -> UpdateRule:
        """Return the update rule in the coordinates of P."""
        return UpdateRule(lr=lr, momentum=self.momentum, nesterov=self.nesterov)

    def preconditioner(self, model: nn.Module, images: Images) -> DiagonalPreconditioner | None:
        """Return P at the model's current parameters, or ``None`` for P = 1."""
        if not self.adaptive:
            return None
        params = list(model.parameters())
        squares = [torch.zeros_like(p) for p in params]
        for x, y in zip(images.x.split(1), images.y.split(1), strict=True):
            gradients = torch.autograd.grad(mean_squared_error(model(x), y), params)
            for square, gradient in zip(squares, gradients, strict=True):
                square += gradient**2 / len(images.x)
        all_squares = torch.cat([square.flatten() for square in squares])
        floor = FLOOR * all_squares.mean().sqrt()
        return DiagonalPreconditioner(params, [1 / (square.sqrt() + floor) for square in squares])

    def optimizer(self, model: nn.Module, images: Images, lr: float) -> stableopt.SGD:
        """Return the optimizer; hooks on the parameters multiply each gradient by P."""
        preconditioner = self.preconditioner(model, images)
        if preconditioner is not None:
            for p, entry in zip(model.parameters(), preconditioner.entries, strict=True):
                p.register_hook(_multiplier(entry))
        momentum, nesterov = self.momentum, self.nesterov
        return stableopt.SGD(model.parameters(), lr=lr, momentum=momentum, nesterov=nesterov)


SGD = Update()
"""Plain SGD."""


def _multiplier(entry: Tensor | float) -> object:
    return lambda gradient: gradient * entry
