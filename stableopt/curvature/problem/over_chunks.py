"""One reading of the data: `mean_over_chunks`, `gather_over_chunks` and `vmap_over_samples`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from stableopt.curvature.problem.data.batches import map_tensors, tensors_in
from stableopt.curvature.problem.mean_loss import MeanLoss

__all__ = ["gather_over_chunks", "mean_over_chunks", "vmap_over_samples"]

C = TypeVar("C")


def mean_over_chunks(
    problem: MeanLoss,
    totals: list[Tensor],
    add: Callable[[C, int], object],
    chunks: Iterable[tuple[C, int]],
    *,
    evaluating: bool = False,
) -> list[Tensor]:
    """Return means over the samples of all ranks, each sample with the same weight.

    Args:
        problem: gives the ranks, and the evaluation within which chunks are read.
        totals: tensors of zeros.
        add: ``add(chunk, size)`` adds the *sum* over a chunk's samples to ``totals``, in place.
        chunks: this rank's chunks, such as :meth:`Problem.chunks`.
        evaluating: whether the caller is inside :meth:`Problem.evaluation` already.

    >>> from stableopt.curvature import Problem
    >>> x, y = torch.tensor([[1.0], [2.0], [6.0]]), torch.zeros(3, 1)
    >>> problem = Problem(torch.nn.Linear(1, 1), torch.nn.MSELoss(), (x, y), chunk_size=2)
    >>> total = torch.zeros(1)
    >>> mean_over_chunks(problem, [total], lambda b, _: total.add_(b[0].sum()), problem.chunks())
    [tensor([3.])]
    """

    def add_all() -> int:
        count = 0
        with nullcontext() if evaluating else problem.evaluation():
            for chunk, size in chunks:
                add(chunk, size)
                count += size
        return count

    return problem.ranks.all_reduce_mean(totals, add_all)


def gather_over_chunks(
    problem: MeanLoss, rows: Callable[[Any, int], Tensor], chunk_size: int | None = None
) -> Tensor:
    """Return ``rows(batch, size)`` of the chunks of all ranks, concatenated in the samples' order."""

    def own() -> Tensor:
        with problem.evaluation():
            return torch.cat([rows(batch, size) for batch, size in problem.chunks(chunk_size)])

    return problem.ranks.all_gather(problem.ranks.raise_together(own))


def vmap_over_samples(function: Callable[..., Any], batch: Any, size: int, *rows: Tensor) -> Any:
    """Return ``function(sample, *row)`` of all samples at once; a sample is a batch of one.

    >>> vmap_over_samples(lambda sample, row: sample[0] * row, torch.ones(2, 3), 2, torch.arange(2))
    tensor([[0., 0., 0.],
            [1., 1., 1.]])
    """

    def one(index: Tensor, *row: Tensor) -> Any:
        where = index.unsqueeze(0)
        sample = map_tensors(lambda t: t.index_select(0, where) if t.dim() else t, batch)
        return function(sample, *row)

    indices = torch.arange(size, device=next(tensors_in(batch)).device)
    with warnings.catch_warnings():
        # torch advises to file an issue, which users of a measurement cannot act on.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return torch.vmap(one, randomness="same")(indices, *rows)
