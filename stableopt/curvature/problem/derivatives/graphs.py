"""Inspection of autograd graphs: custom functions, functions with kinks, missing derivatives, hooks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from stableopt.curvature.isolation.cross_entropy import CUSTOM_FUNCTIONS

__all__ = ["HookWatcher", "has_custom_function", "has_kinks", "lacks_derivative", "nodes_of"]

_KINKS = re.compile(
    r"[Rr]elu|Threshold|Hardtanh|Hardswish|Hardsigmoid|Hardshrink|Softshrink|Clamp|Abs"
    r"|Max|Min|Amax|Amin|Median|Sort|Topk|Kthvalue|Remainder|Fmod"
)
"""Names of the nodes of torch's functions whose derivative jumps."""


def nodes_of(*tensors: Tensor | None) -> Iterator[Node]:
    """Yield each node of the graphs once.

    >>> x = torch.ones(2, requires_grad=True)
    >>> [node.name() for node in nodes_of(x.exp())]
    ['ExpBackward0', 'torch::autograd::AccumulateGrad']
    """
    pending = [t.grad_fn for t in tensors if t is not None]
    seen: set[Node] = set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        yield node
        seen.add(node)
        pending.extend(following for following, _ in node.next_functions)


def lacks_derivative(*tensors: Tensor | None) -> bool:
    """Return whether a part of the graphs is marked ``@once_differentiable``."""
    # Such a node raises only if it is reached. A backward pass to particular leaves may skip it, and
    # their second derivative would silently lack a term.
    return any(node.name() == "torch::autograd::Error" for node in nodes_of(*tensors))


def has_custom_function(*tensors: Tensor | None) -> bool:
    """Return whether the graphs contain a function that neither torch nor this library defines.

    >>> has_custom_function(torch.ones(2, requires_grad=True).exp())
    False
    """
    return any(
        (
            issubclass(type(node), torch.autograd.function.BackwardCFunction)
            and getattr(node, "_forward_cls", None) not in CUSTOM_FUNCTIONS
        )
        or "CppNode" in node.name()
        for node in nodes_of(*tensors)
    )


def has_kinks(*tensors: Tensor | None) -> bool:
    """Return whether the graphs contain a function whose derivative jumps.

    >>> x = torch.ones(2, requires_grad=True)
    >>> has_kinks(x.tanh()), has_kinks(x.relu())
    (False, True)
    """
    return any(_KINKS.search(node.name()) for node in nodes_of(*tensors))


class HookWatcher(TorchFunctionMode):
    """Calls ``note`` when a hook is registered on a tensor, whose gradient it may replace."""

    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Pass the call on."""
        if function is Tensor.register_hook:
            self._note()
        return function(*args, **(kwargs or {}))
