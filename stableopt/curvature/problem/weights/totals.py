"""`WeightTotals`: sums of the samples' weights on one rank, and the weights by those of all ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.problem.data.batches import tensors_in
from stableopt.curvature.problem.weights.survey import Survey
from stableopt.curvature.problem.weights.weights import (
    EqualWeights,
    GivenWeights,
    LossWeights,
    WeightedMean,
    WeightedMeans,
)

__all__ = [
    "WeightTotals",
    "may_differ",
    "totals_seen",
    "weights_of",
    "weights_seen",
]

_ROUNDING = 1e-12
"""Relative difference of two averages of the same weights, in double precision."""


def weights_seen(evaluate: Callable[[], Any]) -> list[WeightedMean]:
    """Return the weighted means that torch's losses take while ``evaluate`` runs."""
    means = WeightedMeans(lambda number, mean: mean.value())
    with means:
        evaluate()
    # Without the graphs of the outputs: each holds a forward pass in memory.
    return [mean.detached() for mean in means.seen]


def totals_seen(evaluate: Callable[[], Any]) -> list[float]:
    """Return the sums of the weights in those means."""
    return [float(mean.total()) for mean in weights_seen(evaluate)]


def may_differ(seen: Sequence[WeightedMean], survey: Survey) -> bool:
    """Return whether samples may differ in weight, in the means that the survey's batch has."""

    def tells(mean: WeightedMean) -> bool:
        # Targets that are computed, by a shift or a clamp, may be ignored where the data hold others.
        target: Tensor = mean.arguments["target"]
        return any(
            t.numel() == target.numel() and torch.equal(t.reshape(-1), target.reshape(-1))
            for t in tensors_in(survey.batch)
        )

    return bool(seen) and (
        survey.mixed
        or any(mean.weighs or float(mean.total()) != mean.entries for mean in seen)
        or not all(map(tells, seen))
    )


@dataclass(frozen=True)
class WeightTotals:
    """Sums of the weights of one rank's samples.

    Attributes:
        num_samples: number of the samples.
        sums: the sum for each weighted mean in the loss; ``None`` if batches have different numbers
            of means, so that their weights cannot be followed.
        equal: whether each sample has the same weight.
        in_model: how many of the means the model takes before ``loss_fn``.
    """

    num_samples: int
    sums: tuple[float, ...] | None
    equal: bool
    in_model: int = 0

    @classmethod
    def of_loss(
        cls,
        seen: Sequence[WeightedMean],
        survey: Survey,
        evaluations: Iterable[Callable[[], Any]],
        in_model: int,
    ) -> WeightTotals:
        """Return the totals of a loss whose weighted means are seen.

        Args:
            seen: the means in the loss of the survey's batch.
            survey: of all samples.
            evaluations: for each chunk of the data, what evaluates its loss; run where the weights may
                differ.
            in_model: how many of the means the model takes.
        """
        n = survey.num_samples
        if not may_differ(seen, survey):
            return cls.of_equal(n, seen, survey.size, in_model)
        return cls.of_chunks(n, map(totals_seen, evaluations), in_model)

    @classmethod
    def of_equal(
        cls, n: int, seen: Sequence[WeightedMean], size: int, in_model: int = 0
    ) -> WeightTotals:
        """Return the totals of ``n`` samples of one weight; ``size`` of them have the means."""
        return cls(n, tuple(n / size * mean.entries for mean in seen), True, in_model)

    @classmethod
    def of_chunks(cls, n: int, sums: Iterable[list[float]], in_model: int = 0) -> WeightTotals:
        """Return the totals of ``n`` samples in chunks, from the sums of each chunk's means.

        >>> WeightTotals.of_chunks(4, [[2.0], [1.5]]).sums
        (3.5,)
        """
        rows = list(sums)
        if len(set(map(len, rows))) > 1:
            return cls(n, None, False, in_model)
        return cls(n, tuple(map(sum, zip(*rows, strict=True))), False, in_model)

    @classmethod
    def of_given(cls, weights: GivenWeights, chunks: Iterable[Any]) -> WeightTotals:
        """Return the totals of weights that the user gives, which are attached to ``chunks``.

        Raises:
            ValueError: for a tensor of another number of weights.
        """
        n, total = 0, 0.0
        for batch in chunks:
            n, total = n + len(batch.weight), total + float(batch.weight.sum())
        weights.check_number(n)
        return cls(n, (total,), False)


def weights_of(
    totals: Sequence[WeightTotals], given: EqualWeights, *, complete: bool = True
) -> EqualWeights:
    """Return the weights by the totals of several ranks.

    Args:
        totals: of each rank.
        given: :class:`GivenWeights`, or others for weights of the loss.
        complete: whether these are all ranks; the samples of one may all have weight zero.

    Raises:
        ValueError: if all weights are zero.
    """
    n = sum(own.num_samples for own in totals)
    known = [own.sums for own in totals if own.sums is not None]
    if len(known) < len(totals) or len({len(sums) for sums in known}) > 1:
        return EqualWeights()
    means = tuple(sum(parts) / n for parts in zip(*known, strict=True))
    if not complete:
        means = tuple(mean or 1.0 for mean in means)
    if not all(mean > 0 for mean in means):
        raise ValueError(
            f"data: all {n} samples have weight zero, since their targets are ignored, or their classes"
            " or sample_weight have weight zero"
        )
    if isinstance(given, GivenWeights):
        return dataclasses.replace(given, average=means[0])
    alike = all(
        abs(part / own.num_samples - mean) <= _ROUNDING * mean
        for own in totals
        for part, mean in zip(own.sums or (), means, strict=True)
    )
    if alike and all(own.equal for own in totals):
        return EqualWeights()
    return LossWeights(means, totals[0].in_model)
