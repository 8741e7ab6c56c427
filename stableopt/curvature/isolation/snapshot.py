"""What modules hold beside parameters and buffers, put back after a forward pass has changed it.

A forward pass may assign attributes, append to lists, count in dictionaries, write to tensors that are
no buffers, register buffers, or draw from a generator of its own. :class:`Kept` notes all of that, as
deep as lists, tuples and dictionaries go, and puts it back in place. What other objects hold is not
looked at.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Kept"]


class Kept:
    """A note of what is in ``attributes``, dictionaries of names and values, and below.

    ``swapped`` are tensors to leave alone, since others stand in their place in a forward pass.

    >>> attributes = {"seen": [1], "count": torch.zeros(())}
    >>> kept = Kept([attributes])
    >>> attributes["seen"].append(2), attributes["count"].add_(1), attributes.update(more=3)
    (None, tensor(1.), None)
    >>> kept.restore()
    >>> attributes
    {'seen': [1], 'count': tensor(0.)}
    """

    def __init__(
        self, attributes: Iterable[dict[str, Any]], swapped: Iterable[Tensor] = ()
    ) -> None:
        self._backs: list[Callable[[], None]] = []
        self._known: dict[int, Any] = {id(tensor): tensor for tensor in swapped}
        for each in attributes:
            self._note(each)

    def restore(self) -> None:
        """Put everything back."""
        for back in self._backs:
            back()

    def _note(self, value: Any) -> None:
        if type(value) in _PLAIN or id(value) in self._known or _apart(value):
            return
        self._known[id(value)] = value  # held, or its address would be used again
        back = _way_back(value)
        if back is not None:
            self._backs.append(back)
        for inner in _inside(value):
            self._note(inner)


_PLAIN = frozenset((bool, int, float, str, bytes, type(None)))
"""What cannot change in place."""


def _apart(value: Any) -> bool:
    """Return whether ``value`` is noted by itself, or swapped for another."""
    # Whether something is a Parameter takes long to ask, and most of it is no tensor.
    return isinstance(value, nn.Module) or (
        isinstance(value, Tensor) and isinstance(value, nn.Parameter)
    )


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, MutableMapping):
        return list(value.values())
    return value if isinstance(value, (list, tuple, deque)) else ()


def _way_back(value: Any) -> Callable[[], None] | None:
    """Return what puts ``value`` back to what it holds now."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else _tensor_back(value)
    if isinstance(value, MutableMapping):
        return _mapping_back(value)
    if isinstance(value, (list, deque)):
        return _sequence_back(value)
    if isinstance(value, set):
        return _set_back(value)
    if isinstance(value, torch.Generator):
        return _generator_back(value)
    # Not a file that is mapped, which may be larger than the memory.
    if type(value) is np.ndarray and value.flags.writeable:
        elements = value.copy()
        return lambda: np.copyto(value, elements)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator.state
        return lambda: setattr(value.bit_generator, "state", bits)
    if isinstance(value, random.Random):
        inner = value.getstate()
        return lambda: value.setstate(inner)
    return None


def _tensor_back(value: Tensor) -> Callable[[], None]:
    version, content = value._version, value.detach().clone()
    # Writing by ``data`` moves no version: it neither shows, nor spoils a graph that is to be used.
    own = value.layout == torch.strided and 0 not in value.stride()

    def back() -> None:
        if value._version != version:
            value.detach().copy_(content)
        elif own:
            value.data.copy_(content)

    return back


def _mapping_back(value: MutableMapping[Any, Any]) -> Callable[[], None]:
    items = dict(value)

    def back() -> None:
        # In their order too: that of a module's children is what it does.
        if list(value) != list(items) or any(value[k] is not v for k, v in items.items()):
            value.clear()
            value.update(items)

    return back


def _set_back(value: set[Any]) -> Callable[[], None]:
    members = set(value)

    def back() -> None:
        value.clear()
        value.update(members)

    return back


def _generator_back(value: torch.Generator) -> Callable[[], None]:
    state = value.get_state()

    def back() -> None:
        value.set_state(state)

    return back


def _sequence_back(value: list[Any] | deque[Any]) -> Callable[[], None]:
    items = list(value)

    def back() -> None:
        if len(value) != len(items) or any(a is not b for a, b in zip(value, items, strict=True)):
            value.clear()
            value.extend(items)

    return back
