r"""`Replicas`: copies of the linear dynamics of SGD near a minimum.

Near a minimum at which all samples are fitted, SGD is :math:`x \mapsto (I-\eta H_B)x` with the Hessian
:math:`H_B` of a random batch B, or the same with momentum. Each replica follows it with batches of its
own, in the eigenbasis of the mean curvature, in which H is diagonal.
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
"""Size of the samples' factors that are gathered at once: a few of the processor's caches."""

_WORTH_A_CALL = 1 << 15
"""Bytes of factors whose copying takes as long as the calls for one sample, measured on a CPU."""


class Replicas:
    """Copies of the linear dynamics, and the orders in which they draw their samples.

    Args:
        modes: the samples' curvature, ``(n, C, r)``.
        step: plain SGD, or with momentum, dampening, Nesterov's momentum and coupled weight decay.
        batch_size: samples B in a step.
        count: of copies.
        seed: of the start and the orders.

    Attributes:
        state: the parameter, and the momentum's buffer times the learning rate, ``(2, count, r)``.
        rest: the samples that each copy has yet to draw in its epoch, ``(count, samples left)``.

    Raises:
        ValueError: for a batch size, a count or a seed out of range, and for other steps.
    """

    def __init__(
        self, modes: Modes, step: LinearStep, batch_size: int, count: int, seed: int
    ) -> None:
        n, _, r = modes.factors.shape
        if step.filter or step.decoupled_weight_decay or step.momentum_share != 1:
            raise ValueError(
                f"step={step}: expected one without filter, decoupled_weight_decay, momentum_share"
            )
        self.modes, self.step = modes, step
        self.batch_size = whole("batch_size", batch_size)
        if self.batch_size > n:
            raise ValueError(f"batch_size={batch_size} is above the {n} samples")
        self.count = whole("replicas", count, least=8)  # fewer do not know their own spread
        device = modes.factors.device
        self._dice = torch.Generator(device).manual_seed(whole("seed", seed, least=0))
        self._like: dict[str, Any] = {"generator": self._dice, "device": device}
        self.state = torch.zeros(2, self.count, r, dtype=torch.float64, device=device)
        self.state[0] = torch.randn(self.count, r, dtype=torch.float64, **self._like)
        self.state /= self.state[0].norm(dim=1, keepdim=True)
        self.rest = self.uniform(self.count, 0).long()

    def uniform(self, *shape: int) -> Tensor:
        """Return random numbers between 0 and 1."""
        return torch.rand(*shape, **self._like)

    def reshuffle(self) -> None:
        """Begin an epoch: each copy has all samples to draw, in an order of its own."""
        self.rest = self.uniform(self.count, self.modes.factors.shape[0]).argsort(1)

    def draw(self) -> Tensor:
        """Return each copy's next batch, ``(count, B)``; the last one of an epoch may be smaller."""
        own, self.rest = self.rest[:, : self.batch_size], self.rest[:, self.batch_size :]
        return own

    def gradients(self, own: Tensor) -> Tensor:
        """Return each copy's gradient of the batch with the samples ``own``, ``(count, r)``."""
        factors, x = self.modes.factors, self.state[0]
        drawn, order = own.flatten().sort(stable=True)
        samples, times = torch.unique_consecutive(drawn, return_counts=True)
        bytes_each = factors[0].numel() * factors.element_size()
        if own.numel() * bytes_each > len(samples) * _WORTH_A_CALL:
            copies = torch.split(order // own.shape[1], times.tolist())
            total = _by_sample(factors, x, samples, copies)
        else:
            total = _by_copy(factors, x, own)
        return total / own.shape[1]

    def advance(self) -> None:
        """Take a step with the next batch."""
        step, (x, buffer) = self.step, self.state
        gradient = step.lr * (self.gradients(self.draw()) + step.weight_decay * x)
        buffer = step.momentum * buffer + step.gain * gradient
        update = gradient + step.momentum * buffer if step.nesterov else buffer
        self.state = torch.stack([x - update, buffer if step.momentum else torch.zeros_like(x)])


def _by_sample(factors: Tensor, x: Tensor, samples: Tensor, copies: Sequence[Tensor]) -> Tensor:
    """Return each copy's sum of gradients: for each sample, those of the copies that drew it.

    The factors are read in place, once for all copies.
    """
    total = torch.zeros_like(x)
    for sample, mine in zip(samples.tolist(), copies, strict=True):
        rows = factors[sample]
        total.index_add_(0, mine, (x[mine] @ rows.mT) @ rows)
    return total


def _by_copy(factors: Tensor, x: Tensor, own: Tensor) -> Tensor:
    """Return the same from the factors of all samples that a copy drew, gathered for many copies.

    It takes few calls, but four times the memory traffic.
    """
    bytes_each = own.shape[1] * factors[0].numel() * factors.element_size()
    at_once = max(1, _BYTES // bytes_each)
    parts = []
    for mine, here in zip(torch.split(own, at_once), torch.split(x, at_once), strict=True):
        rows = factors[mine].flatten(1, 2)  # (copies, B C, r)
        parts.append((rows.mT @ (rows @ here.unsqueeze(2))).squeeze(2))
    return torch.cat(parts)
