"""Scaled coordinates of a problem: checks and products of the factors."""

from __future__ import annotations

import torch
from torch import Tensor


def _checked_scale(name: str, factor: Tensor | float, shape: torch.Size) -> Tensor | float:
    if not isinstance(factor, Tensor):
        return float(factor)
    if factor.shape != shape:
        raise ValueError(
            f"scale of {name!r} has shape {tuple(factor.shape)}: expected {tuple(shape)}, or a number"
        )
    return factor.detach()


def _scaled(tensor: Tensor, factor: Tensor | float) -> Tensor:
    return tensor if isinstance(factor, float) and factor == 1.0 else tensor * factor
