"""A release states the same version everywhere."""

from __future__ import annotations

import re
from pathlib import Path

import stableopt

ROOT = Path(__file__).parents[1]


def test_one_version() -> None:
    """Catches a version that was raised in one place, and a changelog that ends at another."""
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited == stableopt.__version__
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in ("Unreleased", stableopt.__version__)
