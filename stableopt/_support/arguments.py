"""Checks of arguments: `whole`, `positive` and `non_negative` numbers, `finite_size`, `instance`."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

__all__ = [
    "finite_size",
    "instance",
    "non_negative",
    "positive",
    "require_keys",
    "shown",
    "whole",
    "with_article",
]

T = TypeVar("T")

_LONGEST = 100
"""Length of an argument that a message shows."""


def whole(name: str, value: Any, *, least: int = 1) -> int:
    """Return ``value`` as an ``int`` if it is a whole number of at least ``least``.

    NumPy integers are accepted; ``True``, 2.0 and "2" are not.

    >>> whole("every", 50)
    50
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise ValueError(f"{name}={value!r}: expected a whole number of at least {least}")
    return number


def positive(name: str, value: Any) -> float:
    """Return ``value`` as a ``float`` if it is a positive finite number.

    >>> positive("tol", 1e-3)
    0.001
    """
    number = _number(value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name}={value!r}: expected a positive number")
    return number


def non_negative(name: str, value: Any) -> float:
    """Return ``value`` as a ``float`` if it is zero or a positive finite number.

    >>> non_negative("kick", 0)
    0.0
    """
    number = _number(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name}={value!r}: expected 0 or a positive number")
    return number


def finite_size(
    dataset_size: Any, samples: int, *, least: int = 1, full_batch: bool = False
) -> int | None:
    """Return ``dataset_size``, or the given ``samples`` if it is ``None``; ``None`` for infinity.

    Infinity is refused for a ``full_batch``.

    >>> finite_size(None, 60), finite_size(1000, 60), finite_size(math.inf, 60)
    (60, 1000, None)
    """
    if isinstance(dataset_size, float) and dataset_size == math.inf:
        if full_batch:
            raise ValueError("dataset_size=inf: expected a finite number: a step takes all samples")
        return None
    size = whole("dataset_size", samples if dataset_size is None else dataset_size)
    if size < least:
        raise ValueError(f"dataset_size={size}: expected at least the {least} samples given")
    return size


def _number(value: Any) -> float:
    """Return ``value`` as a ``float``, NaN if it is not a number."""
    try:
        return math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError):
        return math.nan


def shown(value: Any) -> str:
    """Return ``repr(value)`` for a message, or only its type if that is long: models, tensors, data.

    >>> shown("mse"), shown(list(range(100)))
    ("'mse'", '<list>')
    """
    text = repr(value)
    return text if len(text) <= _LONGEST and "\n" not in text else f"<{type(value).__name__}>"


def with_article(noun: str) -> str:
    """Return a name with its indefinite article.

    >>> with_article("UpdateRule"), with_article("Problem")
    ('an UpdateRule', 'a Problem')
    """
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def instance(name: str, value: Any, kind: type[T]) -> T:
    """Return ``value`` if it is an instance of ``kind``, else raise a ``TypeError``.

    >>> instance("ratio", 0.5, float)
    0.5
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name}={shown(value)}: expected {with_article(kind.__name__)}")
    return value


def require_keys(
    state_dict: Mapping[str, Any], keys: Iterable[str], name: str = "state_dict"
) -> None:
    """Raise a ``ValueError`` if ``state_dict`` lacks one of ``keys``, a ``TypeError`` if it has none."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{name}={state_dict!r}: expected a Mapping")
    missing = set(keys) - state_dict.keys()
    if missing:
        raise ValueError(f"{name} lacks {sorted(missing)}")
