"""`configured`: sets fields of a dataclass from the command line's ``KEY=VALUE``, by tyro."""

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
"""Values that may be written in lower case, as Python spells them."""


def configured(default: T, texts: Iterable[str]) -> T:
    """Return a copy of a dataclass instance with the fields set by ``KEY=VALUE`` texts.

    Several values are separated by commas.

    Raises:
        ValueError: for an unknown key, or a value of the wrong type.

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
        values = [value]
        if str(types[key]).startswith("tuple"):
            values = value.split(",") if value else []
        words = [WORDS.get(word.lower(), word) for word in values]
        try:
            with redirect_stderr(StringIO()):  # the ValueError below replaces tyro's page
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
