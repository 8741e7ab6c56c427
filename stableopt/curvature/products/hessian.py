r"""Curvature matrices that are never formed: ``operator @ v`` for ``(d,)`` and ``(d, k)``.

An operator is the matrix at one point: the parameters that count are copied when it is built, so it
stays what it was while training moves them. Two examples::

    Hessian(problem) @ v          # H v
    GaussNewton(problem) @ v      # (1/n) sum J_i^T (second derivative of the loss) J_i v
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from stableopt.curvature.autodiff import pull
from stableopt.curvature.problem.data import map_tensors
from stableopt.curvature.problem.problem import Problem
from stableopt.curvature.products.finite_differences import CentralDifferences
from stableopt.curvature.products.mean import MeanOverSamples

__all__ = ["Hessian"]


class _GradientPasses(NamedTuple):
    """A chunk's loss, and its gradients with their graph, or the batch to take them of anew."""

    loss: Tensor
    gradients: tuple[Tensor | None, ...]
    batch: Any


class Hessian(MeanOverSamples):
    r"""The Hessian :math:`H = \nabla^2 f(\theta)` of the mean loss.

    A product is the gradient of :math:`\langle\nabla f(\theta), v\rangle`, by double
    backpropagation (Pearlmutter, *Fast exact multiplication by the Hessian*, 1994), or where the
    model has no second derivative by central differences of the gradient
    (:mod:`~stableopt.curvature.products.finite_differences`), which take two gradients, four at times. In the
    coordinates of :meth:`Problem.transformed` the matrix is :math:`D(\pm H + \Lambda)D`.

    Args:
        problem: whose Hessian it is.
        memory: bytes that passes kept from product to product may take: by default 1 GiB, and no more
            than a training step where the problem has a ``chunk_size``.

    Attributes:
        differences: how central differences are taken, and how far they can be trusted; ``None``
            for double backpropagation.

    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), torch.zeros(2, 1).double()
    >>> problem = Problem(model, torch.nn.MSELoss(), (x, y))   # f = (w_1^2 + 4 w_2^2) / 2
    >>> Hessian(problem) @ torch.eye(2).double()
    tensor([[1., 0.],
            [0., 4.]], dtype=torch.float64)
    """

    def __init__(self, problem: Problem, *, memory: int | None = None) -> None:
        super().__init__(problem, memory)
        self.differences = CentralDifferences() if problem.obstacle else None

    def linearise(self, batch: Any, size: int) -> _GradientPasses:
        """Return the loss of ``batch`` and its gradients, with their graph."""
        loss = self.problem.loss(self.theta, batch)
        if self.differences is not None:
            return _GradientPasses(loss.detach(), (), batch)
        gradients = torch.autograd.grad(loss, self.theta, create_graph=True, allow_unused=True)
        return _GradientPasses(loss.detach(), gradients, None)

    def chunk_product(
        self, passes: _GradientPasses, tangent: list[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients' derivative along ``tangent``, per parameter."""
        if self.differences is not None:
            return self._differenced(self.differences, passes.batch, tangent)
        return pull(passes.gradients, self.theta, tangent)

    def _differenced(
        self, differences: CentralDifferences, batch: Any, tangent: list[Tensor]
    ) -> tuple[Tensor, ...]:
        shapes = [part.shape for part in tangent]
        norm = float(torch.stack([part.norm() for part in tangent]).norm())
        if norm == 0:
            return tuple(torch.zeros_like(part) for part in tangent)

        def gradient(distance: float) -> Tensor:
            at = tuple(
                (t.detach() + distance / norm * part).requires_grad_()
                for t, part in zip(self.theta, tangent, strict=True)
            )
            # Some modules write to their inputs.
            copied = map_tensors(Tensor.clone, batch)
            loss = self.problem.loss(at, copied)
            found = torch.autograd.grad(loss, at, allow_unused=True, materialize_grads=True)
            dense = [g.to_dense() if g.is_sparse else g for g in found]
            return torch.cat([g.reshape(-1) for g in dense])

        size = float(torch.stack([t.detach().norm() for t in self.theta]).norm())
        slopes = torch.split(norm * differences.along(gradient, size), [s.numel() for s in shapes])
        return tuple(part.view(shape) for part, shape in zip(slopes, shapes, strict=True))

    def loss(self) -> float:
        """Return the problem's mean loss at the point: for nothing where the passes are kept."""
        problem, kept = self.problem, self._passes.kept
        missing = sum(size for _, size in kept) < problem.own_samples
        if problem.ranks.any(missing):
            return problem.value(self.theta, self._passes.chunk_size)
        losses = torch.stack([size * passes.loss.double() for passes, size in kept])
        return problem.ranks.all_reduce_sum(float(losses.sum())) / problem.num_samples
