"""`Hessian`: products with the Hessian of the mean loss."""

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
    """A chunk's loss, and its gradients with their autograd graph.

    For a large model, the gradients' edges replace the gradients, which take as much memory as the
    model. For finite differences, the batch replaces them.
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
        memory: bytes of the cache of passes: by default 1 GiB, and with the problem's ``chunk_size`` at
            most a quarter of a training step's memory.
        gradient: whether :attr:`gradient` will be read; the first product then sums it up.
        lasting: whether the parameters are copied, so that the matrix stays the same while training
            moves them. ``False`` shares the parameters of a large model.

    Attributes:
        differences: the central differences, with their step and error; ``None`` for double
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
        self._theta_norm: float | None = None
        self._gradient = gradient and self.differences is None
        self.collects = self._gradient and not problem.large

    @property
    def gradient(self) -> Tensor | None:
        """The mean gradient ``(d,)`` in the problem's coordinates; ``None`` if not requested.

        The first product collects it; for a large model, this property computes it. Central differences
        do not give it.
        """
        if self._gradient and self.collected is None and self.problem.large:
            self.collected = self.problem.loss_and_gradient(self.theta)[1]
        return self.collected

    def collect(self, passes: _GradientPasses) -> Sequence[Tensor | None]:
        """Return the gradients of the chunk's mean loss."""
        return [None if gradient is None else gradient.detach() for gradient in passes.gradients]

    def linearise(self, batch: Any, size: int) -> _GradientPasses:
        """Return the loss of ``batch`` and its gradients, with their autograd graph."""
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
        """Return the derivative of the gradients along ``tangent``, one tensor per parameter."""
        if self.differences is not None:
            return self._difference(self.differences, passes.batch, tangent)
        return vjp(passes.gradients, self.theta, tangent, take)

    def block_product(
        self, places: Sequence[int], coordinates: Coordinates, vector: Tensor
    ) -> Tensor:
        """Return the product with the principal block of the parameters at ``places``.

        Only the gradients of these parameters are differentiated, and only in these parameters.

        Args:
            places: indices of parameters in the problem.
            coordinates: the coordinates of these parameters.
            vector: a vector in these coordinates.
        """
        tangent, total = coordinates.unflatten(vector), torch.zeros_like(vector)
        leaves = [self.theta[place] for place in places]

        def add(passes: _GradientPasses, size: int) -> None:
            if self.differences is None:
                block_gradients = [passes.gradients[place] for place in places]
                image = vjp(block_gradients, leaves, tangent)
            else:
                padded = [torch.zeros_like(t) for t in self.theta]
                for place, part in zip(places, tangent, strict=True):
                    padded[place] = part
                whole_image = self._difference(self.differences, passes.batch, padded)
                image = tuple(whole_image[place] for place in places)
            coordinates.add_to(total, image, size)

        (mean,) = mean_over_chunks(self.problem, [total], add, self._passes)
        coordinates.add_decay(mean, tangent)
        return mean

    def _difference(
        self, differences: CentralDifferences, batch: Any, tangent: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the central difference of the gradient along ``tangent``, one tensor per parameter."""
        norm = float(torch.stack([part.norm() for part in tangent]).norm())
        if norm == 0:
            return tuple(torch.zeros_like(part) for part in tangent)
        problem = self.problem.differenced()
        cast = problem.precision.cast
        theta = [cast(t.detach()) for t in self.theta]
        gradient = gradient_along(
            # The batch is cloned, since some modules write to their inputs.
            lambda point: problem.loss(tuple(point), map_tensors(lambda t: cast(t.clone()), batch)),
            theta,
            [cast(part) for part in tangent],
        )
        if self._theta_norm is None:
            self._theta_norm = float(torch.stack([t.norm() for t in theta]).norm())
        image = norm * differences.along(lambda step: gradient(step / norm), self._theta_norm)
        image = image.to(self.dtype)
        parts = torch.split(image, [part.numel() for part in tangent])
        return tuple(part.view(t.shape) for part, t in zip(parts, tangent, strict=True))

    def loss(self) -> float:
        """Return the mean loss at theta, from the cached passes if they cover all samples."""
        problem, total = self.problem, self._total_loss
        if problem.ranks.any(total is None):
            return problem.value(self.theta, self._passes.chunk_size)
        assert total is not None
        return problem.ranks.all_reduce_sum(float(total)) / problem.num_samples

    @property
    def known_loss(self) -> Tensor | None:
        """The mean loss on the device, if there is one rank and the passes of all samples are cached."""
        problem, total = self.problem, self._total_loss
        return None if total is None or problem.ranks.several else total / problem.num_samples

    @property
    def _total_loss(self) -> Tensor | None:
        cached = self._passes.cached
        if sum(size for _, size in cached) < self.problem.own_samples:
            return None
        return torch.stack([size * passes.loss.double() for passes, size in cached]).sum()
