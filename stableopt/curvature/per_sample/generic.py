r"""`vmap_product`, `loop_product`: per-sample curvature products for any module.

:class:`~stableopt.curvature.NonUniformity` sums :math:`\sum_i H_i P(H_i v - \bar w)` over a chunk of
samples. Subtracting :math:`\bar w = Hv` inside the sum avoids cancellation. Both functions are exact, in
memory independent of n:

- ``vmap_product``: all samples of a chunk at once, in memory for ``chunk * d`` numbers; for small
  models;
- ``loop_product``: one sample at a time; for large models and modules that ``vmap`` does not support.

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
"""Parameter-sized tensors per sample at the peak of a vmapped product."""

VMAP_MEMORY = 128 * 2**20
"""Default bytes of a vmapped chunk. Larger chunks exceed a CPU's cache and were slower."""


def samples_at_once(problem: Problem, memory: int) -> int:
    """Return how many samples' intermediates fit into ``memory`` bytes; 0 if none do."""
    return memory // (_COPIES * problem.num_params * problem.dtype.itemsize)


def _identity(vector: Tensor) -> Tensor:
    return vector


def loop_product(
    mean_curvature: MeanOverSamples,
    batch: Any,
    size: int,
    vector: Tensor,
    mean: Tensor,
    preconditioner: Apply = _identity,
) -> Tensor:
    """Sum over the samples one by one, by the definition, for any mean of matrices."""
    problem = mean_curvature.problem
    total = torch.zeros_like(vector)
    tangent = problem.unflatten(vector)
    for index in range(size):
        passes = mean_curvature.linearise(cut(batch, index, index + 1), 1)
        deviation = preconditioner(
            problem.flatten(mean_curvature.chunk_product(passes, tangent)) - mean
        )
        total += problem.flatten(mean_curvature.chunk_product(passes, problem.unflatten(deviation)))
    return total


def vmap_product(
    mean_curvature: MeanOverSamples,
    batch: Any,
    size: int,
    vector: Tensor,
    mean: Tensor,
    preconditioner: Apply = _identity,
) -> Tensor:
    """Sum over the samples of a chunk in one vmapped pass, for Hessians."""
    problem = mean_curvature.problem
    tangent = tuple(problem.unflatten(vector))

    def sample_product(sample: Any) -> Tensor:
        gradient = torch.func.grad(lambda point: problem.loss(point, sample))
        pull_back = torch.func.vjp(gradient, mean_curvature.theta)[1]
        deviation = preconditioner(problem.flatten(pull_back(tangent)[0]) - mean)
        return problem.flatten(pull_back(tuple(problem.unflatten(deviation)))[0])

    products: Tensor = vmap_over_samples(sample_product, batch, size)
    return products.sum(0).detach()
