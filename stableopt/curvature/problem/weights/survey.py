"""`Survey`: samples drawn from all data, and whether samples may differ in weight, from one reading."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt.curvature.problem.data.batches import cut, map_tensors, tensors_in

__all__ = [
    "SPREAD_SAMPLES",
    "Survey",
    "difference_of_parts",
    "displaced_at_random",
    "joined",
    "parts_of",
]

SPREAD_SAMPLES = 64
"""Most samples on which weights are checked: a weight that every twentieth sample has is missed with a
probability of 1/27."""

_DISPLACED = 0.02
"""Distance of the checked point from the parameters, relative to their root mean square."""


@dataclass(frozen=True)
class Survey:
    """Samples drawn from all data, and whether samples may differ in weight.

    Attributes:
        num_samples: the number of samples in the data.
        batch: the drawn samples as a batch.
        size: the number of drawn samples.
        largest: the size of the largest chunk of the data.
        mixed: whether a tensor contains one of the ``sought`` values, or shapes differ between batches;
            samples may then have different numbers of targets that count.

    >>> batch = torch.zeros(3, 2), torch.tensor([4, 0, -100])
    >>> survey = Survey.of([(batch, 3)], sought=[-100], most=2)
    >>> survey.num_samples, survey.size, survey.largest, survey.complete, survey.mixed
    (3, 2, 3, False, True)
    """

    num_samples: int
    batch: Any
    size: int
    largest: int
    mixed: bool

    @property
    def complete(self) -> bool:
        """Whether the drawn samples are all samples of the data."""
        return self.size == self.num_samples

    @classmethod
    def of(
        cls,
        chunks: Iterable[tuple[Any, int]],
        *,
        sought: Collection[int | None] = (),
        most: int = SPREAD_SAMPLES,
    ) -> Survey:
        """Read ``chunks`` once, and keep at most ``most`` samples."""
        generator = torch.Generator().manual_seed(0)
        # The samples with the smallest random keys are a draw without replacement.
        kept: list[tuple[float, Any]] = []
        mixed, count, largest, last_shapes = False, 0, 0, None
        for batch, size in chunks:
            count += size
            largest = max(largest, size)
            shapes = [t.shape[1:] for t in tensors_in(batch)]
            mixed = mixed or last_shapes not in (None, shapes) or _contains(batch, sought)
            last_shapes = shapes
            keys = torch.rand(size, generator=generator, dtype=torch.float64, device="cpu").tolist()
            bound = kept[-1][0] if len(kept) == most else 1.0
            drawn = sorted((key, index) for index, key in enumerate(keys) if key < bound)[:most]
            kept += [
                (key, map_tensors(Tensor.clone, cut(batch, index, index + 1)))
                for key, index in drawn
            ]
            kept = sorted(kept, key=lambda pair: pair[0])[:most]
        batch, size = joined([sample for _, sample in kept])
        return cls(count, batch, size, largest, mixed)


def _contains(batch: Any, sought: Collection[int | None]) -> bool:
    values = [value for value in sought if value is not None]
    return any(bool((t == value).any()) for value in values for t in tensors_in(batch))


def joined(samples: Sequence[Any]) -> tuple[Any, int]:
    """Return the samples of the most frequent shape as one batch, and their number.

    >>> batch, size = joined([torch.zeros(1, 2), torch.ones(1, 3), torch.ones(1, 2)])
    >>> batch, size
    (tensor([[0., 0.],
            [1., 1.]]), 2)
    """
    by_shape: dict[Any, list[Any]] = {}
    for sample in samples:
        by_shape.setdefault(tuple(t.shape for t in tensors_in(sample)), []).append(sample)
    chosen = max(by_shape.values(), key=len)
    columns = zip(*(list(tensors_in(sample)) for sample in chosen), strict=True)
    tensors = iter([torch.cat(parts) if parts[0].dim() else parts[0] for parts in columns])
    return map_tensors(lambda t: next(tensors), chosen[0]), len(chosen)


def displaced_at_random(point: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return ``point`` plus noise: where all samples are fitted, gradients are only rounding errors.

    >>> [moved] = displaced_at_random([torch.ones(100)])
    >>> 0.01 < float((moved.detach() - 1).square().mean().sqrt()) < 0.03
    True
    """
    count = sum(t.numel() for t in point)
    squares = torch.stack([t.detach().double().square().sum() for t in point])
    scale = float(squares.sum() / count) ** 0.5
    moved = []
    for number, t in enumerate(point):
        generator = torch.Generator(t.device).manual_seed(number)
        noise = torch.randn(t.shape, generator=generator, dtype=t.dtype, device=t.device)
        moved.append((t.detach() + _DISPLACED * (scale or 1.0) * noise).requires_grad_())
    return tuple(moved)


def parts_of(size: int) -> list[tuple[int, int]]:
    """Return start and stop of parts of 1, 1, 2, 4, 8, ... samples: few passes, some of one sample.

    >>> parts_of(6)
    [(0, 1), (1, 2), (2, 4), (4, 6)]
    """
    stops = [0, 1]
    while stops[-1] < size:
        stops.append(min(2 * stops[-1], size))
    return list(itertools.pairwise(stops))


def difference_of_parts(gradient: Callable[[Any], Tensor], batch: Any, size: int) -> float:
    """Return the distance of a batch's gradient from the mean of its parts' gradients, relative to them.

    Losses would not do: an untrained model gives every class the same probability, so that all samples
    have the same loss. The parts are those of :func:`parts_of`.

    Args:
        gradient: the gradient ``(d,)`` of a batch's mean loss.
        batch: the batch.
        size: its number of samples.

    >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    >>> difference_of_parts(lambda batch: batch.mean().view(1), x, 4)
    0.0
    >>> difference_of_parts(lambda batch: (batch * batch).sum().view(1) / batch.sum(), x, 4) > 0.1
    True
    """
    whole = gradient(batch)
    mean, mean_norm = torch.zeros_like(whole), torch.zeros_like(whole.norm())
    for start, stop in parts_of(size):
        share = (stop - start) / size
        part = gradient(cut(batch, start, stop))
        mean.add_(part, alpha=share)
        mean_norm += share * part.norm()
    distance, norm = torch.stack([(whole - mean).norm(), mean_norm]).tolist()
    # The measurement reports an infinity or a NaN.
    return distance / norm if 0 < norm < float("inf") and distance < float("inf") else 0.0
