"""`GaussNewton`: products with the generalised Gauss–Newton matrix."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stableopt.curvature.autodiff import pull
from stableopt.curvature.problem.problem import Problem, Theta
from stableopt.curvature.products.mean import MeanOverSamples

__all__ = ["GaussNewton"]


class _OutputPasses(NamedTuple):
    """A chunk's passes for Gauss–Newton: outputs z, J^T u for a dummy u, and the loss's slope."""

    outputs: Tensor
    dummy: Tensor
    pulled: tuple[Tensor | None, ...]
    slope: Tensor
    slope_at: Tensor


class GaussNewton(MeanOverSamples):
    r"""The generalised Gauss–Newton matrix :math:`G = \frac1n\sum_i J_i^\top L_i J_i`.

    :math:`J_i` is the Jacobian of the model's outputs for sample i, :math:`L_i` the second
    derivative of the loss in the outputs (Schraudolph, *Fast curvature matrix-vector products for
    second-order gradient descent*, 2002). It is positive semi-definite for a convex loss, and equals
    the Hessian where the model is linear or the residuals vanish.

    Args:
        problem: whose matrix it is.
        memory: bytes that passes kept from product to product may take: by default 1 GiB, and no more
            than a training step where the problem has a ``chunk_size``.

    Raises:
        ValueError: for a problem from a batch loss, in which outputs and loss cannot be told apart.
        SecondDerivativeError: for a model that cannot be differentiated twice; it names the module.
        TypeError: for a model that does not return one tensor.

    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), torch.zeros(2, 1).double()
    >>> GaussNewton(Problem(model, torch.nn.MSELoss(), (x, y))) @ torch.ones(2).double()
    tensor([1., 4.], dtype=torch.float64)
    """

    def __init__(self, problem: Problem, *, memory: int | None = None) -> None:
        if problem.loss_fn is None:
            raise ValueError(
                "GaussNewton needs the model's outputs apart from the loss: build the problem as"
                " Problem(model, loss_fn, data)"
            )
        problem.check_twice()
        super().__init__(problem, memory)
        self._loss_fn = problem.loss_fn

    def linearise(self, batch: Any, size: int, at: Theta | None = None) -> _OutputPasses:
        """Return the passes over ``batch``; the model is called with ``at``, functions of theta."""
        outputs = self.problem.outputs(self.theta if at is None else at, batch)
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the model returned {type(outputs).__name__}: GaussNewton needs one output tensor"
            )
        # J^T u is linear in u: its gradient along a tangent v is J v, by reverse mode alone.
        dummy = torch.zeros_like(outputs, requires_grad=True)
        pulled = torch.autograd.grad(
            outputs, self.theta, dummy, create_graph=True, allow_unused=True
        )
        slope_at = outputs.detach().requires_grad_()
        loss = self.problem.sign * self._loss_fn(slope_at, batch[1])
        (slope,) = torch.autograd.grad(loss, slope_at, create_graph=True)
        return _OutputPasses(outputs, dummy, pulled, slope, slope_at)

    def chunk_product(
        self, passes: _OutputPasses, tangent: list[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Return the product of one chunk's mean with ``tangent``, per parameter."""
        pushed = pull(passes.pulled, (passes.dummy,), tangent)
        bent = pull((passes.slope,), (passes.slope_at,), pushed)
        return pull((passes.outputs,), self.theta, bent)
