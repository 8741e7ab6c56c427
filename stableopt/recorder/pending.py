"""`PendingSteps`: steps whose numbers are still on the device, with the losses that the loop reports."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from stableopt._support.tensors import as_tensor
from stableopt.curvature.isolation.isolated import measuring
from stableopt.monitor.monitor import StabilityMonitor
from stableopt.recorder.evidence import StepRecord
from stableopt.recorder.weight_sample import WeightSample
from stableopt.stability.layers.blocks import layer_of
from stableopt.stability.rules.gradient_norms import norms_of_gradients, widest

__all__ = ["PendingSteps", "Reported"]

_MOST_INDICES = 1024
"""Identifiers of a batch that are kept."""

_MOVED, _CHANGED = 0.05, 1.5
"""Smallest relative length of a step, and smallest factor of the norm between two steps, to record."""

Scalar: TypeAlias = Tensor | float


class Reported:
    """What the training loop reports about the next step, in one micro-batch or several.

    Attributes:
        total_norm: the norm of the gradient before clipping, or ``None``.
        parts: identifiers of the samples of each micro-batch, as a list, or a tensor on its device.

    >>> reported = Reported()
    >>> reported.add(1, [3])
    >>> reported.add(torch.tensor(2.0, dtype=torch.bfloat16), [4], grad_norm=torch.tensor(7.0))
    >>> reported.loss, reported.parts, reported.total_norm
    (tensor(1.5000), [[3], [4]], tensor(7.))
    """

    def __init__(self) -> None:
        self._sum: Scalar | None = None
        self._micro_batches = 0
        self.total_norm: Scalar | None = None
        self.parts: list[list[Any] | Tensor] = []

    def add(self, loss: Any, batch: Any = None, grad_norm: Any = None) -> None:
        """Add a micro-batch. The last norm counts: it is the norm of the accumulated gradient."""
        value = _scalar(loss)
        self._sum = value if self._sum is None else _sum(self._sum, value)
        self._micro_batches += 1
        if batch is not None:
            self._add_identifiers(batch)
        if grad_norm is not None:
            if hasattr(grad_norm, "full_tensor"):
                raise TypeError("grad_norm is a DTensor: pass grad_norm.full_tensor()")
            if isinstance(grad_norm, Tensor):
                grad_norm = grad_norm.reshape(())
            self.total_norm = _scalar(grad_norm)

    def _add_identifiers(self, batch: Any) -> None:
        if sum(map(len, self.parts)) >= _MOST_INDICES:
            return
        if isinstance(batch, Tensor) and not batch.is_cpu:
            # Read later; a copy, since loops fill one tensor of indices again and again.
            self.parts.append(batch.detach().reshape(batch.shape or 1)[:_MOST_INDICES].clone())
        else:
            self.parts.append(_identifiers(batch))

    @property
    def loss(self) -> Scalar | None:
        """The mean loss of the micro-batches, on their device, or ``None``."""
        return None if self._sum is None else self._sum / self._micro_batches


def _scalar(value: Any) -> Scalar:
    """Return a number as a float, and a tensor as its mean in at least single precision."""
    if not isinstance(value, Tensor) and isinstance(value, Real):
        return float(value)
    tensor = as_tensor(value).detach()
    if tensor.is_complex():
        raise TypeError(f"a loss of {tensor.dtype}: expected a real number")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).mean()


def _sum(a: Scalar, b: Scalar) -> Scalar:
    """Return the sum, on an accelerator if one of the terms is on one."""
    # Zero-dimensional CPU tensors add to tensors of any device; two accelerators need a transfer.
    if isinstance(a, Tensor) and isinstance(b, Tensor) and not (a.is_cpu or b.is_cpu):
        b = b.to(a.device)
    return a + b


def _identifiers(batch: Any) -> list[Any]:
    """Return the identifiers of the samples as values that JSON can hold.

    >>> import numpy as np
    >>> _identifiers(np.arange(2)), _identifiers([np.int64(3), torch.tensor(4)]), _identifiers("a.png")
    ([0, 1], [3, 4], ['a.png'])
    """
    if isinstance(batch, Tensor) and batch.dim() and not batch.is_complex():
        indices: list[Any] = batch[:_MOST_INDICES].tolist()
        return indices
    if isinstance(batch, (str, bytes, Real)) or getattr(batch, "ndim", None) == 0:
        batch = [batch]
    elif hasattr(batch, "tolist"):  # a tensor or NumPy array: one transfer for all numbers
        batch = batch[:_MOST_INDICES].tolist()
    return [_plain(identifier) for identifier in islice(batch, _MOST_INDICES)]


def _batch(parts: Sequence[list[Any] | Tensor]) -> list[Any] | None:
    """Return the identifiers of all micro-batches, or ``None`` if there are none."""
    lists = [_identifiers(part) if isinstance(part, Tensor) else part for part in parts]
    return [each for part in lists for each in part][:_MOST_INDICES] if lists else None


def _plain(value: Any) -> Any:
    if value is None:
        return value
    for kind in (bool, int, float, str):
        if isinstance(
            value, kind
        ):  # also of a subclass, such as numpy.str_, which pickles as itself
            return kind(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    shape = tuple(getattr(value, "shape", (0,)))
    if math.prod(shape) == 1 and hasattr(value, "item"):  # a NumPy number, or a one-element tensor
        return _plain(value.item())
    if hasattr(value, "shape"):
        return f"{type(value).__name__}{list(shape)}"
    return reprlib.repr(value)


@dataclass
class PendingStep:
    """A step whose numbers are still on the device.

    Attributes:
        step: its number.
        names: the names of the parameters, in the order of their gradients.
        weights: the sample of the weights.
        sample: its values before the step; ``None`` after it, to free their memory.
        before: the norm of each layer's weights before the step.
        lrs: the learning rate of each group, ``None`` where it has none.
        scale: the factor of a gradient scaler in the gradients, or ``None``.
        parts: identifiers of the samples of each micro-batch.
        gradients: the norm of each parameter's gradient.
        loss, total_norm: what the training loop reported.
        skipped: whether a gradient scaler skips the step.
        moved: the length of each layer's step.
        after: the norm of each layer's weights after the step.
    """

    step: int
    names: Sequence[str]
    weights: WeightSample
    sample: Tensor | None
    before: Tensor
    lrs: Sequence[Scalar | None] = ()
    scale: Tensor | None = None
    parts: Sequence[list[Any] | Tensor] = ()
    gradients: Tensor | None = None
    loss: Scalar | None = None
    total_norm: Scalar | None = None
    skipped: Scalar | None = None
    moved: Tensor | None = None
    after: Tensor | None = None

    @property
    def norms(self) -> list[Tensor]:
        """The norms by parameter and by layer, in the order in which they are read."""
        norms = (self.gradients, self.before, self.moved, self.after)
        return [norm for norm in norms if norm is not None]


class PendingSteps:
    """Records steps as they happen without synchronizing with the device, and reads them later.

    Args:
        monitor: the monitor of the run.
    """

    def __init__(self, monitor: StabilityMonitor) -> None:
        self._monitor, self._problem = monitor, monitor.problem
        self._weights = WeightSample(self._problem.params, self._problem.names)
        self._pending: list[PendingStep] = []
        self._open: PendingStep | None = None
        self._next = Reported()
        self._repeating = False
        # After the last step that was read: its weights, and the norm of each layer.
        self._last: tuple[WeightSample, dict[str, float]] = (self._weights, {})

    def __len__(self) -> int:
        return len(self._pending)

    def report(self, loss: Any, batch: Any, grad_norm: Any) -> None:
        """Add the loss of a micro-batch of the next step.

        Evaluations within a measurement, and repeated evaluations of a closure, are ignored.
        """
        if not (self._repeating or measuring()):
            self._next.add(loss, batch, grad_norm)

    def begin(self, optimizer: Any) -> None:
        """Record learning rates and weights before a step of ``optimizer``.

        With a gradient scaler, a fused optimizer itself divides gradients by ``grad_scale`` and skips
        steps with ``found_inf``.
        """
        problem = self._monitor.problem
        groups = [group for o in self._monitor.optimizers for group in o.param_groups]
        # Rates in tensors, which schedulers change in place, are copied, and stay on the device.
        lrs = [None if group.get("lr") is None else _scalar(group["lr"]) for group in groups]
        if problem is not self._problem:  # as when layers thaw
            self._weights, self._problem = WeightSample(problem.params, problem.names), problem
        if self._open is not None:  # a joint step that stays incomplete, or a step that raised
            self._open.sample = None
        sample = self._weights.take()
        self._open = PendingStep(
            self._monitor.step + 1,
            problem.names,
            self._weights,
            sample,
            self._weights.norms(sample),
            lrs,
            scale=getattr(optimizer, "grad_scale", None),
            skipped=getattr(optimizer, "found_inf", None),
        )

    @property
    def has_gradients(self) -> bool:
        """Whether the gradients of the open step are recorded."""
        return self._open is not None and self._open.gradients is not None

    def gradients(self) -> None:
        """Record the gradients of the open step, and what the training loop reported about it."""
        if self._open is None or self._open.gradients is not None:
            return
        reported, self._next = self._next, Reported()
        self._open.parts = reported.parts
        self._open.loss, self._open.total_norm = reported.loss, reported.total_norm
        norms = norms_of_gradients(self._problem.params)
        scale = self._open.scale
        self._open.gradients = norms if scale is None else norms / scale.to(norms.device)
        self._pending.append(self._open)

    def end(self) -> None:
        """Record how far the open step moved the weights."""
        if self._open is None:
            return
        self.gradients()  # for an optimizer that did not call its closure
        pending, self._open = self._open, None
        before, pending.sample = pending.sample, None
        assert before is not None
        after = pending.weights.take()
        pending.moved = pending.weights.norms(after - before)
        pending.after = pending.weights.norms(after)

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Ignore reported losses within this context: a closure is evaluated again."""
        self._repeating = True
        try:
            yield
        finally:
            self._repeating = False

    def read(self) -> list[StepRecord]:
        """Return the pending steps, with one transfer per device and kind of number."""
        if not self._pending:
            return []
        steps, self._pending = self._pending, []
        rates = iter(_read([lr for pending in steps for lr in pending.lrs]))
        losses = _read([pending.loss for pending in steps])
        total_norms = _read([pending.total_norm for pending in steps])
        skipped = _read([pending.skipped for pending in steps])
        numbers = iter(torch.cat([norm for pending in steps for norm in pending.norms]).tolist())
        records = []
        for pending, loss, total_norm, skip in zip(
            steps, losses, total_norms, skipped, strict=True
        ):
            lrs = [lr for lr in islice(rates, len(pending.lrs)) if lr is not None]
            gradients: dict[str, float] = {}
            for name in pending.names:
                layer = layer_of(name)
                gradients[layer] = math.hypot(gradients.get(layer, 0.0), next(numbers))
            layers = pending.weights.layers
            before = dict(zip(layers, numbers, strict=False))
            lengths, after = {}, {}
            if pending.after is not None:
                lengths = dict(zip(layers, numbers, strict=False))
                after = dict(zip(layers, numbers, strict=False))
            weights, norms_after = self._last
            records.append(
                StepRecord(
                    pending.step,
                    lr=max(lrs, default=0.0),
                    lrs=lrs if len(lrs) == len(pending.lrs) and len(set(lrs)) > 1 else (),
                    loss=loss,
                    batch=_batch(pending.parts),
                    grad_norms={} if skip else gradients,
                    moved=moved(before, lengths),
                    # Norms of other weights, as before layers thawed, are not compared.
                    changed=changed(norms_after if weights is pending.weights else {}, before),
                    total_norm=total_norm,
                )
            )
            self._last = pending.weights, after
        return records


def _read(values: Sequence[Scalar | None]) -> list[float | None]:
    """Return scalars as Python numbers, with one transfer from each device."""
    numbers = [None if isinstance(value, Tensor) else value for value in values]
    tensors = {k: value for k, value in enumerate(values) if isinstance(value, Tensor)}
    for device in dict.fromkeys(tensor.device for tensor in tensors.values()):
        group = {k: tensor for k, tensor in tensors.items() if tensor.device == device}
        dtype = widest(group.values())
        read = torch.stack([tensor.to(dtype) for tensor in group.values()]).tolist()
        for k, number in zip(group, read, strict=True):
            numbers[k] = number
    return numbers


def moved(before: Mapping[str, float], lengths: Mapping[str, float]) -> dict[str, float]:
    """Return the length of each layer's step relative to its norm before, if at least 5 % or NaN."""
    relative: dict[str, float] = {}
    for layer, length in lengths.items():
        if before[layer] > 0 and not length < _MOVED * before[layer]:
            relative[layer] = length / before[layer]
    return relative


def changed(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    """Return the factor by which each layer's norm changed between two steps, if at least 1.5.

    ``after`` holds the norms after the first step, ``before`` those before the second.
    """
    factors: dict[str, float] = {}
    for layer, norm in before.items():
        factor = norm / after[layer] if after.get(layer) else 1.0
        if math.isfinite(factor) and not 1 / _CHANGED < factor < _CHANGED:
            factors[layer] = factor
    return factors
