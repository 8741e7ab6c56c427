"""The values of ``docs/defaults.md`` are those of the code."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "defaults.md"
ROWS = re.findall(r"^\| `([\w.]+)(?:\((\w+)\))?` \| `([^`]+)` \| (.+) \|$", PAGE.read_text(), re.M)


def resolve(name: str) -> Any:
    """Return the object ``stableopt.<name>``, importing as many modules as its path has."""
    found: Any = importlib.import_module("stableopt")
    path = found.__name__
    for part in name.split("."):
        path = f"{path}.{part}"
        if hasattr(found, part) and not inspect.isfunction(getattr(found, part)):
            found = getattr(found, part)
            continue
        try:
            found = importlib.import_module(path)
        except ModuleNotFoundError:
            found = getattr(found, part)
    return found


@pytest.mark.parametrize(("name", "argument", "value"), [row[:3] for row in ROWS])
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

    listed = {(name.rpartition(".")[2], argument) for name, argument, *_ in ROWS}
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
