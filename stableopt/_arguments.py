"""`whole` and `positive`: checks of numbers given as arguments."""

from __future__ import annotations

import math
import operator
from typing import Any

__all__ = ["positive", "whole"]


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
    try:
        number = math.nan if isinstance(value, (str, bool)) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"{name}={value!r}: expected a positive number")
    return number
