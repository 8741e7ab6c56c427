"""`batch_sharpness`: the sharpness of mini-batches along their own gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt._support.arguments import whole
from stableopt.curvature import Hessian, NonFiniteError, Problem
from stableopt.curvature.problem.data.batches import map_tensors
from stableopt.curvature.problem.over_chunks import mean_over_chunks

__all__ = ["BatchSharpness", "batch_sharpness"]

NUM_BATCHES = 64
"""Default number of batches to average."""


@dataclass(frozen=True)
class BatchSharpness:
    """The batch sharpness, an average over batches.

    Attributes:
        value: the batch sharpness; ``None`` if all gradients are zero.
        standard_error: standard error of ``value``, from the spread of the batches; 0 for one batch.
        batches: number of batches averaged.
    """

    value: float | None
    standard_error: float
    batches: int


def batch_sharpness(
    problem: Problem, batch_size: int, *, num_batches: int = NUM_BATCHES, seed: int = 0
) -> BatchSharpness:
    r"""Return :math:`E[g_B^\top H_B g_B]/E\|g_B\|^2`, over batches B drawn without replacement.

    A step of plain SGD along :math:`-g_B` lowers the quadratic model of its own batch while this is
    below :math:`2/\eta`, where runs at the edge of stability settle (Andreyev & Beneventano, *Edge of
    stochastic stability*, 2024). Near a minimum with H_i of rank one it relates to mean-square
    stability; for the full batch it is the sharpness along the gradient.

    Args:
        problem: the problem; its weight decay is ignored.
        batch_size: samples in a batch, at most those of the problem.
        num_batches: the largest number of batches to average. They are cut from random permutations
            of the samples. If the permutation makes no difference, with the full batch or with
            ``batch_size`` 1 and enough batches for all samples, one permutation is averaged.
        seed: seed of the permutations, which have their own generator.

    Numerator and denominator are averaged separately, since a mean of ratios is another quantity. Each
    batch costs one Hessian product over its own samples.

    Raises:
        ValueError: for a batch size above the problem's number of samples, arguments out of range, or
            a problem with batch statistics.
        NonFiniteError: if a gradient or a product is not finite.

    >>> model = torch.nn.Linear(1, 1, bias=False).double()     # f_i = x_i^2 w^2, H_i = 2 and 8
    >>> x = torch.tensor([[1.0], [2.0]]).double()
    >>> problem = Problem(model, torch.nn.MSELoss(), (x, torch.zeros(2, 1).double()))
    >>> round(batch_sharpness(problem, 1).value, 6)             # (2^3 + 8^3) / (2^2 + 8^2)
    7.647059
    """
    batch_size, n = whole("batch_size", batch_size), problem.num_samples
    if batch_size > n:
        raise ValueError(
            f"batch_size={batch_size} is above the {n} samples of the problem, from which batches are"
            " drawn"
        )
    problem.check_samples("the batch sharpness")
    hessian, terms = Hessian(problem), []
    generator = torch.Generator().manual_seed(whole("seed", seed, least=0))
    ranks = problem.ranks
    before = sum(ranks.all_gather_object(problem.own_samples)[: ranks.rank])
    with problem.evaluation():
        chunks = ranks.raise_together(lambda: list(problem.chunks()))
        for rows in _orders(n, batch_size, whole("num_batches", num_batches), generator):
            parts = list(_parts(chunks, rows - before))
            terms.append(_along_gradient(hessian, parts))
    bent, squares = torch.tensor(terms, dtype=torch.float64).T
    if not bool(torch.isfinite(bent + squares).all()):
        raise NonFiniteError("the gradient of a batch, or its Hessian product, is not finite")
    count, mean = len(terms), float(squares.mean())
    if mean == 0:
        return BatchSharpness(None, 0.0, count)
    value = float(bent.mean()) / mean
    spread = float((bent - value * squares).std()) if count > 1 else 0.0
    return BatchSharpness(value, spread / mean / math.sqrt(count), count)


def _orders(n: int, batch_size: int, most: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield the rows of each batch, sorted."""
    each = n // batch_size
    whole_orders = each * batch_size == n and (batch_size in (1, n)) and each <= most
    left = each if whole_orders else most
    while left > 0:
        order = torch.randperm(n, generator=generator)
        for number in range(min(each, left)):
            yield order[number * batch_size : (number + 1) * batch_size].sort().values
        left -= each


def _parts(chunks: list[tuple[Any, int]], rows: Tensor) -> Iterator[tuple[Any, int]]:
    """Yield the samples ``rows`` chunk by chunk, as ``(batch, size)``."""
    start = 0
    for batch, size in chunks:
        inside = rows[(rows >= start) & (rows < start + size)] - start
        if len(inside):
            yield _take(batch, inside), len(inside)
        start += size


def _take(batch: Any, rows: Tensor) -> Any:
    return map_tensors(lambda t: t.index_select(0, rows.to(t.device)) if t.dim() else t, batch)


def _along_gradient(hessian: Hessian, parts: list[tuple[Any, int]]) -> tuple[float, float]:
    r"""Return :math:`g^\top Hg` and :math:`\|g\|^2` of a batch; ``parts`` are this rank's samples."""
    problem, theta = hessian.problem, hessian.theta

    def mean_of(term: Callable[[Any, int], tuple[Tensor | None, ...]]) -> Tensor:
        total = torch.zeros(problem.num_params, dtype=problem.dtype, device=problem.device)

        def add(batch: Any, size: int) -> None:
            total.add_(problem.flatten(term(batch, size)), alpha=size)

        return mean_over_chunks(problem, [total], add, parts, evaluating=True)[0]

    def slopes(batch: Any, size: int) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(problem.loss(theta, batch), theta, allow_unused=True)

    gradient = mean_of(slopes)
    tangent = problem.unflatten(gradient)

    def along(batch: Any, size: int) -> tuple[Tensor | None, ...]:
        return hessian.chunk_product(hessian.linearise(batch, size), tangent)

    bent, gradient = mean_of(along).double(), gradient.double()
    return float(gradient @ bent), float(gradient @ gradient)
