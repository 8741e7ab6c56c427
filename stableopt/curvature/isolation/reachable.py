"""`reachable`: the objects that data or a loss function hold; `HeldState`: a snapshot of their state.

A data set may own a generator, a sampler may count its epochs, and a loss may keep a second network in
its closure. :func:`reachable` finds such objects through attributes, containers, closures, and the
global names that functions use. It does not read properties or search installed packages.
"""

from __future__ import annotations

import functools
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stableopt.curvature.isolation.snapshot import PLAIN, restorer

__all__ = ["GENERATORS", "HeldState", "generator_states", "reachable"]

_MOST_OBJECTS = 20_000
"""Most objects that a search visits, nearest first: far more than hold state, and about 20 ms."""

_MOST_ITEMS = 1_000
"""Most items of a container that a search visits: longer containers hold data."""

_MOST_ELEMENTS = 65_536
"""Most elements of a tensor or an array that counts as state and is copied; larger ones are data."""

_LIBRARIES = frozenset(sys.stdlib_module_names) | {"torch", "numpy", "stableopt"}
"""Packages whose functions hold no objects of the user. A user's script is ``__main__``."""


_OPAQUE = frozenset(sys.stdlib_module_names) - {"__main__", "types"}
"""Packages whose objects, such as queues and locks, may change in other threads."""


_HOOKS = frozenset(name for name in vars(nn.Module()) if "hook" in name)
"""Attributes of modules that hold hooks. Hooks lead to observers, such as a trainer, not to state."""


def reachable(roots: Iterable[Any]) -> Iterator[Any]:
    """Yield the objects that ``roots`` hold, ``roots`` included, nearest ones first.

    >>> layer, factor = nn.Linear(2, 1), torch.ones(1)
    >>> found = list(reachable([functools.partial(torch.mul, factor), [layer.forward]]))
    >>> any(held is layer for held in found), any(held is factor for held in found)
    (True, True)
    """
    pending, known = deque(roots), dict[int, Any]()
    while pending and len(known) < _MOST_OBJECTS:
        value = pending.popleft()
        if type(value) in PLAIN or id(value) in known:
            continue
        known[id(value)] = value  # a reference, so that the id is not reused
        yield value
        pending.extend(islice(_held_by(value), _MOST_ITEMS))


def _held_by(value: Any) -> Iterator[Any]:
    if isinstance(value, (Tensor, np.ndarray, ModuleType, type, *GENERATORS)):
        return
    if isinstance(value, Mapping):
        yield from list(islice(value.values(), _MOST_ITEMS))
    elif isinstance(value, (list, tuple, deque, set, frozenset)):
        yield from value
    elif isinstance(value, FunctionType):
        yield from _held_by_function(value)
    elif isinstance(value, MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif type(value).__module__.partition(".")[0] not in _OPAQUE:
        skipped = _HOOKS if isinstance(value, nn.Module) else ()
        yield from (held for name, held in _attributes(value).items() if name not in skipped)
        for name in _slots(value):
            yield getattr(value, name, None)
        for kind in type(value).__mro__:
            if not _in_library(kind):
                yield from (f for f in vars(kind).values() if isinstance(f, FunctionType))


def _held_by_function(function: FunctionType) -> Iterator[Any]:
    if _in_library(function):
        return
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    yield from vars(function).values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # an empty cell
            continue
    for name in _names_in(function.__code__):
        if name in function.__globals__:
            yield function.__globals__[name]


def _names_in(code: CodeType) -> Iterator[str]:
    """Yield the global names that ``code`` and the functions defined in it may use."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def _in_library(value: Any) -> bool:
    package = str(getattr(value, "__module__", "")).partition(".")[0]
    return package in _LIBRARIES and package != "__main__"


def _attributes(value: Any) -> dict[str, Any]:
    attributes = getattr(value, "__dict__", {})
    return attributes if isinstance(attributes, dict) else {}


def _slots(value: Any) -> Iterator[str]:
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                yield name


GENERATORS = (
    torch.Generator,
    np.random.Generator,
    np.random.RandomState,
    np.random.BitGenerator,
    random.Random,
)


class HeldState:
    """A snapshot of the objects that ``roots`` hold: attributes, containers, generators, small tensors.

    Large tensors and arrays are data. Parameters and buffers of modules are not part of the state.

    >>> class Counting:
    ...     epoch = 0
    >>> sampler = Counting()
    >>> before = HeldState([sampler])
    >>> sampler.epoch += 1
    >>> before.changed, before.restore(), sampler.epoch
    (True, None, 0)
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.roots = list(roots)
        self._values: list[Any] = []
        for value in reachable(self.roots):
            if isinstance(value, nn.Module) or _without_state(value):
                continue
            if hasattr(value, "__dict__"):  # an empty one too: attributes may be added
                self._values.append(_attributes(value))
            self._values.append(value)
        self._restorers: list[Callable[[], object]] = []
        for value in self._values:
            if _is_state(value) and (restore := restorer(value)) is not None:
                self._restorers.append(restore)
        self._fingerprints_at_start, self._generators_at_start = (
            self._fingerprints(),
            self._generator_fingerprints(),
        )

    @property
    def changed(self) -> bool:
        """Whether the state differs from the snapshot."""
        return self._fingerprints() != self._fingerprints_at_start

    @property
    def drew(self) -> bool:
        """Whether a generator has drawn since the snapshot."""
        return self._generator_fingerprints() != self._generators_at_start

    def restore(self) -> None:
        """Restore the state in place."""
        for restore in self._restorers:
            restore()

    def _fingerprints(self) -> list[Any]:
        return [_fingerprint(value) for value in self._values if _is_state(value)]

    def _generator_fingerprints(self) -> list[Any]:
        return [
            _fingerprint(value)
            for value in self._values
            if isinstance(value, GENERATORS) and _is_state(value)
        ]


def generator_states(others: Iterable[Any] = ()) -> list[Any]:
    """Return the states of the process's generators and of ``others``, for comparison."""
    numpy = np.random.get_state(legacy=False)["state"]  # noqa: NPY002
    states = [
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        numpy["pos"],
        numpy["key"].tobytes(),
    ]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states.extend(state.numpy().tobytes() for state in torch.cuda.get_rng_state_all())
    return states + [_fingerprint(generator) for generator in others]


def _without_state(value: Any) -> bool:
    return isinstance(value, (ModuleType, type, FunctionType, MethodType))


def _is_state(value: Any) -> bool:
    if isinstance(value, Tensor):
        small = value.numel() <= _MOST_ELEMENTS and not value.is_meta
        return small and not value.is_inference() and not isinstance(value, nn.Parameter)
    if isinstance(value, random.SystemRandom):
        return False
    return not isinstance(value, np.ndarray) or value.size <= _MOST_ELEMENTS


def _fingerprint(value: Any) -> Any:
    """Return a value that differs after ``value`` has changed in place."""
    if isinstance(value, Tensor):
        return value._version
    if isinstance(value, np.ndarray):
        return value.tobytes() if value.dtype != object else [id(v) for v in value.flat]
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.BitGenerator):
        return repr(value.state)
    if isinstance(value, np.random.RandomState):
        kind, keys, *rest = value.get_state()
        return kind, np.asarray(keys).tobytes(), rest
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, MutableMapping):
        return [(key, _value_or_id(held)) for key, held in value.items()]
    if isinstance(value, (list, deque, set)):
        return [_value_or_id(held) for held in value]
    return None


def _value_or_id(value: Any) -> Any:
    return value if type(value) in PLAIN else id(value)
