"""`MeanOverSamples`: matrices that are a mean over samples, multiplied chunk by chunk on all ranks."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.curvature.operator import Operator
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.curvature.problem.over_chunks import mean_over_chunks
from stableopt.curvature.problem.problem import Problem
from stableopt.curvature.products.linearization_cache import LinearizationCache

__all__ = ["MeanOverSamples", "Take"]

Take = Callable[[int, Tensor], object]
"""Takes the place of a parameter, and a gradient in it."""


class MeanOverSamples(Operator):
    """A mean over samples at one point, plus the problem's weight decay.

    The parameters are copied, so the matrix stays the same while training moves them, unless it is not
    ``lasting`` and they are many.

    Attributes:
        collected: the mean over samples of :meth:`collect`, in the problem's coordinates, from the
            first product on; ``None`` for matrices that collect nothing.

    Raises:
        TypeError: for a model under ``fully_shard``.
    """

    def __init__(self, problem: MeanLoss, memory: int | None, *, lasting: bool = True) -> None:
        if not isinstance(problem, Problem):
            raise TypeError(
                "a model under fully_shard cannot be run at other parameters: expected ShardedHessian,"
                f" which measures by differences of gradients, instead of {type(self).__name__}"
            )
        super().__init__(problem.num_params, problem.dtype, problem.device)
        self.problem = problem
        self.inner_product = InnerProduct(ranks=problem.ranks)
        self.theta = problem.theta(lasting=lasting)
        self.collected: Tensor | None = None
        self._passes = LinearizationCache(
            problem, self.linearise, memory=memory, kind=type(self).__name__
        )

    @abc.abstractmethod
    def linearise(self, batch: Any, size: int) -> Any:
        """Return the differentiable passes over ``batch`` at theta, ready for products."""

    @abc.abstractmethod
    def chunk_product(
        self, passes: Any, tangent: list[Tensor], take: Take | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return the product of one chunk's mean with ``tangent``, per parameter.

        ``take`` is that of :func:`~stableopt.curvature.autodiff.vjp`.
        """

    collects = False
    """Whether the first product also takes the mean of :meth:`collect`."""

    def collect(self, passes: Any) -> Sequence[Tensor | None]:
        """Return what one chunk's passes contain for each parameter beyond products."""
        raise NotImplementedError

    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``, without a graph."""
        return self.products([vector])[0]

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrix times each vector, in one reading of the data.

        Columns are multiplied one by one within a chunk: one vectorised pass over four of them was
        slower on a CPU, by a tenth for fully connected networks and twofold for convolutions.
        """
        problem = self.problem
        coordinates = problem.coordinates
        tangents = [problem.unflatten(vector) for vector in vectors]
        totals = [problem.zeros() for _ in vectors]
        more: list[Tensor] = []
        if self.collects and self.collected is None:
            more = [problem.zeros()]

        def add(passes: Any, size: int) -> None:
            for total, tangent in zip(totals, tangents, strict=True):
                # Another vector as long as all parameters may not be to spare.
                take = coordinates.adding_to(total, size) if problem.large else None
                coordinates.add_to(total, self.chunk_product(passes, tangent, take), size)
            for total in more:
                coordinates.add_to(total, self.collect(passes), size)

        means = mean_over_chunks(problem, [*totals, *more], add, self._passes)
        if more:
            self.collected = means.pop()
        for mean, tangent in zip(means, tangents, strict=True):
            coordinates.add_decay(mean, tangent)
        return means
