"""Losses with random numbers (diffusion models, VAEs, masking): detection, and one fixed draw."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stableopt.curvature.isolation.reachable import generator_states

__all__ = ["RANDOM", "depends_on_draws", "draws_random_numbers", "fix_draw"]

_DRAWS = 16
"""Draws that are averaged to distinguish a random mean from a random sum."""

_SUM_RATIO = 1.5
"""Ratio of a doubled batch's loss to the batch's loss above which it is not a mean; that of a sum is 2.
The noise of 16 averaged draws must stay below half of the loss."""

_NOISY = 0.05
"""Standard deviation over draws, relative to the loss, above which the draw matters: the tolerance of
the test for a mean without random numbers."""

_SEED = 0
"""Any constant: every evaluation must draw the same random numbers."""

RANDOM = (
    "loss_fn draws random numbers, and its noise is not a sample's own: put the noise into the batch, as"
    ' in Problem.from_batch_loss(model, loss, {"x": x, "noise": noise})'
)


def draws_random_numbers(evaluate: Callable[[], Any], generators: Iterable[Any]) -> bool:
    """Return whether ``evaluate`` draws from a generator of the process, or one of ``generators``."""
    before = generator_states(generators)
    evaluate()
    return generator_states(generators) != before


def depends_on_draws(
    loss: Callable[[Any], Tensor], batch: Any, twice: Any, generators: Iterable[Any]
) -> bool:
    """Return whether ``loss`` depends noticeably on random numbers; warn if so.

    Args:
        loss: the loss of a batch, with new random numbers in each call.
        batch: a batch.
        twice: the batch twice over.
        generators: the loss's own generators.

    Raises:
        ValueError: if the loss is random, and its average on ``twice`` is not that on ``batch``.
    """
    if not draws_random_numbers(lambda: loss(batch), generators):
        return False
    losses = torch.stack([loss(batch).detach().double() for _ in range(_DRAWS)])
    doubled_losses = torch.stack([loss(twice).detach().double() for _ in range(_DRAWS)])
    average, doubled_average = float(losses.mean()), float(doubled_losses.mean())
    if not float(losses.std()) > _NOISY * abs(average):
        return False
    if abs(doubled_average) > _SUM_RATIO * abs(average):
        raise ValueError(
            f"loss_fn is not a mean over samples: over {_DRAWS} random draws a batch has loss"
            f" {average:.6g} on average, the same batch twice over {doubled_average:.6g}; expected the"
            " same (reduction='mean')"
        )
    warnings.warn(
        "loss_fn draws random numbers: a measurement repeats one draw, the same for each chunk, and the"
        " sharpness is that of the loss with this draw. For per-sample quantities, put the noise into"
        " the batch",
        stacklevel=2,
    )
    return True


def fix_draw(device: torch.device, generators: Iterable[Any]) -> None:
    """Seed every generator. Call it inside an isolated evaluation, which restores them."""
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
