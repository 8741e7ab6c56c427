"""`InDouble`: a context that evaluates a model in double precision throughout.

After a cast of its parameters and inputs, a model may still cast to single precision inside, as many
normalisation layers do, or hold single-precision tensors out of reach of the cast. Inside this context
both become double.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

__all__ = ["InDouble"]


_DOUBLE = {torch.float32: torch.float64, torch.complex64: torch.complex128}


def _doubled(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _DOUBLE.get(value, value)
    if isinstance(value, Tensor) and value.dtype in _DOUBLE:
        return value.to(_DOUBLE[value.dtype])
    return value


class InDouble(TorchFunctionMode):
    """Context in which torch's functions use double precision instead of single precision.

    >>> with InDouble():
    ...     (torch.ones(2).double().float() / 3).dtype
    torch.float64
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call ``function`` with double precision instead of single."""
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if function is Tensor.float:
            function = Tensor.double
        elif name == "_grouped_mm":
            return _grouped_product(*tree_map(_doubled, args), **tree_map(_doubled, kwargs))
        elif name == "cfloat":
            return args[0].to(torch.complex128)
        elif name in ("__get__", "__set__"):
            return function(*args, **kwargs)
        elif _writes(function):
            # The written tensor must not be replaced by a copy.
            args = (args[0], *tree_map(_doubled, args[1:]))
            return function(*args, **tree_map(_doubled, kwargs))
        result = function(*tree_map(_doubled, args), **tree_map(_doubled, kwargs))
        return _doubled(result)


def _grouped_product(rows: Tensor, matrices: Tensor, offs: Tensor, **others: Any) -> Tensor:
    """Return ``torch.nn.functional.grouped_mm``, which has no kernel in double precision."""
    if rows.dim() != 2 or matrices.dim() != 3 or others.get("bias") is not None:
        raise RuntimeError(  # like torch, for a combination without a kernel
            "grouped_mm in double precision: expected 2-d rows, a 3-d stack of matrices, and no bias"
        )
    parts, start = [], 0
    for stop, matrix in zip(offs.tolist(), matrices, strict=True):
        parts.append(rows[start:stop] @ matrix)
        start = stop
    # Rows after the last group belong to no group.
    return torch.cat([*parts, rows.new_zeros(len(rows) - start, matrices.shape[-1])])


def _writes(function: Any) -> bool:
    name = getattr(function, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
