"""`MeanOverSamples`: the loop over chunks and ranks that products with a mean over samples share."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.curvature.operator import Operator
from stableopt.curvature.problem.problem import Problem
from stableopt.curvature.products.linearization_cache import KeptPasses

__all__ = ["MeanOverSamples"]


class MeanOverSamples(Operator):
    """A mean over samples, plus the problem's weight decay: the point, and the sum over chunks."""

    def __init__(self, problem: Problem, memory: int | None) -> None:
        super().__init__(problem.num_params, problem.dtype, problem.device)
        self.problem = problem
        self.inner_product = InnerProduct(ranks=problem.ranks)
        self.theta = problem.theta()
        self._passes = KeptPasses(problem, self.linearise, memory=memory, kind=type(self).__name__)

    @abc.abstractmethod
    def linearise(self, batch: Any, size: int) -> Any:
        """Return the differentiable passes over ``batch`` at theta, ready for products."""

    @abc.abstractmethod
    def chunk_product(self, passes: Any, tangent: list[Tensor]) -> tuple[Tensor | None, ...]:
        """Return the product of one chunk's mean with ``tangent``, per parameter."""

    def product(self, vector: Tensor) -> Tensor:
        """Return the matrix times ``vector`` ``(d,)``, without a graph."""
        return self.products([vector])[0]

    def products(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """Return the matrix times each vector, in one reading of the data.

        Column by column within a chunk: taken as one vectorised pass, four of them were slower on a
        CPU, by a tenth for fully connected networks and twofold for convolutions.
        """
        problem = self.problem
        tangents = [problem.unflatten(vector) for vector in vectors]
        totals = [torch.zeros_like(vector) for vector in vectors]

        def add() -> int:
            count = 0
            with problem.evaluation():
                for passes, size in self._passes:
                    for total, tangent in zip(totals, tangents, strict=True):
                        total.add_(problem.flatten(self.chunk_product(passes, tangent)), alpha=size)
                    count += size
            return count

        means = problem.ranks.all_reduce_mean(totals, add)
        if any(problem.weight_decay):
            for mean, tangent in zip(means, tangents, strict=True):
                decays = zip(problem.weight_decay, tangent, strict=True)
                mean += problem.flatten([decay * part for decay, part in decays])
        return means
