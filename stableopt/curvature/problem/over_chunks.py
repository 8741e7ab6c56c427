"""One reading of the data: means, rows, and a draw of samples; functions over samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from stableopt.curvature.problem.data.batches import cut, map_tensors, tensors_in
from stableopt.curvature.problem.derivatives.sketch import sketch
from stableopt.curvature.problem.mean_loss import MeanLoss
from stableopt.curvature.problem.weights.survey import SPREAD_SAMPLES, Survey, joined

__all__ = [
    "Drawn",
    "drawn_samples",
    "gather_over_chunks",
    "mean_over_chunks",
    "over_samples",
    "quiet_vmap",
    "telling_samples",
    "vmap_over_samples",
]

C = TypeVar("C")

_TELLING = 4
"""Samples that a fast product is tried on: two may be alike in one respect, and more cost more."""

_SHORT = 1024
"""Numbers of a contribution up to which it is compared whole."""

_COMPARABLE = 0.1
"""Least ratio of two samples' contributions at which a sum shows both, and their least relative distance
at which it shows that one was taken for the other."""


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
    return quiet_vmap(one, 0, indices, *rows)


def over_samples(
    one: Callable[..., Any], one_alone: Callable[..., Any], batch: Any, size: int, *rows: Tensor
) -> Any:
    """Return ``one`` of every sample, stacked: at once, or ``one_alone`` of each if vmap fails."""
    try:
        return vmap_over_samples(one, batch, size, *rows)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        samples = (cut(batch, index, index + 1) for index in range(size))
        found = [one_alone(*given) for given in zip(samples, *rows, strict=True)]
    if isinstance(found[0], Tensor):
        return torch.stack(found)
    return [torch.stack(parts) for parts in zip(*found, strict=True)]


def quiet_vmap(function: Callable[..., Any], in_dims: Any, *args: Any) -> Any:
    """Return ``torch.vmap(function, in_dims)(*args)``, with the same random numbers for all."""
    with warnings.catch_warnings():
        # torch advises to file an issue, which users of a measurement cannot act on.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        return torch.vmap(function, in_dims=in_dims, randomness="same")(*args)


class Drawn(NamedTuple):
    """Samples drawn over the data of a rank.

    Attributes:
        batch: the samples as a batch.
        size: their number.
        largest: the most samples that a chunk of the data has.
        all: whether these are all the samples that the rank has.
    """

    batch: Any
    size: int
    largest: int
    all: bool


def drawn_samples(problem: MeanLoss) -> Drawn:
    """Return up to 64 samples, drawn over the data in one reading.

    They have one shape; where hardly any two of them have, they are from the largest chunk.
    """
    sizes: list[int] = []

    def chunks() -> Iterator[tuple[Any, int]]:
        for batch, size in problem.chunks():
            sizes.append(size)
            yield batch, size

    survey, largest = Survey.of(chunks(), most=SPREAD_SAMPLES), max(sizes)
    batch, count = survey.batch, survey.size
    if count < min(_TELLING, largest):
        chunk = next(batch for batch, size in problem.chunks() if size == largest)
        step = -(-largest // SPREAD_SAMPLES)
        batch, count = joined([cut(chunk, at, at + 1) for at in range(0, largest, step)])
    return Drawn(batch, count, largest, count == sum(sizes))


def telling_samples(drawn: Drawn, contribution: Callable[[Any], Tensor]) -> tuple[Any, int] | None:
    """Return four of the samples, as a batch, with distinct contributions of comparable size.

    A sum over samples that are alike, or vanish, is the same if one is taken for another. ``None`` if
    the drawn samples have none. If the drawn ones are all there are, those that come nearest will do.

    Args:
        drawn: the samples.
        contribution: what a batch of one sample contributes to a sum, ``(d,)``.

    >>> x = torch.tensor([[0.0], [1.0], [1.0], [2.0], [3.0], [100.0], [4.0], [5.0]])
    >>> telling_samples(Drawn(x, 8, 8, True), lambda sample: sample.flatten())[0].flatten()
    tensor([1., 2., 3., 4.])
    """
    found: list[Tensor] = []
    count, chosen = min(_TELLING, drawn.largest), list[int]()
    for index in range(drawn.size):
        vector = contribution(cut(drawn.batch, index, index + 1))
        found.append(sketch([vector], vector.device) if len(vector) > _SHORT else vector)
        chosen = _distinct(found)[:count]
        if len(chosen) == count:
            break
    else:
        if not drawn.all:
            return None
        others = [index for index in range(drawn.size) if index not in chosen]
        chosen = [*chosen, *others][:count]
    return joined([cut(drawn.batch, at, at + 1) for at in chosen])


def _distinct(vectors: Sequence[Tensor]) -> list[int]:
    """Return the indices of the most vectors of comparable size, no two of them alike."""
    rows = torch.stack(list(vectors))
    gaps = rows[:, None] - rows
    # All in one host transfer.
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
