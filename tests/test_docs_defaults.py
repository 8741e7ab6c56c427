"""The values of ``docs/defaults.md`` are those of the code."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "defaults.md"
SECTIONS = re.findall(r"^Names? .*?`(stableopt[\w.]*)`.\n\n((?:\|.*\n)+)", PAGE.read_text(), re.M)
ROW = re.compile(r"^\| `([\w.]+)(?:\((\w+)\))?` \| `([^`]+)` \| .+ \|$", re.M)
ROWS = [
    (f"{prefix}.{name}", *rest) for prefix, table in SECTIONS for name, *rest in ROW.findall(table)
]


def resolve(name: str) -> Any:
    """Return the object called ``name``, importing the modules on its path.

    A module comes before a function of the same name, unless the name ends there.
    """
    *packages, last = name.split(".")
    found: Any = importlib.import_module(packages[0])
    for end in range(2, len(packages) + 1):
        found = importlib.import_module(".".join(packages[:end]))
    return getattr(found, last)


@pytest.mark.parametrize(("name", "argument", "value"), ROWS)
def test_value_is_that_of_the_code(name: str, argument: str, value: str) -> None:
    """Catches a tolerance or default that changed in the code and not on the page, or was renamed."""
    found = resolve(name)
    if argument:
        found = inspect.signature(found).parameters[argument].default
    assert found == eval(value, {})


def test_every_table_row_is_compared() -> None:
    """Catches a row that the pattern above does not match."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(ROWS) == len(lines)


def test_no_numeric_default_is_missing() -> None:
    """Catches a new number among the defaults of the public functions that the page does not list."""
    import stableopt
    from stableopt.steering import batch_staircase, gated_staircase

    listed = {(name.rpartition(".")[2], argument) for name, argument, _ in ROWS}
    for function in (
        stableopt.measure,
        stableopt.critical_lr,
        stableopt.StabilityMonitor,
        stableopt.StabilityController,
        gated_staircase,
        batch_staircase,
    ):
        for parameter in inspect.signature(function).parameters.values():
            number = isinstance(parameter.default, (int, float)) and parameter.default is not False
            if number and parameter.default is not True and parameter.name != "seed":
                assert (function.__name__, parameter.name) in listed
