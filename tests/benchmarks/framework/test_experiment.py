"""What an experiment's cases give: jobs, rows, tables; and settings that come back from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from runner_jobs import Number

from benchmarks.framework.experiment import Case, Experiment, Tables, case_of
from benchmarks.framework.tables import Row, records, table
from benchmarks.runner import Job, Place, Store, Work, run_all


@dataclass(frozen=True)
class Power:
    """A typed result, with a field that older results do not have."""

    value: float
    digits: int = 0


@dataclass(frozen=True)
class Raised(Job):
    """Raises a number to a power, in a typed result."""

    kind = "raised"
    Result: ClassVar = Power

    base: float
    exponent: int = 2

    def run(self, work: Work) -> dict[str, Any]:
        return {"value": self.base**self.exponent, "unknown": "left out"}


@dataclass(frozen=True)
class Powers(Experiment):
    """Squares, and numbers by two rows each."""

    name = "powers"
    shows = "nothing"
    bases: tuple[float, ...] = (2.0, 3.0)

    def cases(self) -> Mapping[str, Sequence[Case]]:
        return {
            "squares": [case_of(Raised(base), "base", kind="square") for base in self.bases],
            "numbers": [Case(Number(base), {"number": base}) for base in self.bases],
        }

    def rows(self, name: str, case: Case, result: Any, store: Store) -> Iterator[Row]:
        if name == "squares":
            yield from super().rows(name, case, result, store)
            return
        for sign in (1, -1):
            yield {**case.keys, "signed": sign * case.job.x}

    def derived(self, tables: Tables) -> Tables:
        if "squares" not in tables:
            return {}
        return {"sum": table([{"sum": tables["squares"]["value"].sum()}])}


def test_tables_are_those_of_the_cases_that_are_done(tmp_path: Path) -> None:
    """Catches a case without its job, a row of an unfinished job, and a lost key.

    Also catches a table without rows, and a derived table where the tables it needs are missing.
    """
    powers, store = Powers(), Store(tmp_path)
    assert powers.jobs() == [Raised(2.0), Raised(3.0), Number(2.0), Number(3.0)]
    assert powers.tables(store) == {}
    assert not run_all(powers.jobs()[1:3], store, Place()).failed
    tables = powers.tables(store)
    assert records(tables["squares"]) == [
        {"base": 3.0, "kind": "square", "value": 9.0, "digits": 0}
    ]
    assert records(tables["numbers"]) == [
        {"number": 2.0, "signed": 2.0},
        {"number": 2.0, "signed": -2.0},
    ]
    assert records(tables["sum"]) == [{"sum": 9.0}]


def test_the_terminal_shows_chosen_columns() -> None:
    """Catches columns in another order, and a table that was to be left out."""

    class Chosen(Powers):
        columns: ClassVar = {"a": ("y", "x"), "b": ()}

    tables = {name: table([{"x": 1, "y": 2, "z": 3}]) for name in "abc"}
    shown = Chosen().summary(tables)
    assert {name: list(rows.columns) for name, rows in shown.items()} == {
        "a": ["y", "x"],
        "c": ["x", "y", "z"],
    }


def test_settings_come_back_from_a_file() -> None:
    """Catches a tuple that is read back as a list: its jobs would have other ids."""
    powers = Powers(bases=(5.0,), seeds=(0, 1))
    again = Powers.from_json(json.loads(json.dumps(powers.settings)))
    assert again == powers
    assert [job.id for job in again.jobs()] == [job.id for job in powers.jobs()]


def test_the_report_reads_the_modules_docstring() -> None:
    """Catches a paragraph with line breaks, or of another module."""
    headline, *_ = Powers.about()
    assert headline.startswith("What an experiment's cases give")


def test_a_typed_result_reads_older_and_newer_files() -> None:
    """Catches a result that can no longer be read since a field was added or removed."""
    assert Raised.typed({"value": 4.0, "removed": 1}) == Power(4.0)
    assert Raised.typed(asdict(Power(4.0, 3))) == Power(4.0, 3)
    assert Number.typed({"value": 1}) == {"value": 1}
    with pytest.raises(TypeError):
        Raised.typed({})
