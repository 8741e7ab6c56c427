"""`compared_with_parts`: a batch's gradient against its samples', and weights that explain it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.problem.weights.survey import Survey, difference_of_parts
from stableopt.curvature.problem.weights.weights import EqualWeights, GivenWeights

__all__ = ["Counted", "compared_with_parts"]


@dataclass(frozen=True)
class Counted:
    """The number of entries in a sample's row that are not an ignored value, as its weight.

    >>> weight = Counted("labels", -100, shifted=True)
    >>> str(weight)
    "lambda batch: (batch['labels'][:, 1:] != -100).flatten(1).sum(1)"
    >>> weight({"labels": torch.tensor([[4, 5, 6], [7, 8, -100]])})
    tensor([2, 1])
    """

    key: Any
    ignored: int
    shifted: bool

    def __call__(self, batch: Any) -> Tensor:
        """Return the weights ``(n,)`` of a batch's samples."""
        entries = batch[self.key]
        entries = entries[:, 1:] if self.shifted else entries
        counts: Tensor = entries.ne(self.ignored).flatten(1).sum(1)
        return counts

    def __str__(self) -> str:
        entries = f"batch[{self.key!r}]" + ("[:, 1:]" if self.shifted else "")
        return f"lambda batch: ({entries} != {self.ignored}).flatten(1).sum(1)"

    @classmethod
    def candidates(cls, batch: Any) -> Iterator[Counted]:
        """Yield the usual weights of targets and masks: without those that are -100, or 0."""
        entries = batch.items() if isinstance(batch, Mapping) else list(enumerate(batch))[1:]
        for ignored in (-100, 0):
            for key, value in entries:
                rows = isinstance(value, Tensor) and value.dim() > 1
                if rows and not value.is_floating_point() and bool((value == ignored).any()):
                    yield cls(key, ignored, shifted=False)
                    yield cls(key, ignored, shifted=True)


def compared_with_parts(
    loss: Callable[[EqualWeights, Sequence[Tensor], Any], Tensor],
    point: Sequence[Tensor],
    survey: Survey,
    weights: EqualWeights,
    *,
    paired: bool,
    largest: float,
) -> tuple[float, str]:
    """Return how far a batch's gradient is from its parts', and weights by which it would not be.

    Args:
        loss: the loss of a batch by given weights at a point.
        point: where gradients are compared.
        survey: samples drawn over the data.
        weights: those of the problem.
        paired: whether batches are pairs.
        largest: the difference that rounding explains.

    Returns:
        The relative difference, and the text of a ``sample_weight``, empty if none explains it.
    """

    def difference(by: EqualWeights, batch: Any) -> float:
        def gradient(part: Any) -> Tensor:
            value = loss(by, point, part)
            if not value.requires_grad:  # which the check of the derivatives reports
                return torch.zeros(1, dtype=value.dtype, device=value.device)
            slopes = torch.autograd.grad(value, point, allow_unused=True, materialize_grads=True)
            return torch.cat([slope.to_dense().reshape(-1) for slope in slopes])

        return difference_of_parts(gradient, batch, survey.size)

    found = difference(weights, survey.batch)
    if found <= largest or type(weights) is not EqualWeights:
        return found, ""
    for counted in Counted.candidates(survey.batch):
        tried = GivenWeights(counted, paired=paired)
        try:
            batch = tried.attached(survey.batch, 0, survey.size)
            average = float(batch.weight.mean())
            explained = (
                average > 0
                and difference(dataclasses.replace(tried, average=average), batch) <= largest
            )
        except Exception:  # a loss of more than a guess bargains for
            continue
        if explained:
            return found, str(counted)
    return found, ""
