r"""`vmap_product`, `loop_product`: per-sample curvature products for any module.

:class:`~stableopt.curvature.NonUniformity` sums :math:`\sum_i H_i P(H_i v - \bar w)` over a chunk of
samples; subtracting :math:`\bar w = Hv` inside the sum avoids cancellation. Both functions are exact, in
memory that does not grow with n:

- ``vmap_product``: all samples of a chunk at once; ``chunk * d`` numbers, for small models;
- ``loop_product``: one sample at a time, for large models and for modules that ``vmap`` fails on.

:mod:`~stableopt.curvature.per_sample.structured` is faster for models of known layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.problem.data.batches import cut
from stableopt.curvature.problem.over_chunks import vmap_over_samples
from stableopt.curvature.problem.problem import Problem
from stableopt.curvature.products.mean import MeanOverSamples

__all__ = ["VMAP_MEMORY", "ChunkProduct", "loop_product", "samples_at_once", "vmap_product"]

Apply = Callable[[Tensor], Tensor]
"""A linear map of ``(d,)`` to ``(d,)``."""

ChunkProduct = Callable[[MeanOverSamples, Any, int, Tensor, Tensor, Apply], Tensor]
"""``(H, batch, size, vector, mean, P) -> sum of H_i P(H_i vector - mean)``, ``(d,)``."""

_COPIES = 8
"""Tensors of the parameters' size that one sample needs at the peak of a vmapped product."""

VMAP_MEMORY = 128 * 2**20
"""Default bytes of a vmapped chunk; on CPUs more was slower, as it exceeded the cache."""


def samples_at_once(problem: Problem, memory: int) -> int:
    """Return how many samples' parameter-sized intermediates fit into ``memory`` bytes."""
    return memory // (_COPIES * problem.num_params * problem.dtype.itemsize)


def _identity(vector: Tensor) -> Tensor:
    return vector


def loop_product(
    of: MeanOverSamples,
    batch: Any,
    size: int,
    vector: Tensor,
    mean: Tensor,
    preconditioner: Apply = _identity,
) -> Tensor:
    """Sum over the samples one by one: the plain definition, for any mean of curvatures."""
    problem = of.problem
    total = torch.zeros_like(vector)
    tangent = problem.unflatten(vector)
    for index in range(size):
        passes = of.linearise(cut(batch, index, index + 1), 1)
        deviation = preconditioner(problem.flatten(of.chunk_product(passes, tangent)) - mean)
        total += problem.flatten(of.chunk_product(passes, problem.unflatten(deviation)))
    return total


def vmap_product(
    of: MeanOverSamples,
    batch: Any,
    size: int,
    vector: Tensor,
    mean: Tensor,
    preconditioner: Apply = _identity,
) -> Tensor:
    """Sum over the samples of a chunk in one vectorised pass, for Hessians."""
    problem = of.problem
    tangent = tuple(problem.unflatten(vector))

    def one(sample: Any) -> Tensor:
        gradient = torch.func.grad(lambda at: problem.loss(at, sample))
        pull_back = torch.func.vjp(gradient, of.theta)[1]
        deviation = preconditioner(problem.flatten(pull_back(tangent)[0]) - mean)
        return problem.flatten(pull_back(tuple(problem.unflatten(deviation)))[0])

    products: Tensor = vmap_over_samples(one, batch, size)
    return products.sum(0).detach()
