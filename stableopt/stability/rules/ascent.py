"""`note_ascent`, `ascent_norm`: the norm of the gradient before SAM ascends, which SAM does not keep."""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from stableopt.distributed.fsdp import local
from stableopt.stability.rules.gradient_norms import norms_of_gradients

__all__ = ["ascent_norm", "note_ascent"]

_NORMS: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()


def note_ascent(optimizer: Any) -> None:
    """Keep the norm of the gradient before ``optimizer`` ascends, without waiting for the device.

    Under ``fully_shard`` nothing is kept: a rank has only its part of the gradient.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if params and all(local(p) is p for p in params):
        _NORMS[optimizer] = norms_of_gradients(params).norm()


def ascent_norm(optimizer: Any) -> float | None:
    """Return the norm that :func:`note_ascent` kept; ``None`` before, and if it is zero or NaN.

    >>> import torch
    >>> p = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> optimizer = torch.optim.SGD([p])
    >>> (p.square().sum() / 2).backward()
    >>> note_ascent(optimizer)
    >>> ascent_norm(optimizer)
    5.0
    """
    norm = float(_NORMS.get(optimizer, math.nan))
    return norm if norm > 0 else None
