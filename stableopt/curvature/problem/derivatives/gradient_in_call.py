r"""`gradient_in_call`: a loss whose gradient is taken while the model still holds the parameters.

A functional call swaps the parameters of a model during its forward pass alone. The backward pass of a
custom function may run the model again, as an adjoint method does, which solves for the gradient
backwards in time: it would then take the model's own parameters for those of the forward pass. Here both
passes are within the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from stableopt.curvature.problem.derivatives.second_derivative import fresh_leaves

__all__ = ["gradient_in_call"]

Call = Callable[[Sequence[Tensor]], tuple[Tensor, Sequence[Tensor | None]]]
"""``leaves -> (loss, its gradients in the leaves)``."""


def gradient_in_call(call: Call, theta: Sequence[Tensor]) -> Tensor:
    """Return the loss at ``theta``, with the gradient that ``call`` takes of it, and no second one.

    >>> def call(leaves):
    ...     loss = leaves[0].square().sum()
    ...     return loss, torch.autograd.grad(loss, leaves)
    >>> theta = torch.ones(2, requires_grad=True)
    >>> torch.autograd.grad(3 * gradient_in_call(call, [theta]), theta)
    (tensor([6., 6.]),)
    """
    loss: Tensor = _GradientInCall.apply(call, *theta)  # type: ignore[no-untyped-call]
    return loss


class _GradientInCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, *theta: Tensor) -> Tensor:
        with torch.enable_grad():
            loss, ctx.slopes = call(fresh_leaves(theta))
        return loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if slope is None else factor * slope for slope in ctx.slopes)
