"""Decorators that keep the old names of functions and keywords, with a ``DeprecationWarning``."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

__all__ = ["positional_keywords", "renamed_keywords", "renamed_names", "warn_renamed"]

P = ParamSpec("P")
T = TypeVar("T")


def warn_renamed(old: str, new: str, *, stacklevel: int = 3) -> None:
    """Warn that ``old`` is now called ``new``; by default at the caller of the caller."""
    warnings.warn(
        f"{old} is deprecated and will be removed in 1.0: use {new}",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


def renamed_keywords(**names: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a function so that it also accepts old keywords: ``old="new"``.

    >>> @renamed_keywords(max="largest")
    ... def clip(x, *, largest): return min(x, largest)
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     clip(3, max=2)
    2
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            _rename(kwargs, names)
            return function(*args, **kwargs)

        return wrapped

    return decorate


def _rename(kwargs: dict[str, Any], names: dict[str, str]) -> None:
    for old, new in names.items():
        if old in kwargs:
            if new in kwargs:
                raise TypeError(f"{new} and its old name {old} are both given: expected only {new}")
            warn_renamed(f"the keyword {old}", new, stacklevel=4)
            kwargs[new] = kwargs.pop(old)


def renamed_names(module: str, **names: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for ``module`` that resolves its old names: ``Old="New"``."""

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", f"{module}.{names[name]}")
        return getattr(importlib.import_module(module), names[name])

    return __getattr__


def positional_keywords(*names: str, **renamed: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorate a keyword-only class method so that it accepts old positions and keywords, ``old="new"``.

    >>> class Interval:
    ...     @classmethod
    ...     @positional_keywords("high", "low")
    ...     def between(cls, *, low, high): return high - low
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     Interval.between(3, 2)
    1
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
            owner, *values = args
            _rename(kwargs, renamed)
            if len(values) > len(names):
                raise TypeError(f"expected at most {len(names)} positional arguments: {names}")
            for name in names[: len(values)]:
                if name in kwargs:
                    raise TypeError(
                        f"{name} is given by position and by keyword: expected one of them"
                    )
            if values:
                title = f"{function.__qualname__} with positional arguments"
                warn_renamed(title, "keywords: " + ", ".join(names[: len(values)]))
                kwargs.update(zip(names, values, strict=False))
            return function(owner, **kwargs)  # type: ignore[arg-type]

        return wrapped

    return decorate
