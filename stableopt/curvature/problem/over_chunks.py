"""Means and rows over the chunks of a problem, functions of single samples, and a draw of samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from stableopt.curvature.problem.data.batches import cut, map_tensors, tensors_in
from stableopt.curvature.problem.derivatives.sketch import sketch
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.curvature.problem.weights.survey import SPREAD_SAMPLES, Survey, joined

__all__ = [
    "distinct_samples",
    "drawn_samples",
    "gather_over_chunks",
    "mean_over_chunks",
    "over_samples",
    "quiet_vmap",
    "vmap_over_samples",
]

C = TypeVar("C")

_TRIED_SAMPLES = 4
"""Samples on which a fast product is tried: two may be alike in some respect, and more cost more."""

_SKETCHED_ABOVE = 1024
"""Length above which the sketches of contributions are compared."""

_COMPARABLE = 0.1
"""Smallest ratio of two samples' contributions at which both are visible in a sum, and their smallest
relative distance at which a sum shows that the samples were confused."""


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
        problem: its ranks share the means, and its evaluation context surrounds the reading.
        totals: tensors of zeros.
        add: ``add(chunk, size)`` adds the *sum* over a chunk's samples to ``totals``, in place.
        chunks: this rank's chunks, such as :meth:`Problem.chunks`.
        evaluating: whether the caller is already inside :meth:`Problem.evaluation`.

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

    def local_rows() -> Tensor:
        with problem.evaluation():
            return torch.cat([rows(batch, size) for batch, size in problem.chunks(chunk_size)])

    return problem.ranks.all_gather(problem.ranks.raise_together(local_rows))


def vmap_over_samples(function: Callable[..., Any], batch: Any, size: int, *rows: Tensor) -> Any:
    """Return ``function(sample, *row)`` of all samples by vmap; a sample is a batch of one.

    >>> vmap_over_samples(lambda sample, row: sample[0] * row, torch.ones(2, 3), 2, torch.arange(2))
    tensor([[0., 0., 0.],
            [1., 1., 1.]])
    """

    def of_sample(index: Tensor, *row: Tensor) -> Any:
        indices = index.unsqueeze(0)
        sample = map_tensors(lambda t: t.index_select(0, indices) if t.dim() else t, batch)
        return function(sample, *row)

    all_indices = torch.arange(size, device=next(tensors_in(batch)).device)
    return quiet_vmap(of_sample, 0, all_indices, *rows)


def over_samples(
    function: Callable[..., Any], fallback: Callable[..., Any], batch: Any, size: int, *rows: Tensor
) -> Any:
    """Return ``function`` of all samples by vmap, or ``fallback`` of each in a loop if vmap fails."""
    try:
        return vmap_over_samples(function, batch, size, *rows)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        samples = (cut(batch, index, index + 1) for index in range(size))
        results = [fallback(*arguments) for arguments in zip(samples, *rows, strict=True)]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def quiet_vmap(function: Callable[..., Any], in_dims: Any, *args: Any) -> Any:
    """Return ``torch.vmap(function, in_dims)(*args)`` with the same random numbers in all slices."""
    with warnings.catch_warnings():
        # torch's advice to file an issue does not help users of a measurement.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return torch.vmap(function, in_dims=in_dims, randomness="same")(*args)


def drawn_samples(problem: MeanLoss) -> Survey:
    """Return up to 64 samples of one shape, drawn from all data of a rank in one reading.

    If fewer than 4 drawn samples share a shape, the samples are from the largest chunk instead.
    """
    survey = Survey.of(problem.chunks())
    largest = survey.largest
    if survey.size >= min(_TRIED_SAMPLES, largest):
        return survey
    chunk = next(batch for batch, size in problem.chunks() if size == largest)
    step = -(-largest // SPREAD_SAMPLES)
    batch, size = joined([cut(chunk, i, i + 1) for i in range(0, largest, step)])
    return replace(survey, batch=batch, size=size)


def distinct_samples(
    drawn: Survey, contribution: Callable[[Any], Tensor]
) -> tuple[Any, int] | None:
    """Return four of the samples, as a batch, with distinct contributions of comparable size.

    A fast product that confuses samples gives the same sum if their contributions are alike or vanish,
    so such samples would not reveal the fault. ``None`` if the drawn samples do not include four, unless
    they are all samples of the rank: others then complete the four.

    Args:
        drawn: the samples.
        contribution: the contribution ``(d,)`` of a batch of one sample to a sum.

    >>> x = torch.tensor([[0.0], [1.0], [1.0], [2.0], [3.0], [100.0], [4.0], [5.0]])
    >>> drawn = Survey(num_samples=8, batch=x, size=8, largest=8, mixed=False)
    >>> distinct_samples(drawn, lambda sample: sample.flatten())[0].flatten()
    tensor([1., 2., 3., 4.])
    """
    contributions: list[Tensor] = []
    chosen: list[int] = []
    count = min(_TRIED_SAMPLES, drawn.largest)
    for index in range(drawn.size):
        vector = contribution(cut(drawn.batch, index, index + 1))
        if len(vector) > _SKETCHED_ABOVE:
            vector = sketch([vector], vector.device)
        contributions.append(vector)
        chosen = _distinct(contributions)[:count]
        if len(chosen) == count:
            break
    else:
        if not drawn.complete:
            return None
        others = [index for index in range(drawn.size) if index not in chosen]
        chosen = [*chosen, *others][:count]
    return joined([cut(drawn.batch, index, index + 1) for index in chosen])


def _distinct(vectors: Sequence[Tensor]) -> list[int]:
    """Return the indices of a largest set of distinct vectors of comparable size, found greedily."""
    rows = torch.stack(list(vectors))
    gaps = rows[:, None] - rows
    # One host transfer for all norms.
    norms, *distances = torch.cat([rows[None], gaps]).norm(dim=-1).tolist()
    best: list[int] = []
    for largest in sorted((norm for norm in norms if 0 < norm < float("inf")), reverse=True):
        chosen: list[int] = []
        for index in range(len(vectors)):
            if _COMPARABLE * largest <= norms[index] <= largest and all(
                distances[index][other] > _COMPARABLE * max(norms[index], norms[other])
                for other in chosen
            ):
                chosen.append(index)
        best = max(best, chosen, key=len)
    return best
