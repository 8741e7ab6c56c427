"""`Experiment`: settings, the jobs that they require, and the resulting tables, figures and claims."""

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

__all__ = ["PRESETS", "Case", "Experiment", "Tables", "case_of"]

PRESETS = ("smoke", "small", "paper")
"""Smoke: a test that it runs. Small: hours at most on two cores. Paper: the paper's sizes, for a GPU."""

Tables = Mapping[str, pd.DataFrame]
"""Tables by name; tables without rows are left out."""


class Case(NamedTuple):
    """A job, and the columns that identify it in its table."""

    job: Any
    keys: dict[str, Any]


def case_of(job: Job, *fields: str, **keys: Any) -> Case:
    """Return a case whose keys are the named fields of the job, and ``keys``.

    >>> from benchmarks.training.data import Dataset
    >>> from benchmarks.training.minimum import Solution
    >>> case_of(Solution(Dataset(), lr=0.5), "lr", "seed", start="random").keys
    {'lr': 0.5, 'seed': 0, 'start': 'random'}
    """
    return Case(job, {name: getattr(job, name) for name in fields} | keys)


@dataclass(frozen=True)
class Experiment(ABC):
    """An experiment; its fields are its settings.

    A subclass defines :meth:`cases`, from which jobs and tables follow. The second paragraph of its
    module's docstring is its text in the report.

    Class attributes:
        name: its name on the command line.
        shows: the table or figure of the paper, or "Beyond the paper".
        datasets: names of the data sets that it supports, the default first.
        columns: the columns that the terminal shows, by table, all by default; an empty tuple hides
            the table. CSV files always have all columns.
        presets: settings that differ from the defaults, by ``(preset, data)``; ``(preset, "")``
            applies to data sets without their own entry.

    Attributes:
        data: name of the data set.
        seeds: every run is repeated for each seed.
    """

    name: ClassVar[str]
    shows: ClassVar[str]
    datasets: ClassVar[tuple[str, ...]] = ("digits", "fashion-mnist")
    columns: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    presets: ClassVar[Mapping[tuple[str, str], Mapping[str, Any]]] = {}

    data: str = "digits"
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        """Raise ``ValueError`` for a data set that the experiment does not support."""
        if self.data not in self.datasets:
            supported = " or ".join(self.datasets)
            raise ValueError(f"{self.name}: data={self.data!r}, expected {supported}")

    @classmethod
    def preset(cls, preset: str, data: str | None = None, **settings: Any) -> Experiment:
        """Return the experiment with a preset's settings; ``settings`` override them."""
        data = data or cls.datasets[0]
        of_preset = cls.presets.get((preset, data), cls.presets.get((preset, ""), {}))
        return cls(**{**of_preset, **settings, "data": data})

    @classmethod
    def from_json(cls, settings: Mapping[str, Any]) -> Experiment:
        """Return the experiment with :attr:`settings` as read from a JSON file."""
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()})

    @classmethod
    def about(cls) -> list[str]:
        """Return the paragraphs of the module's docstring: a headline, then the report's text."""
        text = sys.modules[cls.__module__].__doc__ or ""
        return [" ".join(part.split()) for part in text.strip().split("\n\n")]

    @property
    def settings(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)

    @abstractmethod
    def cases(self) -> Mapping[str, Sequence[Case]]:
        """Return the cases of each table, without the jobs that they only need."""

    def jobs(self) -> list[Job]:
        """Return the jobs of all cases, without duplicates."""
        return list(dict.fromkeys(case.job for cases in self.cases().values() for case in cases))

    def rows(self, name: str, case: Case, result: Any, store: Store) -> Iterable[Row]:
        """Return a case's rows in a table: by default one, with its keys and its result.

        Args:
            name: the table's name.
            case: the case; its job is done.
            result: the job's result.
            store: gives the job's trace and the results of the jobs that it needs.
        """
        return [{**case.keys, **(vars(result) if is_dataclass(result) else result)}]

    def tables(self, store: Store) -> Tables:
        """Return the tables of the finished cases, and those derived from them."""
        tables = {}
        for name, cases in self.cases().items():
            rows: list[Row] = []
            for case in cases:
                if store.done(case.job):
                    rows += self.rows(name, case, store.result(case.job), store)
            if rows:
                tables[name] = table(rows)
        return {**tables, **self.derived(tables)}

    def derived(self, tables: Tables) -> Tables:
        """Return tables computed from the cases' tables; some of these may be missing."""
        return {}

    def draw(self, name: str, frame: pd.DataFrame) -> Figure | None:
        """Return the figure of a table, or ``None`` if it has no figure."""
        return None

    def claims(self, tables: Tables) -> Iterable[Claim]:
        """Return the claims of the paper and the theory, checked against the tables."""
        return []

    def headline(self, job: Job, store: Store) -> str | None:
        """Return the text to print when ``job`` is done, or ``None`` to print nothing."""
        return None

    def summary(self, tables: Tables) -> Tables:
        """Return the tables that the terminal shows, with the columns of :attr:`columns`."""
        return {
            name: content[list(self.columns.get(name, content.columns))]
            for name, content in tables.items()
            if self.columns.get(name, True)
        }
