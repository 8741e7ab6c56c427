"""`SampleCounter`: observes the batch size of training from the model's forward passes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median_low
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from stableopt._support.torch_internals import eager, in_backward
from stableopt.curvature.isolation.isolated import measuring
from stableopt.curvature.problem.data.batches import tensors_in
from stableopt.curvature.problem.mean_loss import MeanLoss

__all__ = ["SampleCounter"]

_OBSERVED_STEPS = 5
"""Steps whose median is the batch size. One ragged batch does not change it, nor does one skipped
step, whose samples are counted with the next."""


class SampleCounter:
    """A forward pre-hook that counts samples; a copy made with its module counts nothing.

    A step may evaluate its batch at several points, as a line search and SAM do. Only passes at the
    first one are counted: later ones follow an in-place change of a parameter.

    Args:
        params: returns the trained parameters.
        dim: the dimension that counts samples, if a tensor has it, and else the first.

    Attributes:
        active: whether forward passes are counted.
        passed: samples that pass the model for one of the loss: two in a loss of pairs.
        observed: samples of each of the latest five steps, oldest first.
    """

    def __init__(self, params: Callable[[], Sequence[Tensor]] = list, dim: int = 0) -> None:
        self.active, self.dim = True, dim
        self.observed: deque[int] = deque(maxlen=_OBSERVED_STEPS)
        self.passed = 1
        self._params, self._first_point = params, 0
        self._count, self._forward, self._calibrating = 0, False, False

    @property
    def __name__(self) -> str:
        """What torch.jit.script asks a hook for, before it compiles it."""
        raise AttributeError(
            "torch.jit.script cannot compile the hook by which a monitor counts the samples of a step:"
            " pass batch_size= to track() or StabilityMonitor, which then needs no hook in the model, or"
            " close() the monitor before"
        )

    @property
    def batch_size(self) -> int | None:
        """The median of :attr:`observed`; ``None`` before the first step with samples."""
        return max(1, median_low(self.observed) // self.passed) if self.observed else None

    def calibrate(self, problem: MeanLoss) -> None:
        """Find :attr:`passed` by one evaluation of a batch loss, which may call the model at will."""
        if problem.loss_fn is not None:
            return  # loss_fn(model(x), y) passes each sample once
        self._calibrating = True
        try:
            problem.value()
            passed, rest = divmod(self._count, problem.own_samples)
        finally:
            self._count, self._calibrating = 0, False
        self.passed = passed if passed and not rest else 1

    @eager
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Count the samples of a training forward pass."""
        if self._calibrating:
            self.add((args, kwargs))
            return
        # Validation runs without gradients and belongs to no step; nor do passes of any measurement.
        if not self.active or not torch.is_grad_enabled() or measuring():
            return
        point = sum(p._version for p in self._params())
        if not self._count:
            self._first_point = point
        if point != self._first_point:
            return
        # Activation checkpointing runs a pass again in the backward pass, or there alone.
        again = in_backward()
        if not (again and self._forward):
            self.add((args, kwargs))
        self._forward = self._forward or not again

    def count_only(self, batch: Any) -> None:
        """Count ``batch``, and no forward pass from now on."""
        if self.active:
            self.observed.clear()
        self.active, self.passed = False, 1
        self.add(batch)

    def add(self, batch: Any) -> None:
        """Count the samples of ``batch`` by its first tensor."""
        # A packed sequence holds rows of several samples: its first batch size is that of all.
        packed = next(_packed_in(batch), None)
        if packed is not None:
            self._count += int(packed.batch_sizes[0])
        else:
            sizes = (
                t.shape[self.dim if t.dim() > self.dim else 0] for t in tensors_in(batch) if t.dim()
            )
            self._count += next(sizes, 0)

    def end_step(self) -> None:
        """Take the samples since the last call, if any, as those of one step."""
        if self._count:
            self.observed.append(self._count)
        self._count, self._forward = 0, False

    def __deepcopy__(self, memo: Any) -> SampleCounter:
        return _inactive()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_inactive, ())


def _inactive() -> SampleCounter:
    counter = SampleCounter()
    counter.active = False
    return counter


def _packed_in(batch: Any) -> Iterator[PackedSequence]:
    if isinstance(batch, PackedSequence):
        yield batch
    elif isinstance(batch, (tuple, list, Mapping)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _packed_in(value)
