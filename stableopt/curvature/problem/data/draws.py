"""Losses with random numbers (diffusion models, VAEs, masking): detection, and a fixed draw a chunk."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stableopt.curvature.isolation.reachable import generator_states
from stableopt.curvature.problem.data.batches import tensors_in

__all__ = ["RANDOM", "depends_on_draws", "draws_random_numbers", "fix_draw", "seed_of"]

_DRAWS = 16
"""Draws that are averaged to distinguish a random mean from a random sum."""

_SUM_RATIO = 1.5
"""Ratio of a doubled batch's loss to the batch's loss above which it is not a mean: a sum has 2."""

_ERRORS = 4.0
"""Standard errors by which the two averages must differ: the loss of a critic is close to zero."""

_NOISY = 1e-5
"""Standard deviation over draws, relative to the loss, above which the draw matters: above the rounding
of sums in another order. A denoiser that starts at zero varies by a percent, later by a third."""

RANDOM = (
    "loss_fn draws random numbers that do not belong to single samples: put the noise into the batch, as"
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
    error = float(losses.var() + doubled_losses.var()) ** 0.5 / _DRAWS**0.5
    differ = abs(doubled_average - average) > _ERRORS * error
    if differ and abs(doubled_average) > _SUM_RATIO * abs(average):
        raise ValueError(
            f"loss_fn is not a mean over samples: over {_DRAWS} random draws a batch has loss"
            f" {average:.6g} on average, the same batch twice over {doubled_average:.6g}; expected the"
            " same (reduction='mean')"
        )
    warnings.warn(
        "loss_fn draws random numbers: a measurement repeats one draw of each chunk, and the sharpness"
        " is that of the loss with this draw. For per-sample quantities, put the noise into the batch",
        stacklevel=2,
    )
    return True


def seed_of(batch: Any) -> int:
    """Return a seed that depends on the content of ``batch``, so that each chunk has its own draw.

    >>> seed_of(torch.ones(3)) == seed_of(torch.ones(3)) != seed_of(2 * torch.ones(3))
    True
    """
    total = 0
    for tensor in tensors_in(batch):
        if tensor.layout is torch.strided and not tensor.is_nested:
            # A copy, since a part of a batch may begin at an odd byte.
            copied = tensor.detach().clone(memory_format=torch.contiguous_format)
            content = copied.reshape(-1).view(torch.uint8)
            numbers = content if len(content) % 4 else content.view(torch.int32)
            total += int(numbers.sum(dtype=torch.int64))
    return total % 2**32  # the range of NumPy's seeds


def fix_draw(seed: int, device: torch.device, generators: Iterable[Any]) -> None:
    """Seed every generator. Call it inside an isolated evaluation, which restores them."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        getattr(torch, device.type).manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    for generator in generators:
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
        elif isinstance(generator, (random.Random, np.random.RandomState)):
            generator.seed(seed)
        else:
            bits = getattr(generator, "bit_generator", generator)
            bits.state = type(bits)(seed).state
