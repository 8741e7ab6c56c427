"""`WeightTotals`: sums of the samples' weights on one rank, and the weights by those of all ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stableopt.curvature.problem.weights.survey import Survey
from stableopt.curvature.problem.weights.weights import (
    EqualWeights,
    GivenWeights,
    LossWeights,
    WeightedMean,
    WeightedMeans,
)

__all__ = ["WeightTotals", "weights_of", "weights_seen"]

_ROUNDING = 1e-12
"""Relative difference of two averages of the same weights, in double precision."""


def weights_seen(evaluate: Callable[[], Any]) -> list[WeightedMean]:
    """Return the weighted means that torch's losses take while ``evaluate`` runs."""
    means = WeightedMeans(lambda number, mean: mean.value())
    with means:
        evaluate()
    return means.seen


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
        size: int,
        survey: Survey,
        evaluations: Iterable[Callable[[], Any]],
        in_model: int,
    ) -> WeightTotals:
        """Return the totals of a loss whose weighted means are seen.

        Args:
            seen: the means in the loss of one batch.
            size: samples in that batch.
            survey: of all samples.
            evaluations: for each chunk of the data, what evaluates its loss; run where the weights may
                differ.
            in_model: how many of the means the model takes.
        """
        n = survey.num_samples
        uncounted = any(float(mean.total()) != mean.entries for mean in seen)
        if not seen or not (survey.mixed or uncounted or any(mean.weighs for mean in seen)):
            return cls(n, tuple(n / size * mean.entries for mean in seen), True, in_model)
        sums = torch.zeros(len(seen), dtype=torch.float64)
        for evaluate in evaluations:
            with torch.no_grad():
                means = weights_seen(evaluate)
            if len(means) != len(seen):
                return cls(n, None, False, in_model)
            sums += torch.stack([mean.total().cpu() for mean in means])
        return cls(n, tuple(sums.tolist()), False, in_model)

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


def weights_of(totals: Sequence[WeightTotals], given: EqualWeights) -> EqualWeights:
    """Return the weights by the totals of several ranks.

    Args:
        totals: of each rank.
        given: :class:`GivenWeights`, or others for weights of the loss.

    Raises:
        ValueError: if all weights are zero.
    """
    n = sum(own.num_samples for own in totals)
    known = [own.sums for own in totals if own.sums is not None]
    if len(known) < len(totals) or len({len(sums) for sums in known}) > 1:
        return EqualWeights()
    means = tuple(sum(parts) / n for parts in zip(*known, strict=True))
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
