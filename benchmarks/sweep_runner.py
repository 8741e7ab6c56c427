"""`SweepRunner`: runs the jobs of experiments, and prints and publishes the results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.agenda import Part
from benchmarks.framework.experiment import Experiment
from benchmarks.framework.publish import publish
from benchmarks.framework.terminal import show
from benchmarks.runner import Job, Place, Store, in_order, run_all
from benchmarks.runner.bars import Bars
from benchmarks.runner.estimate import estimate, readable
from benchmarks.runner.schedule import Summary
from benchmarks.runner.workers import executor as made_executor
from benchmarks.sweeps import remember

__all__ = ["SweepRunner"]


class SweepRunner:
    """Runs the jobs of experiments, and prints and publishes the results.

    Args:
        store: the folder of the jobs.
        workers: number of parallel jobs.
        executor: the name of an executor, as for :func:`~benchmarks.runner.workers.executor`.
        device: the device of the jobs.
        data_dir: folder of the data; by default that of ``STABLEOPT_DATA``, or a cache.
    """

    def __init__(
        self, store: Store, workers: int, executor: str, device: str, data_dir: Path | None
    ) -> None:
        self.console, self.store, self.workers, self.device = Console(), store, workers, device
        self.make_executor = made_executor(executor, workers)
        self.local = executor == "processes"
        threads = max(1, torch.get_num_threads() // workers) if self.local else None
        self.place = Place(device, data_dir, threads)

    def announce(self, experiment: Experiment, preset: str, jobs: Sequence[Job]) -> list[Job]:
        """Print how many jobs remain; return them."""
        all_jobs = in_order(jobs)
        remaining = [job for job in all_jobs if not self.store.done(job)]
        estimated = readable(estimate(all_jobs, self.store, self.workers, self.device))
        self.console.print(
            f"[bold]{experiment.name}[/bold]: {experiment.shows}\n{preset} preset, {experiment.data}:"
            f" {len(all_jobs)} jobs, {len(remaining)} to do ({estimated})",
            highlight=False,
        )
        return remaining

    def run(
        self,
        experiment: Experiment,
        preset: str,
        jobs: Sequence[Job],
        *,
        members: int = 1,
        retry: bool = False,
        seconds: float = math.inf,
    ) -> Summary:
        """Run the jobs; print and publish the results."""
        store, console = self.store, self.console
        if remember(experiment, preset, store):
            console.print("replaces tables and figures of other settings; another --out keeps both")
        headline = partial(experiment.headline, store=store)
        with Bars(in_order(jobs), store, console, headline, self.device) as bars:
            summary = run_all(
                jobs,
                store,
                self.place,
                make_executor=self.make_executor,
                in_flight=self.workers if self.local else None,
                members=members,
                retry=retry,
                seconds=seconds,
                watch=bars,
            )
        # Publish first: claims may raise an error while jobs are missing.
        files = publish(experiment, preset, store, store.root)
        show(console, experiment, experiment.tables(store))
        if summary.failed:
            console.print(
                f"[red]{len(summary.failed)} failed[/red], {len(summary.blocked)} wait for these;"
                f" --retry runs them again. The errors are in {store.jobs}/ID.part/failed.json",
                highlight=False,
            )
        console.print(
            f"Tables and figures in {files[-1].parent}\n", highlight=False, soft_wrap=True
        )
        return summary

    def show_agenda(self, agenda: Sequence[Part], preset: str) -> None:
        """Print the experiments with jobs left, in order."""
        table = Table(title=f"Missing of the {preset} preset in {self.store.root}")
        for heading in ("experiment", "shows", "data", "jobs left", "time, roughly"):
            table.add_column(heading, overflow="fold")
        for part in agenda:
            names = (part.experiment.name, part.experiment.shows, part.experiment.data)
            table.add_row(*names, str(part.jobs), readable(part.seconds))
        self.console.print(table if agenda else f"Nothing of the {preset} preset is missing.")
