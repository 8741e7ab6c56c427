"""`GaussNewton`: products with the generalised Gauss–Newton matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stableopt.curvature.autodiff import DoubleVjp, vjp
from stableopt.curvature.problem.problem import Problem
from stableopt.curvature.products.mean import MeanOverSamples, Take

__all__ = ["GaussNewton", "OutputPasses"]


class OutputPasses(NamedTuple):
    """A chunk's graphs for Gauss–Newton.

    Attributes:
        outputs: the model's outputs z.
        forward: the Jacobian of z in the parameters.
        slope: the gradient of the chunk's mean loss in z.
        slope_at: the copy of z in which ``slope`` is a differentiable function.
    """

    outputs: Tensor
    forward: DoubleVjp
    slope: Tensor
    slope_at: Tensor

    def bent(self, pushed: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Return the loss's second derivative in z times ``pushed``."""
        return vjp((self.slope,), (self.slope_at,), pushed)


class GaussNewton(MeanOverSamples):
    r"""The generalised Gauss–Newton matrix :math:`G = \frac1n\sum_i J_i^\top L_i J_i`.

    :math:`J_i` is the Jacobian of the model's outputs for sample i, :math:`L_i` the second
    derivative of the loss in the outputs (Schraudolph, *Fast curvature matrix-vector products for
    second-order gradient descent*, 2002). It is positive semi-definite for a convex loss, and equals
    the Hessian where the model is linear or the residuals vanish.

    Args:
        problem: the mean loss.
        memory: bytes that cached passes may take: by default 1 GiB, and at most what a training step
            takes where the problem has a ``chunk_size``.

    Raises:
        ValueError: for a problem from a batch loss, which does not separate outputs and loss.
        SecondDerivativeError: for a model that cannot be differentiated twice; it names the module.
        TypeError: for a model that does not return one tensor.

    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), torch.zeros(2, 1).double()
    >>> GaussNewton(Problem(model, torch.nn.MSELoss(), (x, y))) @ torch.ones(2).double()
    tensor([1., 4.], dtype=torch.float64)
    """

    def __init__(self, problem: Problem, *, memory: int | None = None) -> None:
        super().__init__(problem, memory)
        if problem.loss_fn is None:
            raise ValueError(
                "GaussNewton needs the model's outputs apart from the loss: build the problem as"
                " Problem(model, loss_fn, data)"
            )
        problem.check_twice()

    def linearise(self, batch: Any, size: int) -> OutputPasses:
        """Return the graphs over ``batch``."""
        outputs = self.problem.outputs(self.theta, batch)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the model returned {type(outputs).__name__}: GaussNewton needs one output tensor"
            )
        forward = DoubleVjp([outputs], self.theta)
        slope_at = outputs.detach().requires_grad_()
        loss = self.problem.loss_of_outputs(slope_at, batch)
        (slope,) = torch.autograd.grad(loss, slope_at, create_graph=True)
        return OutputPasses(outputs, forward, slope, slope_at)

    def chunk_product(
        self, passes: OutputPasses, tangent: list[Tensor], take: Take | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return the product of one chunk's mean with ``tangent``, per parameter."""
        bent = passes.bent(passes.forward.jvp(tangent))
        return vjp((passes.outputs,), self.theta, bent, take)
