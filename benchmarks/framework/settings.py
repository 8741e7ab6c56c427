"""``KEY=VALUE`` from a command line, for the fields of a dataclass."""

from __future__ import annotations

import typing
from collections.abc import Iterable
from dataclasses import fields
from types import UnionType
from typing import Any

__all__ = ["parsed", "parsed_value"]


def parsed(kind: type[Any], texts: Iterable[str]) -> dict[str, Any]:
    """Return the fields that ``KEY=VALUE`` texts set.

    Raises:
        ValueError: for a key that ``kind`` does not have, or a value that does not fit.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Config:
    ...     lrs: tuple[float, ...] = ()
    ...     n: int | None = None
    >>> parsed(Config, ["lrs=0.5,1", "n=3"]), parsed(Config, ["lrs=", "n=none"])
    ({'lrs': (0.5, 1.0), 'n': 3}, {'lrs': (), 'n': None})
    """
    values = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: expected KEY=VALUE")
        values[key] = parsed_value(kind, key, value)
    return values


def parsed_value(kind: type[Any], key: str, text: str) -> Any:
    """Return what ``text`` means for the field ``key``; see :func:`parsed`."""
    hints = typing.get_type_hints(kind)
    types = {field.name: hints[field.name] for field in fields(kind)}
    if key not in types:
        raise ValueError(f"{key}={text}: expected one of {', '.join(types)}")
    try:
        return _parse(text, types[key])
    except (ValueError, KeyError):
        raise ValueError(f"{key}={text}: expected {_name(types[key])}") from None


def _parse(text: str, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        parts = text.split(",") if text else []
        return tuple(_parse(part, typing.get_args(kind)[0]) for part in parts)
    if typing.get_origin(kind) in (UnionType, typing.Union):
        if text.lower() == "none":
            return None
        kind = typing.get_args(kind)[0]
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    return kind(text)


def _name(kind: Any) -> str:
    return getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind)
