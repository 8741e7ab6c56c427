"""`SampleCounter`: counts the samples of each training step in the model's forward passes."""

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
"""The batch size is the median over so many steps: one ragged batch does not change it, nor does one
skipped step, whose samples are counted with the next step."""


class SampleCounter:
    """A forward pre-hook that counts samples; a copy made with its module counts nothing.

    A line search or SAM evaluates the batch at several points in a step. Only passes at the first point
    are counted; passes at later points follow an in-place change of a parameter.

    Args:
        params: returns the trained parameters.
        dim: the dimension that counts samples; the first dimension for tensors without it.

    Attributes:
        active: whether forward passes are counted.
        passed: the model's samples for each sample of the loss: two in a loss of pairs.
        dims: the number of dimensions of a batch loss's inputs; an input with one less is a sample.
        observed: the model's samples in each of the last five steps, oldest first.
    """

    def __init__(self, params: Callable[[], Sequence[Tensor]] = list, dim: int = 0) -> None:
        self.active, self.dim = True, dim
        self.observed: deque[int] = deque(maxlen=_OBSERVED_STEPS)
        self.passed = 1
        self.dims: int | None = None
        self._params, self._first_version = params, 0
        self._count, self._seen_forward, self._calibrating = 0, False, False

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
        """The median of :attr:`observed`, in the loss's samples; ``None`` before the first step."""
        return max(1, median_low(self.observed) // self.passed) if self.observed else None

    def calibrate(self, problem: MeanLoss) -> None:
        """Determine :attr:`passed` and :attr:`dims` from one evaluation of a batch loss."""
        if problem.loss_fn is not None:
            return  # loss_fn(model(x), y) passes each sample once, in batches
        self._calibrating = True
        try:
            problem.value()
            passed, remainder = divmod(self._count, problem.own_samples)
        finally:
            self._count, self._calibrating = 0, False
        self.passed = passed if passed and not remainder else 1

    @eager
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Count the samples of a training forward pass."""
        if self._calibrating:
            self.add((args, kwargs))
            self.dims = next((t.dim() for t in tensors_in((args, kwargs)) if t.dim()), None)
            return
        # Skip validation, which runs without gradients, and the passes of measurements.
        if not self.active or not torch.is_grad_enabled() or measuring():
            return
        version = sum(p._version for p in self._params())
        if not self._count:
            self._first_version = version
        if version != self._first_version:
            return
        # Activation checkpointing repeats a forward pass in the backward pass, or runs it only there.
        recomputed = in_backward()
        if not (recomputed and self._seen_forward):
            self.add((args, kwargs))
        self._seen_forward = self._seen_forward or not recomputed

    def count_only(self, batch: Any) -> None:
        """Count ``batch``, and stop counting forward passes."""
        if self.active:
            self.observed.clear()
        self.active, self.passed, self.dims = False, 1, None
        self.add(batch)

    def add(self, batch: Any) -> None:
        """Count the samples of ``batch``: the size of its first tensor."""
        # The first batch size of a packed sequence is the number of its samples.
        packed = next(_packed_sequences(batch), None)
        if packed is not None:
            self._count += int(packed.batch_sizes[0])
        else:
            first = next((t for t in tensors_in(batch) if t.dim()), None)
            if first is not None and self.dims is not None and first.dim() == self.dims - 1:
                self._count += 1
            elif first is not None:
                self._count += first.shape[self.dim if first.dim() > self.dim else 0]

    def end_step(self) -> None:
        """Record the samples since the last call, if any, as one step."""
        if self._count:
            self.observed.append(self._count)
        self._count, self._seen_forward = 0, False

    def __deepcopy__(self, memo: Any) -> SampleCounter:
        return _inactive()

    def __reduce__(self) -> tuple[Any, ...]:
        return (_inactive, ())


def _inactive() -> SampleCounter:
    counter = SampleCounter()
    counter.active = False
    return counter


def _packed_sequences(batch: Any) -> Iterator[PackedSequence]:
    if isinstance(batch, PackedSequence):
        yield batch
    elif isinstance(batch, (tuple, list, Mapping)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _packed_sequences(value)
