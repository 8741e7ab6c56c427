"""Runs of an experiment in a test: small, in the test's process, or without rendering."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks import sweep_runner
from benchmarks.framework.experiment import Experiment
from benchmarks.framework.tables import read_table, write_table
from benchmarks.runner import Place, Store, run_all

__all__ = ["run_in_this_process", "small_run"]


def run_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the command line run jobs in this process, without a new process that imports torch."""
    made = sweep_runner.made_executor

    def executor(name: str, workers: int) -> Any:
        made(name, workers)
        return lambda: ThreadPoolExecutor(1)

    monkeypatch.setattr(sweep_runner, "made_executor", executor)


def small_run(experiment: Experiment, folder: Path) -> tuple[dict[str, Any], set[str], Store]:
    """Run the jobs of an experiment in a folder.

    Returns its tables as their CSV files have them; the names of those that have a picture, drawn
    from what was read; and the store.
    """
    store = Store(folder / "runs")
    summary = run_all(experiment.jobs(), store, Place())
    assert [(job, store.failure(job)) for job in summary.failed] == []
    tables = {}
    for name, rows in experiment.tables(store).items():
        write_table(folder / f"{name}.csv", rows)
        tables[name] = read_table(folder / f"{name}.csv")
    figures = {name: experiment.draw(name, rows) for name, rows in tables.items()}
    drawn = {name for name, figure in figures.items() if figure is not None and figure.axes}
    return tables, drawn, store
