"""`SampleCounter`: counts the samples of each training step in the model's forward passes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from statistics import median_low
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from stableopt._support.torch_internals import eager, in_backward
from stableopt.curvature.isolation.isolated import measuring
from stableopt.curvature.problem.data.batches import tensors_in

__all__ = ["SampleCounter"]

_OBSERVED_STEPS = 5
"""The batch size is the median over so many steps: one ragged batch does not change it, nor does one
skipped step, whose samples are counted with the next step."""


class SampleCounter:
    """A forward pre-hook that counts samples; a copy made with its module counts nothing.

    Attributes:
        active: whether forward passes are counted.
        dim: the dimension that counts samples; the first dimension for tensors without it.
        observed: the samples of each of the last five steps, oldest first.
    """

    def __init__(self, active: bool = True, dim: int = 0) -> None:
        self.active, self.dim = active, dim
        self.observed: deque[int] = deque(maxlen=_OBSERVED_STEPS)
        self._count, self._seen_forward = 0, False

    @property
    def __name__(self) -> str:
        """Refuses ``torch.jit.script``, which reads the name of a hook before compiling it."""
        raise AttributeError(
            "torch.jit.script cannot compile the hook that counts the samples of a step: pass"
            " batch_size= to track() or StabilityMonitor, which then adds no hook, or close() the"
            " monitor before"
        )

    @property
    def batch_size(self) -> int | None:
        """The median of :attr:`observed`; ``None`` before the first step with samples."""
        return median_low(self.observed) if self.observed else None

    @eager
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Count the samples of a training forward pass."""
        # Skip validation, which runs without gradients, and the passes of measurements.
        if not self.active or not torch.is_grad_enabled() or measuring():
            return
        # Activation checkpointing repeats a forward pass in the backward pass, or runs it only there.
        recomputed = in_backward()
        if not (recomputed and self._seen_forward):
            self.add((args, kwargs))
        self._seen_forward = self._seen_forward or not recomputed

    def add(self, batch: Any) -> None:
        """Count the samples of ``batch``: the size of its first tensor."""
        # The first batch size of a packed sequence is the number of its samples.
        packed = next(_packed_sequences(batch), None)
        if packed is not None:
            self._count += int(packed.batch_sizes[0])
        else:
            sizes = (
                t.shape[self.dim if t.dim() > self.dim else 0] for t in tensors_in(batch) if t.dim()
            )
            self._count += next(sizes, 0)

    def end_step(self) -> None:
        """Record the samples since the last call, if any, as one step."""
        if self._count:
            self.observed.append(self._count)
        self._count, self._seen_forward = 0, False

    def __deepcopy__(self, memo: Any) -> SampleCounter:
        return SampleCounter(active=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return (SampleCounter, (False,))


def _packed_sequences(batch: Any) -> Iterator[PackedSequence]:
    if isinstance(batch, PackedSequence):
        yield batch
    elif isinstance(batch, (tuple, list, Mapping)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _packed_sequences(value)
