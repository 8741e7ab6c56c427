"""`InDouble`: evaluate a function in double precision throughout.

A model whose parameters and inputs are cast to double precision may still cast to single precision
inside, as many normalisation layers do, or hold tensors in single precision that no cast reaches.
Inside this context both become double.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = ["InDouble"]


def _doubled(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.double()
    return value


class InDouble(TorchFunctionMode):
    """Torch's functions with double precision wherever single precision is given or asked for.

    >>> with InDouble():
    ...     (torch.ones(2).double().float() / 3).dtype
    torch.float64
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call ``function`` with double precision instead of single."""
        kwargs = kwargs or {}
        if function is Tensor.float:
            function = Tensor.double
        elif getattr(function, "__name__", "") in ("__get__", "__set__"):
            return function(*args, **kwargs)
        elif _writes(function):
            # The tensor that is written to stays itself.
            args = (args[0], *tree_map(_doubled, args[1:]))
            return function(*args, **tree_map(_doubled, kwargs))
        result = function(*tree_map(_doubled, args), **tree_map(_doubled, kwargs))
        return _doubled(result)


def _writes(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
