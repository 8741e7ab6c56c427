"""`ReaderRegistry`: finds the function that reads the update rule of an optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

__all__ = ["ReaderRegistry", "base_optimizer"]

Rule = TypeVar("Rule")

_WRAPPERS = {
    "accelerate.optimizer.AcceleratedOptimizer",
    "lightning.pytorch.core.optimizer.LightningOptimizer",
    "pytorch_lightning.core.optimizer.LightningOptimizer",
}
"""Classes that only forward ``step`` to their ``optimizer``. Others with an ``optimizer``, such as
Lookahead, change the step."""


class ReaderRegistry(Generic[Rule]):
    """Readers by optimizer class, which may be a string of its module and qualified name.

    A reader is a function of an optimizer that returns its rule.

    Attributes:
        joint: the reader of several optimizers together.

    >>> registry = ReaderRegistry[str]()
    >>> registry.register("torch.optim.sgd.SGD", lambda optimizer: "the rule")  # by its name
    >>> base, reader = registry.find(torch.optim.SGD)
    >>> base, reader(None)
    (<class 'torch.optim.sgd.SGD'>, 'the rule')
    """

    def __init__(self) -> None:
        self._readers: dict[type | str, Callable[[Any], Rule]] = {}
        self.joint: Callable[[Any], Rule] | None = None

    def register(self, kind: type | str, reader: Callable[[Any], Rule]) -> None:
        """Register ``reader`` for class ``kind``, and subclasses that keep its ``step``."""
        if not isinstance(kind, (type, str)):
            raise TypeError(
                f"kind={kind!r}: expected a class, or a string of its module and qualified name"
            )
        self._readers[kind] = reader

    def remove(self, kind: type | str) -> None:
        """Remove the reader of ``kind``."""
        del self._readers[kind]

    def find(self, kind: type) -> tuple[type | None, Callable[[Any], Rule] | None]:
        """Return the first base of ``kind`` with a reader for its ``step``, and the reader.

        If ``kind`` overrides ``step``, the reader is ``None``, and the base is the first with a reader.
        """
        overridden = None
        for base, name in zip(kind.__mro__, _qualified_names(kind), strict=True):
            reader = self._readers.get(base) or self._readers.get(name)
            if reader is None:
                continue
            if _step_function(base) is _step_function(kind):
                return base, reader
            overridden = overridden or base
        return overridden, None


def base_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return the optimizer inside Accelerate's and Lightning's wrappers, which lack step hooks."""
    while not _WRAPPERS.isdisjoint(_qualified_names(type(optimizer))):
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    return optimizer


def _qualified_names(kind: type) -> list[str]:
    return [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]


def _step_function(kind: type) -> Any:
    """Return the function ``step`` of a class, without torch's wrappers around it."""
    return inspect.unwrap(getattr(kind, "step", None))  # type: ignore[arg-type]
