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
    """The autograd graphs of a chunk for Gauss–Newton products.

    Attributes:
        outputs: the model's outputs z.
        jacobian: the Jacobian of z in the parameters.
        loss_gradient: the gradient of the chunk's mean loss in z.
        detached_outputs: the copy of z that ``loss_gradient`` is differentiable in.
    """

    outputs: Tensor
    jacobian: DoubleVjp
    loss_gradient: Tensor
    detached_outputs: Tensor

    def loss_hessian_product(
        self, tangents: tuple[Tensor | None, ...]
    ) -> tuple[Tensor | None, ...]:
        """Return the second derivative of the loss in z times ``tangents``."""
        return vjp((self.loss_gradient,), (self.detached_outputs,), tangents)


class GaussNewton(MeanOverSamples):
    r"""The generalised Gauss–Newton matrix :math:`G = \frac1n\sum_i J_i^\top L_i J_i`.

    :math:`J_i` is the Jacobian of the model's outputs for sample i, :math:`L_i` the second
    derivative of the loss in the outputs (Schraudolph, *Fast curvature matrix-vector products for
    second-order gradient descent*, 2002). It is positive semi-definite for a convex loss, and equals
    the Hessian where the model is linear or the residuals vanish.

    Args:
        problem: the mean loss.
        memory: bytes of the cache of passes: by default 1 GiB, and with the problem's ``chunk_size`` at
            most a quarter of a training step's memory.

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
        """Return the autograd graphs of ``batch``."""
        outputs = self.problem.outputs(self.theta, batch)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the model returned {type(outputs).__name__}: GaussNewton needs one output tensor"
            )
        jacobian = DoubleVjp([outputs], self.theta)
        detached = outputs.detach().requires_grad_()
        loss = self.problem.loss_of_outputs(detached, batch)
        (loss_gradient,) = torch.autograd.grad(loss, detached, create_graph=True)
        return OutputPasses(outputs, jacobian, loss_gradient, detached)

    def chunk_product(
        self, passes: OutputPasses, tangent: list[Tensor], take: Take | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return the product of the chunk's mean with ``tangent``, one tensor per parameter."""
        cotangents = passes.loss_hessian_product(passes.jacobian.jvp(tangent))
        return vjp((passes.outputs,), self.theta, cotangents, take)
