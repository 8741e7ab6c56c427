"""`WeightTotals`: sums of the samples' weights on a rank; `weights_of`: weights from all ranks' sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.problem.data.batches import cut, map_tensors, tensors_in
from stableopt.curvature.problem.weights.survey import Survey
from stableopt.curvature.problem.weights.weights import (
    EqualWeights,
    GivenWeights,
    LossWeights,
    SampleWeights,
    WeightedMean,
    WeightedMeans,
    form_of,
)

__all__ = [
    "WeightTotals",
    "weight_sums_in",
    "weighted_means_in",
    "weights_may_differ",
    "weights_of",
]

_ROUNDING = 1e-12
"""Relative rounding error of an average weight, in double precision."""


def weighted_means_in(evaluate: Callable[[], Any]) -> list[WeightedMean]:
    """Return the weighted means that torch's losses take while ``evaluate`` runs."""
    means = WeightedMeans(lambda number, mean: mean.value())
    with means:
        evaluate()
    # Detached, since the graph of each output keeps a forward pass in memory.
    return [mean.detached() for mean in means.seen]


def weight_sums_in(evaluate: Callable[[], Any]) -> list[float]:
    """Return the sums of the weights in the means of :func:`weighted_means_in`."""
    return [float(mean.total()) for mean in weighted_means_in(evaluate)]


def weights_may_differ(means: Sequence[WeightedMean], survey: Survey) -> bool:
    """Return whether samples may differ in weight.

    Args:
        means: the weighted means in the loss of the survey's batch.
        survey: the survey of all data.
    """

    def has_targets_of_data(mean: WeightedMean) -> bool:
        # Targets computed from the data, by a shift or a clamp, may be ignored in other samples.
        target: Tensor = mean.arguments["target"]
        return any(
            t.numel() == target.numel() and torch.equal(t.reshape(-1), target.reshape(-1))
            for t in tensors_in(survey.batch)
        )

    return bool(means) and (
        survey.mixed
        or any(mean.weighs or float(mean.total()) != mean.entries for mean in means)
        or not all(map(has_targets_of_data, means))
    )


@dataclass(frozen=True)
class WeightTotals:
    """Sums of the weights of one rank's samples.

    Attributes:
        num_samples: the number of samples.
        sums: the sum of the weights for each weighted mean in the loss; ``None`` if batches have
            different numbers of means, so that their weights cannot be matched.
        equal: whether all samples have the same weight.
        in_model: how many of the means the model takes before ``loss_fn``.
        has_zero: whether the user gave a sample the weight zero.
        weighted: a sample with a weight that the user gave, for each :func:`form_of`.
    """

    num_samples: int
    sums: tuple[float, ...] | None
    equal: bool
    in_model: int = 0
    has_zero: bool = False
    weighted: Mapping[Any, Any] = field(default_factory=dict)

    @classmethod
    def of_loss(
        cls,
        means: Sequence[WeightedMean],
        survey: Survey,
        evaluations: Iterable[Callable[[], Any]],
        in_model: int,
    ) -> WeightTotals:
        """Return the totals of the weights that torch's losses use.

        Args:
            means: the weighted means in the loss of the survey's batch.
            survey: the survey of all data.
            evaluations: one function for each chunk, which evaluates its loss; called only if weights
                may differ.
            in_model: how many of the means the model takes.
        """
        n = survey.num_samples
        if not weights_may_differ(means, survey):
            return cls.of_equal(n, means, survey.size, in_model)
        return cls.of_chunks(n, map(weight_sums_in, evaluations), in_model)

    @classmethod
    def of_equal(
        cls, n: int, means: Sequence[WeightedMean], size: int, in_model: int = 0
    ) -> WeightTotals:
        """Return the totals of ``n`` samples of equal weight, from the means of ``size`` of them."""
        return cls(n, tuple(n / size * mean.entries for mean in means), True, in_model)

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
        """Return the totals of the user's weights, which are attached to ``chunks``.

        Raises:
            ValueError: if the number of weights is not that of the samples.
        """
        n, total = 0, 0.0
        has_zero, weighted = False, dict[Any, Any]()
        for batch in chunks:
            n, total = n + len(batch.weight), total + float(batch.weight.sum())
            has_zero = has_zero or bool((batch.weight == 0).any())
            if form_of(batch) not in weighted and float(batch.weight.max()) > 0:
                index = int(batch.weight.argmax())
                # A copy on the CPU, since other ranks get it.
                sample = map_tensors(lambda t: t.to("cpu", copy=True), cut(batch, index, index + 1))
                weighted[form_of(batch)] = sample
        weights.check_number(n)
        return cls(n, (total,), False, has_zero=has_zero, weighted=weighted)


def weights_of(
    totals: Sequence[WeightTotals], given: SampleWeights, *, complete: bool = True
) -> SampleWeights:
    """Return the samples' weights, from the totals of the ranks.

    Args:
        totals: the totals of each rank.
        given: :class:`GivenWeights`; any other weights stand for those of the loss.
        complete: whether these are all ranks; on a single rank all weights may be zero.

    Raises:
        ValueError: if all weights are zero.
    """
    n = sum(rank.num_samples for rank in totals)
    rank_sums = [rank.sums for rank in totals if rank.sums is not None]
    if len(rank_sums) < len(totals) or len({len(sums) for sums in rank_sums}) > 1:
        return EqualWeights()
    means = tuple(sum(sums) / n for sums in zip(*rank_sums, strict=True))
    if not complete:
        means = tuple(mean or 1.0 for mean in means)
    if not all(mean > 0 for mean in means):
        raise ValueError(
            f"data: all {n} samples have weight zero: expected a target that is not ignored, of a class"
            " with positive weight, and a positive sample_weight"
        )
    if isinstance(given, GivenWeights):
        stand_ins: dict[Any, Any] = {}
        if any(rank.has_zero for rank in totals):
            for rank in reversed(totals):
                stand_ins |= rank.weighted
        return dataclasses.replace(given, average=means[0], stand_ins=stand_ins)
    equal_averages = all(
        abs(weight_sum / rank.num_samples - mean) <= _ROUNDING * mean
        for rank in totals
        for weight_sum, mean in zip(rank.sums or (), means, strict=True)
    )
    if equal_averages and all(rank.equal for rank in totals):
        return EqualWeights()
    return LossWeights(means, totals[0].in_model)
