"""Settings from the command line: their types, and what is refused."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.framework.settings import configured


@dataclass(frozen=True)
class Config:
    lrs: tuple[float, ...] = ()
    names: tuple[str, ...] = ()
    n: int = 1
    size: int | None = None
    folder: Path | None = None
    fast: bool = False


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lrs=0.5", (0.5,)),
        ("lrs=1e-3,2", (0.001, 2.0)),
        ("lrs=", ()),
        ("names=a,b", ("a", "b")),
        ("n=-3", -3),
        ("size=none", None),
        ("size=4", 4),
        ("folder=a=b", Path("a=b")),
        ("fast=True", True),
        ("fast=false", False),
    ],
)
def test_settings_have_the_type_of_their_field(text: str, value: Any) -> None:
    """Catches text where a number belongs, and "false" read as true because it is not empty."""
    key = text.partition("=")[0]
    config = configured(Config(), [text])
    assert config == replace(Config(), **{key: value})
    assert type(getattr(config, key)) is type(value)


@pytest.mark.parametrize("text", ["n=0.5", "n=", "lrs=1,,2", "size=x", "fast=yes", "N=1"])
def test_settings_that_do_not_fit_are_refused(text: str) -> None:
    """Catches a value that is converted until it fits."""
    with pytest.raises(ValueError, match=re.escape(f"{text}: expected")):
        configured(Config(), [text])
