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
"""Relative difference of the same weight for each sample in two chunks, in double precision."""


class ChunkWeights:
    """Losses of chunks, and the weights that make their mean that of all samples.

    - A loss that is one of torch's weighted means has the sum of its weights.
    - A loss that adds others to such a mean has several weights. They are summed in a first reading,
      without gradients and without a trace in the model, if the first chunk has unequal ones.
    - With ``sample_weight`` the weight is the sum over the chunk's samples.
    - Otherwise it is the number of samples.

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
        self._given = None if sample_weight is None else GivenWeights(sample_weight, paired=True)
        if self._given is not None and isinstance(sample_weight, Tensor):
            self._given.check_number(batches.num_samples)
        self._weights: LossWeights | None = None
        self._rates: list[float] | None = None
        self._seen = 0

    def loss_and_weight(self, batch: Any, size: int) -> tuple[Tensor, float]:
        """Return the mean loss of a chunk, and its weight; the loss of weight zero has no meaning.

        Raises:
            ValueError: for a loss that is not a scalar or not a mean, or whose weights become unequal
                behind the first chunk, so that the first reading was left out.
        """
        x, y = batch
        outputs = self._model(x)
        if self._given is not None:
            weight = self._given.attached(batch, self._seen, size).weight
        first, self._seen = self._seen == 0, self._seen + size
        if first and isinstance(outputs, Tensor) and outputs.dim() and outputs.shape[0] == size:
            self._check_mean(outputs, y)
        if self._given is not None:
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
        if first and any(
            mean.weighs or total != mean.entries
            for mean, total in zip(means.seen, totals, strict=True)
        ):
            self._weights = self._summed(batch)
        if self._weights is not None:
            return self._weights.mean(lambda own: self._loss(outputs, own[1]), batch), float(size)
        self._check_rates([total / size for total in totals])
        return loss, float(size)

    def _loss(self, outputs: Any, y: Any) -> Tensor:
        return checked_scalar(self._loss_fn(outputs, y))

    def _check_mean(self, outputs: Tensor, y: Any) -> None:
        few = map_tensors(lambda t: t[:CHECKED_SAMPLES] if t.dim() else t, (outputs.detach(), y))
        devices = [outputs.device] if outputs.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            once, twice = (float(self._loss(*tried)) for tried in (few, twice_over(few)))
        check_mean(once, twice)

    def _summed(self, like: Any) -> LossWeights:
        """Read all data once, and return the average weights of a sample."""
        device = next(self._model.parameters()).device
        sums: Tensor | None = None
        with isolated(self._model, device), torch.no_grad():
            for batch, _ in self._batches:
                x, y = map_tensors(lambda t: t.to(device), batch)
                seen = weighted_means_in(lambda x=x, y=y: self._loss_fn(self._model(x), y))  # type: ignore[misc]
                totals = torch.stack([mean.total().cpu() for mean in seen])
                sums = totals if sums is None else sums + totals
        assert sums is not None
        return LossWeights(tuple((sums / self._batches.num_samples).tolist()))

    def _check_rates(self, rates: list[float]) -> None:
        before = self._rates = rates if self._rates is None else self._rates
        alike = len(before) == len(rates) and all(
            abs(rate - first) <= _ALIKE * first for rate, first in zip(rates, before, strict=True)
        )
        if not alike:
            raise ValueError(
                "loss_fn adds other terms to a mean that weighs samples unequally, but equally in the"
                " first chunk: put a sample with an ignored target first, or raise chunk_size to hold"
                " all data"
            )
