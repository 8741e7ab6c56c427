"""Counting the samples of a step from the model's forward passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from stableopt._torch import eager
from stableopt.curvature.isolation.isolated import measuring
from stableopt.curvature.problem.data import tensors_in

__all__ = ["SampleCounter"]


class SampleCounter:
    """A forward pre-hook that counts samples; a copy made with its module counts nothing."""

    def __init__(self, active: bool = True) -> None:
        self.active = active
        self._count = 0

    @eager
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Count the samples of a forward pass that training makes."""
        # Validation runs without gradients and is no part of a step; nor are passes of this or any
        # other measurement.
        if self.active and torch.is_grad_enabled() and not measuring():
            self.add((args, kwargs))

    def add(self, batch: Any) -> None:
        """Count the samples of ``batch``: the leading dimension of its first tensor."""
        # A packed sequence holds rows of several samples: its batch sizes start with all.
        packed = next(_packed_in(batch), None)
        if packed is not None:
            self._count += int(packed.batch_sizes[0])
        else:
            self._count += next((t.shape[0] for t in tensors_in(batch) if t.dim()), 0)

    def take(self) -> int:
        """Return the samples since the last call."""
        count, self._count = self._count, 0
        return count

    def __deepcopy__(self, memo: Any) -> SampleCounter:
        return SampleCounter(active=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return (SampleCounter, (False,))


def _packed_in(batch: Any) -> Iterator[PackedSequence]:
    if isinstance(batch, PackedSequence):
        yield batch
    elif isinstance(batch, (tuple, list, Mapping)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _packed_in(value)
