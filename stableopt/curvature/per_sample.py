r"""Sums over samples of products with per-sample Hessians, :math:`\sum_i H_i(H_i v - \bar w)`.

This is what :class:`~stableopt.curvature.operators.NonUniformity` needs of a chunk of samples; the
subtraction of :math:`\bar w = Hv` inside the sum keeps it free of cancellation. There are two ways
for any module, both exact, and both in memory that does not grow with n:

- ``"vmap"``: all samples of a chunk at once; ``chunk * d`` numbers, for small models;
- ``"loop"``: one sample at a time; for large models, and where ``vmap`` cannot follow the module.

A faster way for particular modules is one more function of the type :data:`ChunkProduct`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.batches import cut, map_tensors
from stableopt.curvature.problem import Problem, Theta
from stableopt.curvature.pull import pull

__all__ = ["VMAP_MEMORY", "ChunkProduct", "loop_product", "samples_at_once", "vmap_product"]

ChunkProduct = Callable[[Problem, Theta, Any, int, Tensor, Tensor], Tensor]
"""``(problem, theta, batch, size, vector, mean) -> sum of H_i (H_i vector - mean)``, ``(d,)``."""

_COPIES = 8
"""Tensors of the parameters' size that one sample needs at the peak of a vmapped product."""

VMAP_MEMORY = 128 * 2**20
"""Bytes that a vmapped chunk may take where nobody chose; on CPUs more was slower, for want of cache."""


def samples_at_once(problem: Problem, memory: int) -> int:
    """Return how many samples' parameter-sized intermediates fit into ``memory`` bytes."""
    return memory // (_COPIES * problem.num_params * problem.dtype.itemsize)


def loop_product(
    problem: Problem, theta: Theta, batch: Any, size: int, vector: Tensor, mean: Tensor
) -> Tensor:
    """Sum over the samples one by one, by double backpropagation: the plain definition."""
    total = torch.zeros_like(vector)
    tangent = problem.unflatten(vector)
    for index in range(size):
        loss = problem.loss(theta, cut(batch, index, index + 1))
        gradients = torch.autograd.grad(loss, theta, create_graph=True, allow_unused=True)
        deviation = problem.flatten(pull(gradients, theta, tangent)) - mean
        total += problem.flatten(pull(gradients, theta, problem.unflatten(deviation)))
    return total


def vmap_product(
    problem: Problem, theta: Theta, batch: Any, size: int, vector: Tensor, mean: Tensor
) -> Tensor:
    """Sum over the samples of a chunk in one vectorised pass."""
    tangent = tuple(problem.unflatten(vector))

    def one(index: Tensor) -> Tensor:
        row = index.unsqueeze(0)
        sample = map_tensors(lambda t: t.index_select(0, row) if t.dim() else t, batch)
        gradient = torch.func.grad(lambda at: problem.loss(at, sample))
        pull_back = torch.func.vjp(gradient, theta)[1]
        deviation = problem.flatten(pull_back(tangent)[0]) - mean
        return problem.flatten(pull_back(tuple(problem.unflatten(deviation)))[0])

    rows = torch.arange(size, device=vector.device)
    with warnings.catch_warnings():
        # Advice to file an issue with torch is nothing that the user of a measurement can follow.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return torch.vmap(one, randomness="same")(rows).sum(0).detach()
