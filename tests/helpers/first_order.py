"""A model that refuses every second derivative, and quadratic problems with known Hessians."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["FirstOrderOnly", "Unread", "half_squares", "quadratic"]


class _Refusing(torch.autograd.Function):
    """Tanh whose backward fails where autograd records it, as for every second derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise AssertionError("a second derivative was built")
        (y,) = ctx.saved_tensors
        return grad * (1 - y * y)


class FirstOrderOnly(nn.Module):
    """Tanh without a second derivative."""

    def forward(self, x: Tensor) -> Tensor:
        return _Refusing.apply(x)


class Unread(torch.optim.SGD):
    """An optimizer without a reader, whose step calls its parent's: torch then calls hooks twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def half_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over samples of half the squared distance."""
    return 0.5 * (outputs - targets).square().sum(-1).mean()


def quadratic(
    inputs: int = 4, outputs: int = 3, samples: int = 12
) -> tuple[nn.Module, tuple[Tensor, Tensor], Tensor]:
    """Return a linear model, its data, and the Hessian of :func:`half_squares` ``(d, d)``."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, inputs, generator=generator, dtype=torch.float64)
    y = torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    model = nn.Linear(inputs, outputs, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(outputs, inputs, generator=generator))
    hessian = torch.kron(torch.eye(outputs, dtype=torch.float64), x.T @ x / samples)
    return model, (x, y), hessian
