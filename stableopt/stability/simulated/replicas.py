r"""`Replicas`: independent simulations of the linear dynamics of SGD near a minimum.

Near a minimum that fits all samples, a step of SGD is :math:`x \mapsto (I-\eta H_B)x`, where
:math:`H_B` is the Hessian of a random batch B; momentum adds a buffer. Each replica draws its own
batches. Coordinates are those of the eigenbasis of H, in which H is diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stableopt._support.arguments import whole
from stableopt.curvature.gram.gram import Modes
from stableopt.stability.rules.limits import LinearStep

__all__ = ["Replicas"]

_BYTES = 1 << 25
"""Bytes of factors gathered at once: a small multiple of a processor's cache."""

_WORTH_A_CALL = 1 << 15
"""Bytes whose copying takes as long as the kernel calls for one sample, measured on a CPU."""


class Replicas:
    """Replicas of the linear dynamics, each with its own order of the samples.

    Args:
        modes: the samples' curvature; its factors are ``(n, C, r)``.
        step: a step of ``torch.optim.SGD``: momentum, dampening, Nesterov's momentum and coupled
            weight decay are allowed.
        batch_size: samples B in a step.
        count: the number of replicas.
        seed: seed of the initial states and of the orders.

    Attributes:
        state: parameters, and momentum buffers times the learning rate, ``(2, count, r)``.
        remaining: indices of each replica's remaining samples in this epoch, ``(count, remaining)``.

    Raises:
        ValueError: for a batch size, a count or a seed out of range, and for other steps.
    """

    def __init__(
        self, modes: Modes, step: LinearStep, batch_size: int, count: int, seed: int
    ) -> None:
        n, _, r = modes.factors.shape
        if step.filter or step.decoupled_weight_decay or step.momentum_share != 1:
            raise ValueError(
                f"step={step}: expected no filter, no decoupled_weight_decay, and momentum_share=1"
            )
        self.modes, self.step = modes, step
        self.batch_size = whole("batch_size", batch_size)
        if self.batch_size > n:
            raise ValueError(f"batch_size={batch_size} is above the {n} samples")
        # The spread between fewer replicas is too uncertain for a standard error.
        self.count = whole("replicas", count, least=8)
        device = modes.factors.device
        generator = torch.Generator(device).manual_seed(whole("seed", seed, least=0))
        self._random: dict[str, Any] = {"generator": generator, "device": device}
        self.state = torch.zeros(2, self.count, r, dtype=torch.float64, device=device)
        self.state[0] = torch.randn(self.count, r, dtype=torch.float64, **self._random)
        self.state /= self.state[0].norm(dim=1, keepdim=True)
        self.remaining = self.uniform(self.count, 0).long()

    def uniform(self, *shape: int) -> Tensor:
        """Return random numbers between 0 and 1."""
        return torch.rand(*shape, **self._random)

    def reshuffle(self) -> None:
        """Begin an epoch: give each replica all samples, in a new random order."""
        self.remaining = self.uniform(self.count, self.modes.factors.shape[0]).argsort(1)

    def draw(self) -> Tensor:
        """Return each replica's next batch, ``(count, B)``; the last of an epoch may be smaller."""
        batch = self.remaining[:, : self.batch_size]
        self.remaining = self.remaining[:, self.batch_size :]
        return batch

    def gradients(self, batch: Tensor) -> Tensor:
        """Return each replica's gradient ``(count, r)`` on its own batch of ``batch`` ``(count, B)``."""
        factors, x = self.modes.factors, self.state[0]
        if factors.device.type != "cpu":  # a loop over samples would wait for the device
            return _by_replica(factors, x, batch) / batch.shape[1]
        indices, order = batch.flatten().sort(stable=True)
        samples, counts = torch.unique_consecutive(indices, return_counts=True)
        sample_bytes = factors[0].numel() * factors.element_size()
        if batch.numel() * sample_bytes > len(samples) * _WORTH_A_CALL:
            replicas = torch.split(order // batch.shape[1], counts.tolist())
            total = _by_sample(factors, x, samples, replicas)
        else:
            total = _by_replica(factors, x, batch)
        return total / batch.shape[1]

    def advance(self) -> Tensor:
        """Take a step on the next batch, and return the batch ``(count, B)``."""
        batch, step, (x, buffer) = self.draw(), self.step, self.state
        gradient = step.lr * (self.gradients(batch) + step.weight_decay * x)
        buffer = step.momentum * buffer + step.gain * gradient
        update = gradient + step.momentum * buffer if step.nesterov else buffer
        self.state = torch.stack([x - update, buffer if step.momentum else torch.zeros_like(x)])
        return batch


def _by_sample(factors: Tensor, x: Tensor, samples: Tensor, replicas: Sequence[Tensor]) -> Tensor:
    """Return each replica's sum of gradients by a loop over samples.

    ``replicas`` holds the indices of the replicas that drew each sample. Each sample's factors are
    read once, without a copy.
    """
    total = torch.zeros_like(x)
    for sample, drawn_by in zip(samples.tolist(), replicas, strict=True):
        rows = factors[sample]
        total.index_add_(0, drawn_by, (x[drawn_by] @ rows.mT) @ rows)
    return total


def _by_replica(factors: Tensor, x: Tensor, batch: Tensor) -> Tensor:
    """Return each replica's sum of gradients from gathered factors of its batch.

    It takes few kernel calls, but four times the memory traffic.
    """
    batch_bytes = batch.shape[1] * factors[0].numel() * factors.element_size()
    chunk = max(1, _BYTES // batch_bytes)
    sums = []
    for samples, x_chunk in zip(torch.split(batch, chunk), torch.split(x, chunk), strict=True):
        rows = factors[samples].flatten(1, 2)  # (replicas, B C, r)
        sums.append((rows.mT @ (rows @ x_chunk.unsqueeze(2))).squeeze(2))
    return torch.cat(sums)
