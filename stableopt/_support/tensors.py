"""`as_tensor`: numbers as tensors, under any default device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["as_tensor"]


def as_tensor(
    value: Any, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
) -> Tensor:
    """Return a tensor on its own device, and a number on ``device``.

    ``torch.as_tensor`` moves both to the default device if there is one.

    >>> as_tensor(2.0), as_tensor(torch.ones(2), dtype=torch.float64)
    (tensor(2.), tensor([1., 1.], dtype=torch.float64))
    """
    if isinstance(value, Tensor):
        return value if dtype is None else value.to(dtype)
    return torch.as_tensor(value, dtype=dtype, device="cpu").to(device)
