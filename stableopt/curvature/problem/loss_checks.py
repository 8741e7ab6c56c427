"""What a loss must be to be measured: a real scalar, a mean over samples, the same on all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stableopt.distributed import Ranks

__all__ = [
    "CHECKED_SAMPLES",
    "check_mean",
    "check_replicas",
    "checked_scalar",
    "checked_weights",
    "twice_over",
]

_NOT_A_MEAN = 0.05
"""Relative change of the loss under doubling of the batch that no mean shows: a sum changes by 1,
rounding by 1e-3 at the worst (a loss of 1e-6 in float32)."""

_UNEQUAL = 0.02
"""Relative difference between the loss of a batch and the mean of its samples' that is more than
rounding, or the noise of a model that draws random numbers."""

_REPLICAS = 1e-3
"""Difference of a projection of the parameters, relative to their norm, that no rounding brings about
between replicas; other parameters differ by about 1."""


def checked_scalar(loss: Any) -> Tensor:
    """Return ``loss``, or raise unless it is a real scalar."""
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss_fn returned {type(loss).__name__}: expected a scalar tensor")
    if loss.dim() != 0:
        raise ValueError(
            f"loss_fn returned shape {tuple(loss.shape)}: expected a scalar, the mean over the batch"
            " (reduction='mean')"
        )
    if loss.is_complex():
        raise TypeError(f"loss_fn returned {loss.dtype}: expected a real scalar")
    return loss


def check_mean(once: float, twice: float) -> None:
    """Raise ``ValueError`` if the losses of a batch, and of it twice over, are not those of a mean."""
    # Near zero both are rounding; a non-finite loss is for the measurement to report.
    if not abs(once) > 1e-6 or not abs(twice) < float("inf"):
        return
    if abs(twice - once) > _NOT_A_MEAN * abs(once):
        hint = " (a sum: use reduction='mean')" if abs(twice - 2 * once) < 0.1 * abs(once) else ""
        raise ValueError(
            f"loss_fn is not a mean over samples{hint}: a batch has loss {once:.6g}, the same batch"
            f" twice over {twice:.6g}; expected the same"
        )


def checked_weights(together: float, apart: float) -> bool:
    """Whether the loss of a batch is the mean of its samples' losses; warn where it is not."""
    if not 1e-6 < abs(together) < float("inf"):
        return True
    # A sample that is ignored altogether has a loss of its own that is not a number.
    equal = abs(together - apart) <= _UNEQUAL * abs(together)
    if not equal:
        warnings.warn(
            f"loss_fn weighs samples unequally: a batch has loss {together:.6g}, its samples by"
            f" themselves {apart:.6g} on average (class weights, ignored targets, or samples that"
            " see each other). Sharpness is then that of the mean over chunks, and non-uniformity"
            " that of samples by themselves",
            stacklevel=4,
        )
    return equal


def check_replicas(ranks: Ranks, params: Sequence[Tensor]) -> None:
    """Raise ``ValueError`` on every rank unless all have the same parameters, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    shown = square = 0.0
    for p in params:
        value = p.detach().double().cpu()
        shown += float((value * torch.randn(p.shape, generator=generator)).sum())
        square += float(value.square().sum())
    size = sum(p.numel() for p in params)
    shown_by_all, sizes = zip(*ranks.all_gather_object((shown, size)), strict=True)
    differs = abs(shown - sum(shown_by_all) / ranks.size) > _REPLICAS * square**0.5
    if ranks.any(differs or set(sizes) != {size}):
        raise ValueError(
            "model: its parameters are not the same on all ranks of process_group: expected replicas,"
            " as DistributedDataParallel keeps them"
        )


CHECKED_SAMPLES = 8
"""Samples that the constructor tries the loss on: enough to tell a mean from a sum."""


def twice_over(tensor: Tensor) -> Tensor:
    """Return the samples and the samples again."""
    return torch.cat([tensor, tensor]) if tensor.dim() else tensor
