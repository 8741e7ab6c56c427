r"""`Hessian`: products with the second derivative of the mean loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stableopt.curvature.autodiff import edge_of, gradient_along, vjp
from stableopt.curvature.problem.coordinates import Coordinates
from stableopt.curvature.problem.data.batches import map_tensors
from stableopt.curvature.problem.over_chunks import mean_over_chunks
from stableopt.curvature.problem.problem import Problem
from stableopt.curvature.products.finite_differences import CentralDifferences
from stableopt.curvature.products.mean import MeanOverSamples, Take

__all__ = ["Hessian"]


class _GradientPasses(NamedTuple):
    """A chunk's loss, and its gradients with their graph, or the batch to compute them from again.

    Of a large model there are the gradients' edges instead: their numbers would be a copy of all of it.
    """

    loss: Tensor
    gradients: tuple[Any, ...]
    batch: Any


class Hessian(MeanOverSamples):
    r"""The Hessian :math:`H = \nabla^2 f(\theta)` of the mean loss.

    A product is the gradient of :math:`\langle\nabla f(\theta), v\rangle`, by double
    backpropagation (Pearlmutter, *Fast exact multiplication by the Hessian*, 1994). Where the model
    has no second derivative, it is a central difference of the gradient
    (:mod:`~stableopt.curvature.products.finite_differences`), which takes two gradients, sometimes
    four. In the coordinates of :meth:`Problem.transformed` the matrix is :math:`D(\pm H + \Lambda)D`.

    Args:
        problem: the mean loss.
        memory: bytes that cached passes may take: by default 1 GiB, and at most what a training step
            takes where the problem has a ``chunk_size``.
        gradient: whether :attr:`gradient` is asked for, which the first product can sum up.
        lasting: whether the parameters are copied, so that the matrix stays the same while training
            moves them. ``False`` uses those of a large model as they are.

    Attributes:
        differences: the central differences, their step and their error; ``None`` for double
            backpropagation.

    >>> model = torch.nn.Linear(2, 1, bias=False).double()
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double(), torch.zeros(2, 1).double()
    >>> problem = Problem(model, torch.nn.MSELoss(), (x, y))   # f = (w_1^2 + 4 w_2^2) / 2
    >>> Hessian(problem) @ torch.eye(2).double()
    tensor([[1., 0.],
            [0., 4.]], dtype=torch.float64)
    """

    def __init__(
        self,
        problem: Problem,
        *,
        memory: int | None = None,
        gradient: bool = False,
        lasting: bool = True,
    ) -> None:
        super().__init__(problem, memory, lasting=lasting)
        self.differences = CentralDifferences(kinks=problem.kinked) if problem.obstacle else None
        self._size: float | None = None  # the norm of the parameters
        self._gradient = gradient and self.differences is None
        self.collects = self._gradient and not problem.large

    @property
    def gradient(self) -> Tensor | None:
        """The mean gradient ``(d,)`` in the problem's coordinates, if it was asked for.

        A product has collected it, or, of a large model, it is computed when it is asked for.
        """
        if self._gradient and self.collected is None and self.problem.large:
            self.collected = self.problem.loss_and_gradient(self.theta)[1]
        return self.collected

    def collect(self, passes: _GradientPasses) -> Sequence[Tensor | None]:
        """Return the gradients of a chunk."""
        return [None if gradient is None else gradient.detach() for gradient in passes.gradients]

    def linearise(self, batch: Any, size: int) -> _GradientPasses:
        """Return the loss of ``batch`` and its gradients, with their graph."""
        loss = self.problem.loss(self.theta, batch)
        if self.differences is not None:
            return _GradientPasses(loss.detach(), (), batch)
        gradients = torch.autograd.grad(loss, self.theta, create_graph=True, allow_unused=True)
        if self.problem.large:
            return _GradientPasses(loss.detach(), tuple(map(edge_of, gradients)), None)
        return _GradientPasses(loss.detach(), gradients, None)

    def chunk_product(
        self, passes: _GradientPasses, tangent: list[Tensor], take: Take | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients' derivative along ``tangent``, per parameter."""
        if self.differences is not None:
            return self._differenced(self.differences, passes.batch, tangent)
        return vjp(passes.gradients, self.theta, tangent, take)

    def block_product(
        self, places: Sequence[int], coordinates: Coordinates, vector: Tensor
    ) -> Tensor:
        """Return the product with the principal block of the parameters at ``places``.

        Args:
            places: positions of parameters in the problem.
            coordinates: of these parameters.
            vector: a vector in these coordinates.

        Only the gradients of these parameters are differentiated, and only in these.
        """
        tangent, total = coordinates.unflatten(vector), torch.zeros_like(vector)
        leaves = [self.theta[place] for place in places]

        def add(passes: _GradientPasses, size: int) -> None:
            if self.differences is None:
                own = [passes.gradients[place] for place in places]
                image = vjp(own, leaves, tangent)
            else:
                everywhere = [torch.zeros_like(t) for t in self.theta]
                for place, part in zip(places, tangent, strict=True):
                    everywhere[place] = part
                found = self._differenced(self.differences, passes.batch, everywhere)
                image = tuple(found[place] for place in places)
            coordinates.add_to(total, image, size)

        (mean,) = mean_over_chunks(self.problem, [total], add, self._passes)
        coordinates.add_decay(mean, tangent)
        return mean

    def _differenced(
        self, differences: CentralDifferences, batch: Any, tangent: list[Tensor]
    ) -> tuple[Tensor, ...]:
        norm = float(torch.stack([part.norm() for part in tangent]).norm())
        if norm == 0:
            return tuple(torch.zeros_like(part) for part in tangent)
        problem = self.problem.differenced()
        cast = problem.precision.cast
        theta = [cast(t.detach()) for t in self.theta]
        gradient = gradient_along(
            # Some modules write to their inputs.
            lambda at: problem.loss(tuple(at), map_tensors(lambda t: cast(t.clone()), batch)),
            theta,
            [cast(part) for part in tangent],
        )
        if self._size is None:
            self._size = float(torch.stack([t.norm() for t in theta]).norm())
        slopes = norm * differences.along(lambda distance: gradient(distance / norm), self._size)
        slopes = slopes.to(self.dtype)
        parts = torch.split(slopes, [part.numel() for part in tangent])
        return tuple(part.view(t.shape) for part, t in zip(parts, tangent, strict=True))

    def loss(self) -> float:
        """Return the mean loss at the point, without further passes where they are cached."""
        problem, total = self.problem, self._total_loss
        if problem.ranks.any(total is None):
            return problem.value(self.theta, self._passes.chunk_size)
        assert total is not None
        return problem.ranks.all_reduce_sum(float(total)) / problem.num_samples

    @property
    def known_loss(self) -> Tensor | None:
        """The mean loss on the device, where the passes of all samples are cached on this rank."""
        problem, total = self.problem, self._total_loss
        return None if total is None or problem.ranks.several else total / problem.num_samples

    @property
    def _total_loss(self) -> Tensor | None:
        cached = self._passes.cached
        if sum(size for _, size in cached) < self.problem.own_samples:
            return None
        return torch.stack([size * passes.loss.double() for passes, size in cached]).sum()
