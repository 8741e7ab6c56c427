"""What the graph of a tensor shows: custom functions, functions with kinks, and missing derivatives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from stableopt.curvature.isolation.cross_entropy import OWN

__all__ = ["HooksSeen", "has_custom_function", "has_kinks", "lacks_derivative", "nodes_of"]

_KINKS = re.compile(
    r"[Rr]elu|Threshold|Hardtanh|Hardswish|Hardsigmoid|Hardshrink|Softshrink|Clamp|Abs"
    r"|Max|Min|Amax|Amin|Median|Sort|Topk|Kthvalue|Remainder|Fmod"
)
"""Functions of torch's whose derivative jumps, by the names of their nodes."""


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
    # It raises only when it is reached, and a search for particular leaves avoids it: their second
    # derivative would silently lack a part.
    return any(node.name() == "torch::autograd::Error" for node in nodes_of(*tensors))


def has_custom_function(*tensors: Tensor | None) -> bool:
    """Return whether the graphs hold a function that neither torch nor this library defines.

    >>> has_custom_function(torch.ones(2, requires_grad=True).exp())
    False
    """
    return any(
        (
            issubclass(type(node), torch.autograd.function.BackwardCFunction)
            and getattr(node, "_forward_cls", None) not in OWN
        )
        or "CppNode" in node.name()
        for node in nodes_of(*tensors)
    )


def has_kinks(*tensors: Tensor | None) -> bool:
    """Return whether the graphs hold a function whose derivative jumps.

    >>> x = torch.ones(2, requires_grad=True)
    >>> has_kinks(x.tanh()), has_kinks(x.relu())
    (False, True)
    """
    return any(_KINKS.search(node.name()) for node in nodes_of(*tensors))


class HooksSeen(TorchFunctionMode):
    """Calls ``note`` when a hook is put on a tensor that it may replace the gradient of."""

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
