"""Access to torch internals that have no public counterpart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

__all__ = ["eager", "in_backward", "vmap_size"]


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


def vmap_size(tensor: Tensor) -> int:
    """Return over how many slices ``torch.vmap`` maps ``tensor``: its shape does not show them.

    >>> sizes = []
    >>> _ = torch.vmap(lambda row: sizes.append(vmap_size(row)) or row)(torch.zeros(5, 2))
    >>> sizes, vmap_size(torch.zeros(5, 2))
    ([5], 1)
    """
    functorch, size = torch._C._functorch, 1
    while functorch.is_functorch_wrapped_tensor(tensor):
        inner = functorch.get_unwrapped(tensor)
        if functorch.is_batchedtensor(tensor):
            size *= inner.shape[functorch.maybe_get_bdim(tensor)]
        tensor = inner
    return size
