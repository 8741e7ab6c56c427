"""`PendingSteps`: steps whose numbers are still on the device, and what the loop reports of them."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stableopt.curvature.isolation.isolated import measuring
from stableopt.curvature.problem.parameters import real_view
from stableopt.distributed.fsdp import local
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.recorder.evidence import StepRecord
from stableopt.recorder.weight_sample import WeightSample
from stableopt.stability.measure.layers import layer_of

__all__ = ["PendingSteps", "Reported", "norms_of_gradients"]

_MOST_INDICES = 1024
"""Indices of a batch that are kept."""

_MOVED, _CHANGED = 0.05, 1.5
"""What is noted of weights: a step that moves them by 5 %, and a change of their norm by another."""

Scalar: TypeAlias = Tensor | float


class Reported:
    """Collects what the training loop reports of the next step, by one micro-batch or several.

    Attributes:
        total_norm: the norm of the gradient before clipping, or ``None``.
        batch: what identifies the samples, or ``None``.

    >>> its = Reported()
    >>> its.add(1, [3])
    >>> its.add(torch.tensor(2.0, dtype=torch.bfloat16), [4], grad_norm=torch.tensor(7.0))
    >>> its.loss, its.batch, its.total_norm
    (tensor(1.5000), [3, 4], tensor(7.))
    """

    def __init__(self) -> None:
        self._sum: Scalar | None = None
        self._losses = 0
        self.total_norm: Scalar | None = None
        self.batch: list[Any] | None = None

    def add(self, loss: Any, batch: Any = None, grad_norm: Any = None) -> None:
        """Add a micro-batch. The last norm counts, since it is that of the sum of gradients."""
        value = _scalar(loss)
        self._sum = value if self._sum is None else _sum(self._sum, value)
        self._losses += 1
        if batch is not None:
            self.batch = [*(self.batch or ()), *_identifiers(batch)][:_MOST_INDICES]
        if grad_norm is not None:
            if hasattr(grad_norm, "full_tensor"):
                raise TypeError("grad_norm is a DTensor: pass grad_norm.full_tensor()")
            if isinstance(grad_norm, Tensor):
                grad_norm = grad_norm.reshape(())
            self.total_norm = _scalar(grad_norm)

    @property
    def loss(self) -> Scalar | None:
        """The mean loss of the micro-batches, on their device, or ``None``."""
        return None if self._sum is None else self._sum / self._losses


def _scalar(value: Any) -> Scalar:
    """Return a number as a float, and a tensor as its mean, in single precision or better."""
    if not isinstance(value, Tensor) and isinstance(value, Real):
        return float(value)
    tensor = torch.as_tensor(value).detach()
    if tensor.is_complex():
        raise TypeError(f"a loss of {tensor.dtype}: expected a real number")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).mean()


def _sum(one: Scalar, other: Scalar) -> Scalar:
    """Return the sum, on a device if one of them is there."""
    devices = [each.device for each in (one, other) if isinstance(each, Tensor) and not each.is_cpu]
    # Scalars of the CPU mix with those of any device, and those of two devices do not.
    return one + (other.to(devices[0]) if isinstance(other, Tensor) and devices[1:] else other)


def _identifiers(batch: Any) -> list[Any]:
    """Return what identifies the samples, as JSON can hold it.

    >>> import numpy as np
    >>> _identifiers(np.arange(2)), _identifiers([np.int64(3), torch.tensor(4)]), _identifiers("a.png")
    ([0, 1], [3, 4], ['a.png'])
    """
    if isinstance(batch, Tensor) and batch.dim() and not batch.is_complex():
        listed: list[Any] = batch[:_MOST_INDICES].tolist()
        return listed  # plain numbers
    if isinstance(batch, (str, bytes, Real)) or getattr(batch, "ndim", None) == 0:
        batch = [batch]
    elif hasattr(batch, "tolist"):  # a tensor, or an array of NumPy: all numbers at once
        batch = batch[:_MOST_INDICES].tolist()
    return [_plain(each) for each in islice(batch, _MOST_INDICES)]


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    shape = tuple(getattr(value, "shape", (0,)))
    if math.prod(shape) == 1 and hasattr(value, "item"):  # a number of NumPy, or a tensor of one
        return _plain(value.item())
    return (
        f"{type(value).__name__}{list(shape)}" if hasattr(value, "shape") else reprlib.repr(value)
    )


@dataclass
class PendingStep:
    """A step whose numbers are still on the device: norms of gradients by parameter, those of weights
    before the step, of their movement and of weights after it by layer, loss and reported norm; and
    whether a gradient scaler skips it.
    """

    step: StepRecord
    before: Tensor
    gradients: Tensor | None = None
    loss: Scalar | None = None
    total_norm: Scalar | None = None
    skipped: Scalar | None = None
    moved: Tensor | None = None
    after: Tensor | None = None

    @property
    def norms(self) -> list[Tensor]:
        """The norms by parameter and by layer, in the order in which they are read."""
        every = (self.gradients, self.before, self.moved, self.after)
        return [part for part in every if part is not None]


class PendingSteps:
    """Notes steps as they happen, without a wait for the device, and reads them later.

    Args:
        monitor: the monitor of the run.
    """

    def __init__(self, monitor: StabilityMonitor) -> None:
        self._monitor, self._problem = monitor, monitor.problem
        self._weights = WeightSample(self._problem.params, self._problem.names)
        self._pending: list[PendingStep] = []
        self._open: PendingStep | None = None
        self._sample: Tensor | None = None
        self._scale: Tensor | None = None
        self._next = Reported()
        self._again = False
        self._after: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def report(self, loss: Any, batch: Any, grad_norm: Any) -> None:
        """Take what the training loop says of the next step.

        What a measurement evaluates is not part of a step, and of a closure the first evaluation is.
        """
        if not (self._again or measuring()):
            self._next.add(loss, batch, grad_norm)

    def begin(self, optimizer: Any) -> None:
        """Note the weights before a step of ``optimizer``.

        A gradient scaler leaves it to a fused optimizer to divide gradients by the scale, and to skip a
        step whose gradients overflow.
        """
        problem = self._monitor.problem
        groups = [group for o in self._monitor.optimizers for group in o.param_groups]
        lrs = [float(group["lr"]) for group in groups if group.get("lr") is not None]
        differ = lrs if len(lrs) == len(groups) and len(set(lrs)) > 1 else ()
        if problem is not self._problem:  # as when layers thaw
            self._weights, self._problem = WeightSample(problem.params, problem.names), problem
            self._after = {}
        self._sample = self._weights.take()
        step = StepRecord(self._monitor.step + 1, max(lrs, default=0.0), lrs=differ)
        self._scale, skipped = (
            getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")
        )
        self._open = PendingStep(step, self._weights.norms(self._sample), skipped=skipped)

    def gradients(self) -> None:
        """Note the gradients of the step that has begun, and what the training loop said of it."""
        if self._open is None or self._open.gradients is not None:
            return
        said, self._next = self._next, Reported()
        self._open.step = replace(self._open.step, batch=said.batch)
        self._open.loss, self._open.total_norm = said.loss, said.total_norm
        norms = norms_of_gradients(self._problem.params)
        scale = self._scale
        self._open.gradients = norms if scale is None else norms / scale.to(norms.device)
        self._pending.append(self._open)

    def end(self) -> None:
        """Note how far the step that has begun moved the weights."""
        if self._open is None or self._sample is None:
            return
        self.gradients()  # of a closure that the optimizer did not call
        its, self._open = self._open, None
        now = self._weights.take()
        its.moved, its.after = self._weights.norms(now - self._sample), self._weights.norms(now)

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Within this context nothing is reported: a closure is evaluated another time."""
        self._again = True
        try:
            yield
        finally:
            self._again = False

    def read(self) -> list[StepRecord]:
        """Return the pending steps: one transfer from each device for all norms, one for all losses."""
        if not self._pending:
            return []
        pending, self._pending = self._pending, []
        losses = _read([its.loss for its in pending])
        total_norms = _read([its.total_norm for its in pending])
        skipped = _read([its.skipped for its in pending])
        numbers = iter(torch.cat([part for its in pending for part in its.norms]).tolist())
        layers, records = self._weights.layers, []
        for its, value, total_norm, skips in zip(
            pending, losses, total_norms, skipped, strict=True
        ):
            gradients: dict[str, float] = {}
            for name in self._problem.names:
                layer = layer_of(name)
                gradients[layer] = math.hypot(gradients.get(layer, 0.0), next(numbers))
            before = dict(zip(layers, numbers, strict=False))
            length, after = {}, {}
            if its.after is not None:
                length = dict(zip(layers, numbers, strict=False))
                after = dict(zip(layers, numbers, strict=False))
            records.append(
                replace(
                    its.step,
                    loss=value,
                    grad_norms={} if skips else gradients,
                    moved=moved(before, length),
                    changed=changed(self._after, before),
                    total_norm=total_norm,
                )
            )
            self._after = after
        return records


def _read(values: Sequence[Scalar | None]) -> list[float | None]:
    """Return numbers as they are, and those of tensors in one transfer from each device."""
    found = [None if isinstance(value, Tensor) else value for value in values]
    tensors = [(at, value) for at, value in enumerate(values) if isinstance(value, Tensor)]
    for device in dict.fromkeys(value.device for _, value in tensors):
        here = [(at, value) for at, value in tensors if value.device == device]
        exact = any(value.dtype == torch.float64 for _, value in here)
        dtype = torch.float64 if exact else torch.float32
        numbers = torch.stack([value.to(dtype) for _, value in here]).tolist()
        for (at, _), number in zip(here, numbers, strict=True):
            found[at] = number
    return found


def norms_of_gradients(params: Sequence[Tensor]) -> Tensor:
    """Return the norm of the gradient of each parameter, 0 where there is none.

    In single precision, and in double precision where a gradient is.
    """
    norms = [torch.zeros((), device=p.device) if p.grad is None else _norm(p.grad) for p in params]
    if len({(norm.dtype, norm.device) for norm in norms}) > 1:
        exact = any(norm.dtype == torch.float64 for norm in norms)
        dtype = torch.float64 if exact else torch.float32
        norms = [norm.to(norms[0].device, dtype) for norm in norms]
    return torch.stack(norms)


def _norm(gradient: Tensor) -> Tensor:
    values = local(gradient.detach())
    values = real_view(values.coalesce().values() if values.is_sparse else values)
    dtype = torch.promote_types(values.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(values, dtype=dtype)
    return norm


def moved(before: Mapping[str, float], lengths: Mapping[str, float]) -> dict[str, float]:
    """Return the length of each layer's step relative to its norm before, from 5 % on."""
    found: dict[str, float] = {}
    for layer, length in lengths.items():
        if before[layer] > 0 and not length < _MOVED * before[layer]:
            found[layer] = length / before[layer]
    return found


def changed(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Return by which factor the norm of each layer changed between two steps, from 1.5 on."""
    found: dict[str, float] = {}
    for layer, norm in before.items():
        factor = norm / after[layer] if after.get(layer) else 1.0
        if math.isfinite(factor) and not 1 / _CHANGED < factor < _CHANGED:
            found[layer] = factor
    return found
