r"""`gradient_in_call`: a loss with a gradient that is computed inside the functional call.

A functional call swaps the parameters of a model during the forward pass only. The backward pass of a
custom function may run the model again, as in adjoint methods, which integrate backwards in time. It
would then use the model's own parameters instead of the swapped ones. Here both passes run inside the
call.
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
    """Return the loss at ``theta``, differentiable once, with the gradient that ``call`` returns.

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
            loss, ctx.gradients = call(fresh_leaves(theta))
        return loss.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(None if g is None else factor * g for g in ctx.gradients)
