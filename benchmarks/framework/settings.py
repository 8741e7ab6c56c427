"""`configured`: ``KEY=VALUE`` from a command line, for the fields of a dataclass, by tyro."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import redirect_stderr
from dataclasses import fields
from io import StringIO
from typing import TypeVar

import tyro

__all__ = ["configured"]

T = TypeVar("T")

WORDS = {"none": "None", "true": "True", "false": "False"}
"""Values that may be written in lower case."""


def configured(default: T, texts: Iterable[str]) -> T:
    """Return a dataclass instance with the fields that ``KEY=VALUE`` texts set.

    Several values are separated by commas.

    Raises:
        ValueError: for a key that it does not have, or a value that does not fit.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Config:
    ...     lrs: tuple[float, ...] = ()
    ...     n: int | None = None
    >>> configured(Config(), ["lrs=0.5,1", "n=3"]), configured(Config(n=1), ["lrs=", "n=none"])
    (Config(lrs=(0.5, 1.0), n=3), Config(lrs=(), n=None))
    """
    types = {field.name: field.type for field in fields(default)}  # type: ignore[arg-type]
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--set {text}: expected KEY=VALUE")
        if key not in types:
            raise ValueError(f"{text}: expected one of {', '.join(types)}")
        several = str(types[key]).startswith("tuple")
        values = (value.split(",") if value else []) if several else [value]
        words = [WORDS.get(each.lower(), each) for each in values]
        try:
            with redirect_stderr(StringIO()):  # one line says what is wrong
                default = tyro.cli(
                    type(default),
                    default=default,
                    args=[f"--{key.replace('_', '-')}", *words],
                    config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
                )
        except SystemExit:
            kind = types[key]
            raise ValueError(f"{text}: expected {getattr(kind, '__name__', kind)}") from None
    return default
