"""Losses that draw random numbers, as of diffusion models, VAEs and masking: one fixed draw."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stableopt.curvature.isolation.reachable import generator_states

__all__ = ["RANDOM", "draws", "fix_draw", "noisy_mean"]

_DRAWS = 16
"""Draws in the average that tells a random mean from a random sum."""

_A_SUM = 1.5
"""Ratio of the losses of a batch twice over and of the batch that excludes a mean: that of a sum is 2.
The noise of 16 averaged draws must stay below half of the loss."""

_NOISY = 0.05
"""Standard deviation over draws, relative to the loss, from which the draw matters: as much as excludes
a mean where a loss draws nothing."""

_SEED = 0
"""Any constant: every evaluation must draw the same random numbers."""

RANDOM = (
    "loss_fn draws random numbers, and its noise is not a sample's own: put the noise into the batch, as"
    ' in Problem.from_batch_loss(model, loss, {"x": x, "noise": noise})'
)


def draws(evaluate: Callable[[], Any], generators: Iterable[Any]) -> bool:
    """Return whether ``evaluate`` moves a generator of the process, or one of ``generators``."""
    before = generator_states(generators)
    evaluate()
    return generator_states(generators) != before


def noisy_mean(
    loss: Callable[[Any], Tensor], batch: Any, twice: Any, generators: Iterable[Any]
) -> bool:
    """Return whether ``loss`` is a mean that depends on random numbers, and say so.

    Args:
        loss: the loss of a batch, which does not start from a fixed draw.
        batch: a batch.
        twice: the batch twice over.
        generators: those of the loss itself.

    Raises:
        ValueError: if the loss is random, and the average of ``twice`` far from that of ``batch``.
    """
    if not draws(lambda: loss(batch), generators):
        return False
    once, double = (
        torch.stack([loss(each).detach().double() for _ in range(_DRAWS)])
        for each in (batch, twice)
    )
    average, doubled = float(once.mean()), float(double.mean())
    if not float(once.std()) > _NOISY * abs(average):
        return False
    if abs(doubled) > _A_SUM * abs(average):
        raise ValueError(
            f"loss_fn is not a mean over samples: over {_DRAWS} random draws a batch has loss"
            f" {average:.6g} on average, the same batch twice over {doubled:.6g}; expected the same"
            " (reduction='mean')"
        )
    warnings.warn(
        "loss_fn draws random numbers: a measurement repeats one draw, the same for each chunk. Its"
        " sharpness is that of the loss with this draw. Quantities of single samples need the noise in"
        " the batch",
        stacklevel=2,
    )
    return True


def fix_draw(device: torch.device, generators: Iterable[Any]) -> None:
    """Seed every generator; call it inside an isolated evaluation, which puts them back."""
    torch.default_generator.manual_seed(_SEED)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(_SEED)
    random.seed(_SEED)
    np.random.seed(_SEED)  # noqa: NPY002
    for generator in generators:
        if isinstance(generator, torch.Generator):
            generator.manual_seed(_SEED)
        elif isinstance(generator, (random.Random, np.random.RandomState)):
            generator.seed(_SEED)
        else:
            bits = getattr(generator, "bit_generator", generator)
            bits.state = type(bits)(_SEED).state
