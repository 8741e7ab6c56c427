"""`MeanOverSamples`: base class of matrices that are a mean over samples, multiplied by chunks."""

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
"""Called with the index of a parameter and its gradient."""


class MeanOverSamples(Operator):
    """A mean over samples at one point, plus the problem's weight decay.

    The parameters are copied, so that the matrix stays the same while training moves them. Those of a
    large model are shared if ``lasting`` is false.

    Attributes:
        collected: the mean over samples of :meth:`collect`, in the problem's coordinates; ``None``
            before the first product, and for matrices that collect nothing.

    Raises:
        TypeError: for a model under ``fully_shard``.
    """

    def __init__(self, problem: MeanLoss, memory: int | None, *, lasting: bool = True) -> None:
        if not isinstance(problem, Problem):
            raise TypeError(
                "a model under fully_shard cannot be run at other parameters: expected ShardedHessian,"
                f" which takes differences of gradients, instead of {type(self).__name__}"
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
        """Return the differentiable passes over ``batch`` at theta."""

    @abc.abstractmethod
    def chunk_product(
        self, passes: Any, tangent: list[Tensor], take: Take | None = None
    ) -> tuple[Tensor | None, ...]:
        """Return the product of the chunk's mean with ``tangent``, one tensor per parameter.

        ``take`` is that of :func:`~stableopt.curvature.autodiff.vjp`.
        """

    collects = False
    """Whether the first product also computes the mean of :meth:`collect`."""

    def collect(self, passes: Any) -> Sequence[Tensor | None]:
        """Return a by-product of one chunk's passes, such as gradients, one tensor per parameter.

        By default there is none.
        """
        return ()

    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``, without a graph."""
        return self.products([vector])[0]

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrix times each vector, in one reading of the data.

        Vectors are multiplied one by one within a chunk. One vmapped pass over four of them was slower
        on a CPU, by a tenth for fully connected networks and twofold for convolutions.
        """
        problem = self.problem
        coordinates = problem.coordinates
        tangents = [problem.unflatten(vector) for vector in vectors]
        totals = [problem.zeros() for _ in vectors]
        collected: list[Tensor] = []
        if self.collects and self.collected is None:
            collected = [problem.zeros()]

        def add(passes: Any, size: int) -> None:
            for total, tangent in zip(totals, tangents, strict=True):
                # Adding each gradient at once saves a vector as long as all parameters.
                take = coordinates.adding_to(total, size) if problem.large else None
                coordinates.add_to(total, self.chunk_product(passes, tangent, take), size)
            for total in collected:
                coordinates.add_to(total, self.collect(passes), size)

        means = mean_over_chunks(problem, [*totals, *collected], add, self._passes)
        if collected:
            self.collected = means.pop()
        for mean, tangent in zip(means, tangents, strict=True):
            coordinates.add_decay(mean, tangent)
        return means
