"""`PendingStep`: a step whose numbers are still on the device; `Reported`: what a loop says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stableopt.distributed.fsdp import local
from stableopt.recorder.evidence import StepRecord

__all__ = ["PendingStep", "Reported", "changed", "moved", "norms_of_gradients"]

_MOST_INDICES = 1024
"""Indices of a batch that are kept."""

_MOVED, _CHANGED = 0.05, 1.5
"""What is noted of weights: a step that moves them by 5 %, and a change of their norm by another."""


class Reported:
    """Collects what the training loop reports of the next step, by one micro-batch or several.

    Attributes:
        total_norm: the norm of the gradient before clipping, or ``None``.
        batch: what identifies the samples, or ``None``.

    >>> its = Reported()
    >>> its.add(1.0, [3])
    >>> its.add(2.0, [4], grad_norm=torch.tensor(7.0))
    >>> its.loss, its.batch, its.total_norm
    (tensor(1.5000), [3, 4], tensor(7.))
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._losses = 0
        self.total_norm: Tensor | None = None
        self.batch: list[Any] | None = None

    def add(
        self,
        loss: Tensor | float,
        batch: Sequence[Any] | Tensor | None = None,
        grad_norm: Tensor | float | None = None,
    ) -> None:
        """Add a micro-batch. The last norm counts, since it is that of the sum of gradients."""
        value = torch.as_tensor(loss).detach().mean()
        self._sum = value.clone() if self._sum is None else self._sum + value.to(self._sum)
        self._losses += 1
        if batch is not None:
            listed = batch.tolist() if isinstance(batch, Tensor) else list(batch)
            self.batch = [*(self.batch or ()), *listed][:_MOST_INDICES]
        if grad_norm is not None:
            if hasattr(grad_norm, "full_tensor"):
                raise TypeError("grad_norm is a DTensor: pass grad_norm.full_tensor()")
            self.total_norm = torch.as_tensor(grad_norm).detach().reshape(()).clone()

    @property
    def loss(self) -> Tensor | None:
        """The mean loss of the micro-batches, on their device, or ``None``."""
        return None if self._sum is None else self._sum / self._losses


@dataclass
class PendingStep:
    """A step whose numbers are still on the device: norms of gradients by parameter, those of weights
    before the step, of their movement and of weights after it by layer, loss and reported norm.
    """

    step: StepRecord
    gradients: Tensor
    before: Tensor
    loss: Tensor | None
    total_norm: Tensor | None = None
    moved: Tensor | None = None
    after: Tensor | None = None

    @property
    def norms(self) -> list[Tensor]:
        """The norms by parameter and by layer, in the order of the attributes."""
        every = (self.gradients, self.before, self.moved, self.after)
        return [part for part in every if part is not None]


def norms_of_gradients(params: Sequence[Tensor]) -> Tensor:
    """Return the norm of the gradient of each parameter, 0 where there is none."""
    return torch.stack(
        [
            torch.zeros((), device=p.device, dtype=torch.float32)
            if p.grad is None
            else torch.linalg.vector_norm(_values(p.grad), dtype=torch.float32)
            for p in params
        ]
    )


def _values(gradient: Tensor) -> Tensor:
    values = local(gradient.detach())
    return values.coalesce().values() if values.is_sparse else values


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
