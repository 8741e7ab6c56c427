"""What an experiment is: settings, the jobs that they ask for, and what is made of their results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from benchmarks.runner import Job, Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

__all__ = ["PRESETS", "Claim", "Experiment", "Rows", "spread"]

PRESETS = ("smoke", "small", "paper")
"""Smoke: that it runs. Small: minutes to an hour of two cores. Paper: the paper's sizes, for a GPU."""

Rows = list[dict[str, Any]]
"""A table: a dictionary of numbers and strings for each row, all with the same keys."""


@dataclass(frozen=True)
class Claim:
    """Something that the paper prints, or that the theory says, beside what came out here.

    Attributes:
        what: it is about, with its place in the paper.
        printed: the value or statement there.
        ours: the value here with its spread, or what was seen.
        tolerance: within which it counts as the same.
        reproduced: whether it is the same.
        why: a word to it; where it is not reproduced, the reason.
    """

    what: str
    printed: str
    ours: str
    tolerance: str
    reproduced: bool
    why: str = ""


@dataclass(frozen=True)
class Experiment(ABC):
    """An experiment with its settings, which are its fields.

    Class attributes:
        name: on the command line.
        shows: which table or figure of the paper, or that it goes beyond the paper.
        datasets: the names of the data sets that it can be run on, the default first.
        columns: which columns of a table to print, by the table's name; all by default, and none of a
            table with an empty tuple. The CSV files always have all.
        presets: what differs from the defaults, by ``(preset, data)``; ``(preset, "")`` is for data
            sets without an entry of their own.

    Attributes:
        data: the data set.
        seeds: one run of everything for each.
    """

    name: ClassVar[str]
    shows: ClassVar[str]
    datasets: ClassVar[tuple[str, ...]] = ("digits", "fashion-mnist")
    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    presets: ClassVar[Mapping[tuple[str, str], Mapping[str, Any]]] = {}

    data: str = "digits"
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for data that the experiment cannot be run on."""
        if self.data not in self.datasets:
            known = " or ".join(self.datasets)
            raise ValueError(f"{self.name}: data={self.data!r}, expected {known}")

    @classmethod
    def preset(cls, preset: str, data: str | None = None, **settings: Any) -> Experiment:
        """Return the experiment with a preset's settings, and then the ones given."""
        data = data or cls.datasets[0]
        chosen = cls.presets.get((preset, data), cls.presets.get((preset, ""), {}))
        return cls(**{**chosen, **settings, "data": data})

    @property
    def settings(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    @abstractmethod
    def jobs(self) -> list[Job]:
        """Return what is to be computed. What these need comes by itself."""

    @abstractmethod
    def tables(self, store: Store) -> dict[str, Rows]:
        """Return tables of what has been computed, by name; of a part, while not all is done."""

    def draw(self, name: str, rows: Rows) -> Figure | None:
        """Return the picture of a table, from that alone; ``None`` for a table that has none."""
        return None

    def claims(self, tables: Mapping[str, Rows]) -> list[Claim]:
        """Return the tables beside what the paper prints."""
        return []

    def foretell(self, job: Job, store: Store) -> str | None:
        """Return a line to print when ``job`` is done, if there is something to say."""
        return None

    def summary(self, tables: Mapping[str, Rows]) -> Mapping[str, Rows]:
        """Return what is printed: all tables, with the columns of :attr:`columns`."""
        return {
            name: [{key: row[key] for key in self.columns.get(name, row)} for row in rows]
            for name, rows in tables.items()
            if self.columns.get(name, True)
        }

    def show(self, console: Console, tables: Mapping[str, Rows]) -> None:
        """Print the summary, and the claims."""
        from rich.table import Table

        for name, rows in self.summary(tables).items():
            if not rows:
                continue
            table = Table(title=name.replace("-", " "))
            for key in rows[0]:
                table.add_column(key.replace("_", " "), justify="right")
            for row in rows[:MOST_ROWS]:
                table.add_row(*map(cell, row.values()))
            console.print(table)
            if len(rows) > MOST_ROWS:
                console.print(f"and {len(rows) - MOST_ROWS} more rows in the CSV file")
        console.print(*map(verdict, self.claims(tables)), sep="\n", highlight=False)


MOST_ROWS = 40
"""That a terminal is troubled with."""


def verdict(claim: Claim) -> str:
    """Return a claim as a line of a terminal."""
    mark = "[green]✓[/green]" if claim.reproduced else "[red]✗[/red]"
    why = f" ({claim.why})" if claim.why else ""
    return f"{mark} {claim.what}: printed {claim.printed}; here {claim.ours}{why}"


def cell(value: Any) -> str:
    """Return ``value`` as a table shows it.

    >>> cell(0.123456), cell(None), cell(12), cell("B = 4")
    ('0.1235', '–', '12', 'B = 4')
    """
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def spread(values: Sequence[float], form: str = ".3g") -> str:
    """Return mean and standard deviation of what several seeds gave.

    >>> spread([1.0, 2.0, 3.0])
    '2 ± 1 (3 seeds)'
    >>> spread([2.0])
    '2 (1 seed)'
    """
    from statistics import mean, stdev

    if len(values) == 1:
        return f"{values[0]:{form}} (1 seed)"
    return f"{mean(values):{form}} ± {stdev(values):{form}} ({len(values)} seeds)"
