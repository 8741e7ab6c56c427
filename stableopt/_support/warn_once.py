"""`WarnOnce`: warnings that are not repeated at each step of training."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

__all__ = ["WarnOnce"]

T = TypeVar("T")


class WarnOnce:
    """Issues a ``RuntimeWarning`` once for each reason; ``active=False`` issues none."""

    def __init__(self, active: bool = True) -> None:
        self._active = active
        self._reasons: set[str] = set()

    def __call__(self, what: str, why: str) -> None:
        """Warn that ``what`` happened, unless an earlier warning had the reason ``why``."""
        if self._active and why not in self._reasons:
            self._reasons.add(why)
            warnings.warn(f"{what}: {why}", RuntimeWarning, stacklevel=3)

    def guarded(self, what: str, function: Callable[[T], object]) -> Callable[[T], None]:
        """Return ``function`` with a warning that ``what`` happened instead of its errors."""

        def call(argument: T) -> None:
            try:
                function(argument)
            except Exception as error:  # training must continue
                self(what, str(error))

        return call

    def always(self, text: str) -> None:
        """Warn of an event that does not repeat."""
        if self._active:
            warnings.warn(text, RuntimeWarning, stacklevel=3)
