"""`Snapshot`: snapshot and restore of module state other than parameters and buffers.

A forward pass may assign attributes, append to lists, count in dictionaries, write to plain tensors,
register buffers, or draw from a generator of its own. A :class:`Snapshot` records all of that in nested
lists, tuples and dictionaries, and restores it in place. It does not look into other objects.
"""

from __future__ import annotations

import random
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, MutableMapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["PLAIN", "Snapshot", "restorer"]


class Snapshot:
    """A snapshot of ``attributes``, dictionaries of names and values, and of the values they contain.

    ``swapped`` are tensors that a functional call replaces by others; they are not recorded.

    >>> attributes = {"seen": [1], "count": torch.zeros(())}
    >>> snapshot = Snapshot([attributes])
    >>> attributes["seen"].append(2), attributes["count"].add_(1), attributes.update(more=3)
    (None, tensor(1.), None)
    >>> snapshot.restore()
    >>> attributes
    {'seen': [1], 'count': tensor(0.)}
    """

    def __init__(
        self, attributes: Iterable[dict[str, Any]], swapped: Iterable[Tensor] = ()
    ) -> None:
        self._restorers: list[Callable[[], object]] = []
        self._empty: list[MutableMapping[Any, Any]] = []
        self._seen: dict[int, Any] = {id(tensor): tensor for tensor in swapped}
        for each in attributes:
            self._record(each)

    def restore(self) -> None:
        """Restore everything in place."""
        for restore in self._restorers:
            restore()
        for mapping in self._empty:
            if mapping:
                mapping.clear()

    def _record(self, value: Any) -> None:
        if type(value) in PLAIN or id(value) in self._seen or _skipped(value):
            return
        self._seen[id(value)] = value  # a reference, so that the id is not reused
        if type(value) in (dict, OrderedDict) and not value:
            # A module has a dozen empty dictionaries of hooks; clearing is faster than comparing.
            self._empty.append(value)
            return
        restore = restorer(value)
        if restore is not None:
            self._restorers.append(restore)
        for inner in _contained_values(value):
            self._record(inner)


PLAIN = frozenset((bool, int, float, str, bytes, type(None)))
"""Types that cannot change in place."""


def _skipped(value: Any) -> bool:
    """Return whether ``value`` is a module, which is recorded separately, or a parameter."""
    # The test for a Parameter is slow, and most values are not tensors.
    return isinstance(value, nn.Module) or (
        isinstance(value, Tensor) and isinstance(value, nn.Parameter)
    )


def _contained_values(value: Any) -> Iterable[Any]:
    if isinstance(value, MutableMapping):
        return list(value.values())
    return value if isinstance(value, (list, tuple, deque)) else ()


def restorer(value: Any) -> Callable[[], object] | None:
    """Return a function that restores the present contents of ``value``, or ``None`` for other types."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else _tensor_restorer(value)
    if isinstance(value, MutableMapping):
        return _mapping_restorer(value)
    if isinstance(value, (list, deque)):
        return _sequence_restorer(value)
    if isinstance(value, set):
        return _set_restorer(value)
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    # The exact type excludes memory-mapped files, which may be larger than the memory.
    if type(value) is np.ndarray and value.flags.writeable:
        return partial(np.copyto, value, value.copy())
    if isinstance(value, np.random.Generator):
        value = value.bit_generator
    if isinstance(value, np.random.BitGenerator):
        return partial(setattr, value, "state", value.state)
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state(legacy=False))
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    return None


def _tensor_restorer(value: Tensor) -> Callable[[], None]:
    version, content = value._version, value.detach().clone()
    # A write through ``data`` does not change the version counter, so it invalidates no graph.
    writable = value.layout == torch.strided and 0 not in value.stride()

    def restore() -> None:
        if value._version != version:
            value.detach().copy_(content)
        elif writable:
            value.data.copy_(content)

    return restore


def _mapping_restorer(value: MutableMapping[Any, Any]) -> Callable[[], None]:
    items = dict(value)

    def restore() -> None:
        # The order matters, since a container runs its children in order.
        if list(value) != list(items) or any(value[k] is not v for k, v in items.items()):
            value.clear()
            value.update(items)

    return restore


def _set_restorer(value: set[Any]) -> Callable[[], None]:
    members = set(value)

    def restore() -> None:
        value.clear()
        value.update(members)

    return restore


def _sequence_restorer(value: list[Any] | deque[Any]) -> Callable[[], None]:
    items = list(value)

    def restore() -> None:
        if len(value) != len(items) or any(a is not b for a, b in zip(value, items, strict=True)):
            value.clear()
            value.extend(items)

    return restore
