"""`Experiment`: settings, the jobs that they ask for, and the tables, figures and claims they give."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import pandas as pd

from benchmarks.framework.claims import Claim
from benchmarks.framework.tables import Row, table
from benchmarks.runner import Job, Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PRESETS", "Case", "Experiment", "Tables", "case"]

PRESETS = ("smoke", "small", "paper")
"""Smoke: that it runs. Small: minutes to an hour of two cores. Paper: the paper's sizes, for a GPU."""

Tables = Mapping[str, pd.DataFrame]
"""Tables by name, without those that have no rows yet."""


class Case(NamedTuple):
    """A job, and the columns that tell it from the others in its table."""

    job: Any
    keys: dict[str, Any]


def case(job: Job, *fields: str, **keys: Any) -> Case:
    """Return a case whose keys are fields of the job, and others.

    >>> from benchmarks.training.data import Dataset
    >>> from benchmarks.training.minimum import Solution
    >>> case(Solution(Dataset(), lr=0.5), "lr", "seed", start="random").keys
    {'lr': 0.5, 'seed': 0, 'start': 'random'}
    """
    return Case(job, {name: getattr(job, name) for name in fields} | keys)


@dataclass(frozen=True)
class Experiment(ABC):
    """An experiment with its settings, which are its fields.

    A subclass has :meth:`cases`; jobs and tables follow from these. What the report says about it is
    the second paragraph of its module's docstring.

    Class attributes:
        name: on the command line.
        shows: which table or figure of the paper, or that it goes beyond the paper.
        datasets: the names of the data sets that it can be run on, the default first.
        columns: the columns of a table that the terminal shows, by the table's name: all by default,
            and none of a table with an empty tuple. The CSV files always have all.
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

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> Experiment:
        """Return the experiment whose :attr:`settings` were written to a file."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})

    @classmethod
    def about(cls) -> list[str]:
        """Return the paragraphs of the module's docstring: a headline, and what the report says."""
        text = sys.modules[cls.__module__].__doc__ or ""
        return [" ".join(part.split()) for part in text.strip().split("\n\n")]

    @property
    def settings(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    @abstractmethod
    def cases(self) -> Mapping[str, Sequence[Case]]:
        """Return the cases of each table. Jobs that these need are added."""

    def jobs(self) -> list[Job]:
        """Return the jobs of all cases, each once."""
        return list(dict.fromkeys(one.job for its in self.cases().values() for one in its))

    def rows(self, name: str, one: Case, found: Any, store: Store) -> Iterable[Row]:
        """Return what a case adds to a table: by default one row, of its keys and its result.

        Args:
            name: the table's.
            one: the case, whose job is done.
            found: its job's result.
            store: for the job's trace, and the results of jobs that it needs.
        """
        return [{**one.keys, **(vars(found) if is_dataclass(found) else found)}]

    def tables(self, store: Store) -> Tables:
        """Return the tables of the cases that are done, and those derived from them."""
        found = {
            name: table(
                row
                for one in its
                if store.done(one.job)
                for row in self.rows(name, one, store.result(one.job), store)
            )
            for name, its in self.cases().items()
        }
        known = {name: content for name, content in found.items() if len(content)}
        return {**known, **self.derived(known)}

    def derived(self, tables: Tables) -> Tables:
        """Return tables that are computed from those of the cases; some of these may be missing."""
        return {}

    def draw(self, name: str, its: pd.DataFrame) -> Figure | None:
        """Return the picture of a table, from that alone; ``None`` for a table that has none."""
        return None

    def claims(self, tables: Tables) -> Iterable[Claim]:
        """Return what the paper prints and the theory predicts, compared with the tables."""
        return []

    def headline(self, job: Job, store: Store) -> str | None:
        """Return what to print when ``job`` is done, if it is worth a line."""
        return None

    def summary(self, tables: Tables) -> Tables:
        """Return what the terminal shows: all tables, with the columns of :attr:`columns`."""
        return {
            name: content[list(self.columns.get(name, content.columns))]
            for name, content in tables.items()
            if self.columns.get(name, True)
        }
