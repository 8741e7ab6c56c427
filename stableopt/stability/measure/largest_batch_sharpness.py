"""`largest_batch_sharpness`: bounds of the largest sharpness of any batch, a certificate for SGD."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt._support.arguments import whole
from stableopt.curvature import Hessian, Operator, Problem, top_eigenpair
from stableopt.curvature.eigen.inner_product import InnerProduct
from stableopt.stability.measure.batch_sharpness import batch_mean, random_batches

__all__ = ["LargestBatchSharpness", "largest_batch_sharpness"]


@dataclass(frozen=True)
class LargestBatchSharpness:
    r"""Bounds of :math:`\max_B\lambda_{\max}(H_B)` over all batches of one size.

    Attributes:
        lower: the largest sharpness among the batches drawn.
        upper: the mean of the B largest upper bounds of :math:`\lambda_{\max}(H_i)` of single samples.
        products: the number of products with Hessians of samples and batches.
    """

    lower: float
    upper: float
    products: int

    def certifies(self, lr: float) -> bool:
        """Whether the upper bound is at most 2/lr: no batch then enlarges a positive curvature."""
        return lr == 0 or self.upper <= 2 / lr


def largest_batch_sharpness(
    problem: Problem,
    batch_size: int,
    *,
    num_batches: int = 8,
    tol: float = 1e-3,
    max_iter: int = 100,
    seed: int = 0,
) -> LargestBatchSharpness:
    r"""Return bounds of the largest sharpness of any batch of ``batch_size`` samples.

    Plain SGD at a minimum that all samples share is stable, in any order of its batches, if
    :math:`\max_B\lambda_{\max}(H_B) \le 2/\eta`, also for the nonlinear loss close to the minimum
    (Mulayoff & Stich, arXiv:2602.14789). The condition is sufficient, but far from necessary for small
    batches. Since :math:`\lambda_{\max}` is convex, the mean of the B largest
    :math:`\lambda_{\max}(H_i)` is an upper bound.

    Args:
        problem: the problem.
        batch_size: samples in a batch, at most those of the problem.
        num_batches: the number of batches to draw for the lower bound.
        tol: relative residual of each eigen-search.
        max_iter: the largest number of products of each eigen-search.
        seed: seed of batches and searches.

    The cost is one eigen-search for each sample: affordable for thousands of samples of a small
    network. Each search's upper bound is wrong with a probability of at most 0.2 %.

    Raises:
        ValueError: for arguments out of range, or a problem with batch statistics.

    >>> model = torch.nn.Linear(1, 1, bias=False).double()     # H_i = 2 x_i^2
    >>> x = torch.tensor([[1.0], [2.0], [3.0]]).double()
    >>> problem = Problem(model, torch.nn.MSELoss(), (x, torch.zeros(3, 1).double()))
    >>> found = largest_batch_sharpness(problem, 2)
    >>> round(found.lower, 6), round(found.upper, 6), found.certifies(0.15)    # (8 + 18) / 2
    (13.0, 13.0, True)
    """
    hessian, n = Hessian(problem), problem.num_samples
    batch_size, num_batches = whole("batch_size", batch_size), whole("num_batches", num_batches)

    products = 0

    def search(parts: list[tuple[Any, int]]) -> tuple[float, float]:
        """Return the sharpness of a batch and its upper bound."""
        nonlocal products
        operator = _BatchHessian(hessian, parts)
        pair = top_eigenpair(operator, tol=tol, max_iter=max_iter, seed=seed)
        products += pair.products
        return pair.value, math.inf if pair.upper_bound is None else pair.upper_bound

    with problem.evaluation():
        drawn = [search(parts) for parts in random_batches(problem, batch_size, num_batches, seed)]
        lower = max(value for value, _ in drawn)
        if batch_size == n:  # the only batch: its own bound is lower than the samples' mean
            return LargestBatchSharpness(lower, drawn[0][1], products)
        bounds = [search(parts)[1] for parts in random_batches(problem, 1, n, seed)]
    largest = sorted(bounds, reverse=True)[:batch_size]
    return LargestBatchSharpness(lower, sum(largest) / batch_size, products)


class _BatchHessian(Operator):
    """The Hessian of a batch, whose samples on this rank are ``parts``."""

    def __init__(self, hessian: Hessian, parts: list[tuple[Any, int]]) -> None:
        super().__init__(hessian.shape[0], hessian.dtype, hessian.device)
        self.inner_product = InnerProduct(ranks=hessian.problem.ranks)
        self._hessian = hessian
        self._passes = [(hessian.linearise(batch, size), size) for batch, size in parts]

    def product(self, vector: Tensor) -> Tensor:
        """Return the product of the batch's mean Hessian."""
        problem = self._hessian.problem
        tangent = problem.unflatten(vector)
        with torch.inference_mode(False):
            return batch_mean(
                problem,
                lambda passes, size: self._hessian.chunk_product(passes, tangent),
                self._passes,
            )
