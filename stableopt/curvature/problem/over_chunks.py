"""`mean_over_chunks` and `gather_over_chunks`: one reading of the data of all ranks, chunk by chunk."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from stableopt.curvature.problem.mean_loss import MeanLoss

__all__ = ["gather_over_chunks", "mean_over_chunks"]

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
