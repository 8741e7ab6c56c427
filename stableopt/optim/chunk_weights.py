"""`ChunkWeights`: the weight of each chunk in the gradient of a mean loss over all chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stableopt.curvature.isolation.isolated import isolated
from stableopt.curvature.problem.data.batches import Batches, map_tensors
from stableopt.curvature.problem.loss_checks import (
    CHECKED_SAMPLES,
    check_mean,
    checked_scalar,
    twice_over,
)
from stableopt.curvature.problem.weights.totals import weighted_means_in
from stableopt.curvature.problem.weights.weights import (
    GivenWeights,
    LossWeights,
    WeightedMean,
    WeightedMeans,
)

__all__ = ["ChunkWeights"]

_ALIKE = 1e-12
"""Largest relative difference, by rounding, of the mean weight of a sample in two chunks."""


class ChunkWeights:
    """Losses of chunks, and the weights for which their weighted mean is the mean over all samples.

    The weight of a chunk depends on the loss:

    - one of torch's weighted means: the sum of its weights;
    - a weighted mean plus other terms: there are several weights. If they are unequal in the first
      chunk, a first reading of all data sums them, without gradients or side effects on the model;
    - with ``sample_weight``: the sum over the chunk's samples;
    - otherwise: the number of samples.

    Args:
        model: the model, which stays in its mode.
        loss_fn: ``loss_fn(model(x), y)``, the mean over a chunk.
        batches: all chunks.
        sample_weight: the weights, or a function of a batch, or ``None``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        batches: Batches,
        sample_weight: Tensor | Callable[[Any], Tensor] | None,
    ) -> None:
        self._model, self._loss_fn, self._batches = model, loss_fn, batches
        self._given_weights = (
            None if sample_weight is None else GivenWeights(sample_weight, paired=True)
        )
        if self._given_weights is not None and isinstance(sample_weight, Tensor):
            self._given_weights.check_number(batches.num_samples)
        self._loss_weights: LossWeights | None = None
        self._first_rates: list[float] | None = None
        self._samples_read = 0

    def loss_and_weight(self, batch: Any, size: int) -> tuple[Tensor, float]:
        """Return the mean loss of a chunk, and its weight; with weight zero the loss is undefined.

        Raises:
            ValueError: for a loss that is not a scalar or not a mean, or whose weights become unequal
                only after the first chunk, when the sums of all weights are not available.
        """
        x, y = batch
        outputs = self._model(x)
        if self._given_weights is not None:
            weight = self._given_weights.attached(batch, self._samples_read, size).weight
        first, self._samples_read = self._samples_read == 0, self._samples_read + size
        if first and isinstance(outputs, Tensor) and outputs.dim() and outputs.shape[0] == size:
            self._check_mean(outputs, y)
        if self._given_weights is not None:
            return self._loss(outputs, y), float(weight.sum())
        values: list[Tensor] = []

        def value(number: int, mean: WeightedMean) -> Tensor:
            values.append(mean.value())
            return values[-1]

        means = WeightedMeans(value)
        with means:
            loss = self._loss(outputs, y)
        totals = [float(mean.total()) for mean in means.seen]
        if len(values) == 1 and loss is values[0]:
            return loss, totals[0]
        pairs = zip(means.seen, totals, strict=True)
        if first and any(mean.weighs or total != mean.entries for mean, total in pairs):
            self._loss_weights = self._average_weights()
        if self._loss_weights is not None:
            loss = self._loss_weights.mean(lambda xy: self._loss(outputs, xy[1]), batch)
            return loss, float(size)
        self._check_equal_weights([total / size for total in totals])
        return loss, float(size)

    def _loss(self, outputs: Any, y: Any) -> Tensor:
        return checked_scalar(self._loss_fn(outputs, y))

    def _check_mean(self, outputs: Tensor, y: Any) -> None:
        """Raise ``ValueError`` if the loss of doubled samples differs from that of the samples."""
        few = map_tensors(lambda t: t[:CHECKED_SAMPLES] if t.dim() else t, (outputs.detach(), y))
        devices = [outputs.device] if outputs.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            once, twice = (float(self._loss(*batch)) for batch in (few, twice_over(few)))
        check_mean(once, twice)

    def _average_weights(self) -> LossWeights:
        """Read all data once; return the average weights of a sample."""
        device = next(self._model.parameters()).device
        sums: Tensor | None = None
        with isolated(self._model, device), torch.no_grad():
            for batch, _ in self._batches:
                x, y = map_tensors(lambda t: t.to(device), batch)
                means = weighted_means_in(lambda x=x, y=y: self._loss_fn(self._model(x), y))  # type: ignore[misc]
                totals = torch.stack([mean.total().cpu() for mean in means])
                sums = totals if sums is None else sums + totals
        assert sums is not None
        return LossWeights(tuple((sums / self._batches.num_samples).tolist()))

    def _check_equal_weights(self, rates: list[float]) -> None:
        """Raise ``ValueError`` if the mean weights of a sample differ from the first chunk's."""
        if self._first_rates is None:
            self._first_rates = rates
        equal = len(self._first_rates) == len(rates) and all(
            abs(rate - first) <= _ALIKE * first
            for rate, first in zip(rates, self._first_rates, strict=True)
        )
        if not equal:
            raise ValueError(
                "loss_fn adds other terms to a weighted mean whose weights are equal in the first chunk"
                " but not later: put a sample with an ignored target first, or raise chunk_size to hold"
                " all data"
            )
