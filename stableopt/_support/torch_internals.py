"""Access to torch internals that have no public counterpart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

__all__ = ["eager", "in_backward"]


_Function = TypeVar("_Function", bound=Callable[..., Any])


def eager(function: _Function) -> _Function:
    """Keep ``function`` out of compiled graphs, as torch.optim does with its own helpers.

    The public ``torch.compiler.disable`` would import the whole compiler here.
    """
    return cast("_Function", torch._disable_dynamo(function))  # type: ignore[attr-defined]


def in_backward() -> bool:
    """Return whether the caller runs inside a backward pass, as recomputed forward passes do.

    >>> in_backward()
    False
    """
    return bool(torch._C._current_graph_task_id() != -1)
